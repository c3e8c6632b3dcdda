"""A run's directory: its owner, whether it may be used, and the files that grow with the run."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_collections

from experiments.utils import files

CONFIG, RESULT, METRICS, LOCK = "config.json", "result.json", "metrics.jsonl", ".lock"

# What may change from one session of a run to the next without changing its mathematics or its rows.
NEUTRAL = ("checkpoint_every", "max_to_keep")


class InUseError(OSError):
    """Another process is using the directory."""


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


def write_config(path: pathlib.Path, config: ml_collections.ConfigDict, change: bool = False) -> None:
    """Write the config to a new directory; in one with a run, check that it is the same run.

    Args:
      path: the directory.
      config: of the run about to start or resume.
      change: resume though the mathematics differ.

    Raises:
      ValueError: naming the keys that differ, with both values.
    """
    if (differing := differing_keys(path, config)) and not change:
        raise ValueError(
            f"{path} holds a run with another config ({'; '.join(differing)}): choose another --workdir, "
            "--resume_changed to go on from its checkpoint all the same, or --overwrite to begin anew"
        )
    files.write_json(path / CONFIG, json.loads(config.to_json()))


def differing_keys(path: pathlib.Path, config: ml_collections.ConfigDict) -> list[str]:
    """The keys in which a config differs from that of the run in a directory, with both values; empty without a run."""
    if not (path / CONFIG).exists():
        return []
    mine, theirs = json.loads(config.to_json()), json.loads((path / CONFIG).read_text())
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
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)
