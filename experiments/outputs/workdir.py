"""A run's directory: its owner, whether it may be used, and the files that grow with the run."""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import ml_collections
from absl import logging

from experiments.data import fingerprints
from experiments.utils import files

CONFIG, RESULT, METRICS, LOCK = "config.json", "result.json", "metrics.jsonl", ".lock"
FEATURES, WEIGHTS, PICTURE, DATA = "features.json", "pruned.safetensors", "run.png", "data.json"
CHECKPOINTS, TWIN, ORDERS = "checkpoints", "dense_twin", "orders.json"

# Everything that a run leaves; the config is last, for it marks a directory as a run's.
_CONTENT = (
    RESULT,
    METRICS,
    FEATURES,
    ORDERS,
    WEIGHTS,
    PICTURE,
    DATA,
    CHECKPOINTS,
    TWIN,
    "tensorboard",
    "profile",
    CONFIG,
)
_OLD = ".overwritten"
_OF_RESULT = {"metric", "metric_name", "loss", "diverged", "seconds"}  # what others read of it

# What may change from one session of a run to the next without changing its mathematics or its rows.
NEUTRAL = ("checkpoint_every", "max_to_keep")


class InUseError(OSError):
    """Another process is using the directory."""


class DamagedConfig(ValueError):
    """What run a directory is of cannot be read."""


@contextlib.contextmanager
def claim(path: pathlib.Path) -> Iterator[None]:
    """Create and lock the directory; the lock ends with the process, however it ends.

    Raises:
      InUseError: if another process holds it.
      OSError: if it cannot be made or written to.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise InUseError(f"{path} is in use by process {lock.read().strip() or 'unknown'}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def once(path: pathlib.Path, compute: Callable[[], Any]) -> Any:
    """What `compute()` returns, written to the directory's `result.json`; None if it is there, or in the making."""
    if (path / RESULT).exists():
        return None
    try:
        with claim(path):
            if (path / RESULT).exists():  # since just now
                return None
            result = compute()
            files.write_json(path / RESULT, result)
            return result
    except InUseError:
        return None


def clear(path: pathlib.Path) -> None:
    """Delete the run in a directory: all of it, or nothing. Links are deleted, not what they lead to.

    It is moved aside first, so that nothing of it is found again, whatever then hinders its deletion.

    Raises:
      OSError: if something cannot be moved, and then nothing is; or if what was moved aside cannot be deleted.
    """
    old = path / _OLD
    if os.path.lexists(old):
        _delete(old)
    there = [name for name in _CONTENT if os.path.lexists(path / name)]
    if CONFIG not in there:
        return
    old.mkdir()
    moved: list[str] = []
    try:
        for name in there:
            (path / name).rename(old / name)
            moved.append(name)
    except OSError as error:
        for name in reversed(moved):
            (old / name).rename(path / name)
        old.rmdir()
        raise OSError(
            f"cannot overwrite the run in {path}: {there[len(moved)]} cannot be moved away, {error.strerror}; nothing "
            "was deleted. Choose another --workdir, or delete it yourself"
        ) from error
    for name in there:
        if (old / name).is_symlink():
            target = (old / name).readlink()
            logging.warning("%s was a link to %s, which is left as it is", path / name, target)
    _delete(old)
    if left := [name for name in there if os.path.lexists(path / name)]:
        raise OSError(f"{path} holds {left[0]} again, just deleted: does another program write there?")


def _delete(old: pathlib.Path) -> None:
    try:
        shutil.rmtree(old)
    except OSError as error:
        raise OSError(
            f"{old}, the rest of a run that was overwritten, cannot be deleted: {error}; delete it yourself"
        ) from error


def result_of(path: pathlib.Path) -> dict[str, Any] | None:
    """The content of `result.json` in a run's directory; None if it is not there or not whole, with a warning."""
    return _read(path / RESULT, _OF_RESULT)


def _read(file: pathlib.Path, wanted: Collection[str]) -> dict[str, Any] | None:
    """A file's JSON object with at least these keys."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        reason = str(error)
    else:
        if isinstance(content, dict) and content.keys() >= set(wanted):
            return content
        reason = f"it is no object with {', '.join(sorted(wanted))}"
    _warn(f"{file} is damaged and counts as not there: {reason}")
    return None


@functools.cache  # once for each file: sweeps look at their results again and again
def _warn(text: str) -> None:
    logging.warning("%s", text)


def record_config(path: pathlib.Path, config: ml_collections.ConfigDict, change: bool = False) -> None:
    """Write the config to a new directory; in one with a run, check that it is the same run.

    Args:
      path: the directory.
      config: of the run about to start or resume.
      change: resume though the mathematics differ.

    Raises:
      ValueError: naming the keys that differ, with both values; or if there is the rest of a run without its config.
    """
    if not (path / CONFIG).exists() and (rest := [name for name in (RESULT, CHECKPOINTS) if (path / name).exists()]):
        raise ValueError(
            f"{path} holds {rest[0]} but no {CONFIG}, so what run it is of is not known: choose another --workdir, or "
            "delete it"
        )
    if (differing := differing_keys(path, config)) and not change:
        raise ValueError(
            f"{path} holds a run with another config ({'; '.join(differing)}): choose another --workdir, "
            "--resume_changed to go on from its checkpoint all the same, or --overwrite to begin anew"
        )
    files.write_json(path / CONFIG, json.loads(config.to_json()))


def record_data(path: pathlib.Path, found: Mapping[str, str], change: bool = False) -> None:
    """Write what the data are to a new directory; in one with a run, check that they are the same.

    Args:
      path: the directory.
      found: checksums by file, as `fingerprint` has them.
      change: go on with other data.

    Raises:
      ValueError: naming a file that has changed since the run began.
    """
    before = _read(path / DATA, ["files"])
    if before is not None and not change and (differing := fingerprints.changed(before["files"], found)):
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ValueError(
            f"{differing[0]}{more} changed since the run in {path} began: put it back, choose another --workdir, "
            "--resume_changed to go on from its checkpoint all the same, or --overwrite to begin anew"
        )
    files.write_json(path / DATA, {"files": found})


def differing_keys(path: pathlib.Path, config: ml_collections.ConfigDict) -> list[str]:
    """The keys in which a config differs from that of the run in a directory, with both values; empty without a run."""
    if not (path / CONFIG).exists():
        return []
    mine, theirs = json.loads(config.to_json()), _read(path / CONFIG, ["sparsifier"])
    if theirs is None:
        raise DamagedConfig(
            f"{path / CONFIG} is damaged, so what run it is of is not known: choose another --workdir, or "
            "--overwrite to begin anew"
        )
    keys = [k for k in sorted({*_flat(mine), *_flat(theirs)}) if k.split(".")[0] not in NEUTRAL]
    pairs = [(k, _flat(theirs).get(k, "absent"), _flat(mine).get(k, "absent")) for k in keys]
    return [f"config.{k}: {a!r} there, {b!r} now" for k, a, b in pairs if a != b]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else name).items()}


class Metrics:
    """`metrics.jsonl`: one row per line, none lost or duplicated, however often the run is interrupted.

    Args:
      path: the file.
      step: steps done when the session begins: later rows, from a session that got further than its last checkpoint,
        are dropped, to be written again.
    """

    def __init__(self, path: pathlib.Path, step: int) -> None:
        self.rows = [row for row in _rows(path) if row["step"] <= step]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = path.open("a")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(files.finite(row))
        self._file.write(json.dumps(self.rows[-1]) + "\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The complete rows of the file, without a truncated last one."""
    if path.exists():
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "step" in row:
                    yield row
