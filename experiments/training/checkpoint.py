"""Checkpoints of a training run, with checksums: restored data are verified, and damage is reported.

Orbax writes the arrays, and reads them back onto other devices and processes. It does not notice a flipped byte, and
takes an empty numbered directory for the latest step; so every checkpoint here has a manifest of SHA-256 sums.

    <directory>/300/                what orbax wrote, host.json (step, metric, arrays, host) and manifest.json
    <directory>/400.unfinished/     being written, or left so by a killed run; the next save clears it away
    <directory>/500.damaged-0/      found damaged and moved out of the way of a new checkpoint; never touched again

A checkpoint gets its manifest when orbax is done and its number last, by a rename: a number without an intact manifest
is damage, never a save cut short. `orbax.checkpoint.CheckpointManager` is not used for retention: it deletes
superseded checkpoints in the same call that commits a new one, before its manifest could be written. It also takes a
damaged number for its latest step, and then silently declines to save any step below.

For local and shared POSIX file systems; one run writes to a directory.
"""

import concurrent.futures
import contextlib
import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from experiments.training import sharding
from experiments.utils.files import sha256
from sa_plus_plus.files import sync

HOST, MANIFEST = "host.json", "manifest.json"


class NoIntactCheckpoint(ValueError):
    """There are checkpoints, but each of them is damaged."""


class Restored(NamedTuple):
    """The content of a checkpoint."""

    step: int
    state: Any
    host: dict[str, Any]  # as JSON has it: tuples have become lists, keys text


class Checkpoints:
    """The checkpoints of one run. Every process makes one of these and calls the same methods in the same order.

    `close` belongs in a `finally`: a save still under way when Python exits is lost.
    """

    def __init__(self, directory: str | os.PathLike[str], max_to_keep: int = 2) -> None:
        """Make the directory.

        Args:
          directory: where they go, for all processes.
          max_to_keep: how many of the newest are kept, besides the one of the highest metric.

        Raises:
          ValueError: if `max_to_keep` is less than 1.
          OSError: if the directory cannot be made or written to.
        """
        if max_to_keep < 1:
            raise ValueError(f"max_to_keep must be at least 1, got {max_to_keep}")
        self._directory = pathlib.Path(directory).absolute()
        self._max_to_keep = max_to_keep
        self._directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._directory):
            pass  # raises now rather than at the first save
        self._checkpointer = ocp.StandardCheckpointer()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._latest: int | None = None  # step that this object saved or restored last, on process 0

    def save(self, step: int, state: Any, host: Mapping[str, Any], metric: float | None = None) -> None:
        """Save, returning as soon as `state` may be donated and `host` changed. Does nothing for the step that was
        saved or restored last; otherwise waits for the save before.

        Args:
          step: steps done; more than that of any intact checkpoint in the directory.
          state: tree of `jax.Array`s; with several processes, of global ones.
          host: what else the run needs, in terms of JSON; the same on all processes.
          metric: how good this checkpoint is, higher is better; with None or NaN it is never the best.

        Raises:
          OSError: as `wait`, for this save or the one before; the latter leaves this one undone.
          ValueError: if an intact checkpoint of this or a later step is there, so that this run did not start from it.
          TypeError: if `host` is not in terms of JSON or `state` not of arrays.
        """
        leaves = _leaves(state)
        # Convert to text now, since the loop keeps changing the parts of `host`.
        metric = None if metric is None else float(metric)
        content = json.dumps({"step": step, "metric": metric, "arrays": _shapes(leaves), "host": host}, indent=1)
        self.wait()
        if not sharding.from_first(lambda: self._make_room(step)):
            return
        unfinished = self._directory / f"{step}.unfinished"
        # By the leaves' names instead of as the tree it is: which kinds of nodes there are, empty ones among them, and
        # what characters are in their keys is then of no account to orbax.
        self._checkpointer.save(unfinished, leaves, force=True)
        # Orbax calls nothing back after its commit, so a thread waits for that: the manifest comes as soon as can be,
        # while the loop runs on (hashing releases the interpreter lock). An error stays in the future until `wait`.
        self._pending = self._thread.submit(self._finish, unfinished, step, content)

    def wait(self) -> None:
        """Wait until the last save is complete, on all processes.

        Raises:
          OSError: if it could not be written, with `errno.ENOSPC` if the disk is full. Orbax may raise others.
        """
        if jax.process_index() != 0:
            self._join()
        sharding.from_first(self._join)  # process 0 is done last: it writes the manifest

    @property
    def latest(self) -> int | None:
        """Step that was saved or restored last; on process 0."""
        return self._latest

    def close(self) -> None:
        """Wait for this process's part and release the threads. Raises as `wait`."""
        try:
            self._join()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def restore(self, abstract_state: Any) -> Restored | None:
        """`restore` from this directory, to go on from there."""
        self.wait()
        restored = restore(self._directory, abstract_state)
        self._latest = None if restored is None else restored.step
        return restored

    def _join(self) -> None:
        if self._pending is None:
            return
        error, self._pending = self._pending.exception(), None
        full = os.strerror(errno.ENOSPC)
        if full in str(error):  # from orbax it comes as a ValueError
            raise OSError(errno.ENOSPC, f"checkpoint not saved, {full}", str(self._directory)) from error
        if error is not None:
            raise error

    def _make_room(self, step: int) -> bool:
        """Delete what was never completed; move damaged checkpoints aside that would count as newer than this step's.
        False if there is nothing to save."""
        if step == self._latest:
            return False
        for path in _unfinished(self._directory):
            shutil.rmtree(path)
        later = {n: damage(self._directory / str(n)) for n in _steps(self._directory) if n >= step}
        intact = [n for n, reason in later.items() if reason is None]
        if intact:
            where = f"{self._directory} holds an intact checkpoint of step {intact[-1]}"
            raise ValueError(f"cannot save step {step}: {where}; restore that first, or choose another directory")
        for n, reason in later.items():
            free = (self._directory / f"{n}.damaged-{i}" for i in itertools.count())
            aside = next(path for path in free if not path.exists())
            logging.warning("Checkpoint %s moved aside to %s: %s", self._directory / str(n), aside.name, reason)
            (self._directory / str(n)).rename(aside)
        return True

    def _finish(self, unfinished: pathlib.Path, step: int, content: str) -> None:
        """Wait for orbax, complete the checkpoint, delete what it supersedes."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        (unfinished / HOST).write_text(content)
        _write_manifest(unfinished)
        unfinished.rename(self._directory / str(step))
        sync(self._directory)
        self._latest = step
        for old in superseded(_metrics(self._directory), self._max_to_keep):
            # Renamed first: cut short, a deletion must not leave a number with half its files.
            shutil.rmtree((self._directory / str(old)).rename(self._directory / f"{old}.unfinished"))


def restore(directory: str | os.PathLike[str], abstract_state: Any) -> Restored | None:
    """The newest intact checkpoint; newer ones are named in warnings, with what is wrong. Changes nothing on disk.

    Args:
      directory: where the checkpoints are.
      abstract_state: tree of `jax.ShapeDtypeStruct`s with shardings: what is to be restored and where to, whatever
        devices and processes it was saved from.

    Returns:
      What it held, the same on all processes; None if there are no checkpoints.

    Raises:
      NoIntactCheckpoint: if there are checkpoints and all are damaged.
      ValueError: if the newest intact one has not the arrays, shapes or types of `abstract_state`.
      TypeError: if `abstract_state` lacks a sharding.
    """
    directory = pathlib.Path(directory).absolute()
    leaves = _leaves(abstract_state)
    found = sharding.from_first(lambda: _newest_intact(directory))
    if found is None:
        return None
    folder, saved, asked = directory / str(found["step"]), found["arrays"], _shapes(leaves)
    wrong = [
        f"\n  state{name}: asked for {asked.get(name, 'none')}, saved {saved.get(name, 'none')}"
        for name in sorted(saved | asked)
        if saved.get(name) != asked.get(name)
    ]
    if wrong:
        raise ValueError(f"{folder} is intact, but {len(wrong)} arrays are not as asked for:{''.join(wrong[:9])}")
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        arrays = checkpointer.restore(folder, leaves)
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in leaves])
    return Restored(found["step"], state, found["host"])


def read(folder: str | os.PathLike[str], wanted: Callable[[str], bool]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Some arrays of a checkpoint, without the state that they belong to.

    Args:
      folder: a checkpoint, or a directory of them, of which the newest intact one is read.
      wanted: which arrays, by name, such as `.trainable.params['Dense_0']['kernel']`.

    Returns:
      The names of all its arrays, and those wanted, in host memory.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      NoIntactCheckpoint: if it is damaged, or all of them are.
    """
    folder = pathlib.Path(folder).absolute()
    if (folder / HOST).exists():
        if reason := damage(folder):
            raise NoIntactCheckpoint(f"the checkpoint {folder} is not intact: {reason}")
        found = json.loads((folder / HOST).read_bytes())
    elif found := _newest_intact(folder):
        folder /= str(found["step"])
    else:
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    names = [name for name in found["arrays"] if wanted(name)]
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    some = ocp.args.PyTreeRestore(dict.fromkeys(names, 0), restore_args=as_numpy, partial_restore=True)
    with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
        arrays = checkpointer.restore(folder, args=some)
    return list(found["arrays"]), {name: np.asarray(arrays[name]) for name in names}


def damage(folder: pathlib.Path) -> str | None:
    """A description of a checkpoint's damage; None if every byte is as it was saved."""
    try:
        if not (folder / MANIFEST).exists():
            return f"no {MANIFEST}" if any(folder.iterdir()) else "empty directory"
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, entry in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (size := (folder / name).stat().st_size) != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if sha256(folder / name) != entry["sha256"]:
                return f"{name} is damaged: its SHA-256 sum differs"
        if HOST not in files:
            return f"{MANIFEST} does not list {HOST}"
        step = json.loads((folder / HOST).read_bytes())["step"]
        return None if folder.name == str(step) else f"it is a copy of step {step}"
    except OSError as error:
        return f"not readable: {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"


def superseded(metrics: Mapping[int, float | None], keep: int) -> list[int]:
    """Checkpoints `{step: metric}` to delete: neither among the newest `keep` nor the best (the newest of equals)."""
    rated = [(metric, step) for step, metric in metrics.items() if metric is not None and not np.isnan(metric)]
    return sorted(metrics.keys() - set(sorted(metrics)[-keep:]) - {step for _, step in sorted(rated)[-1:]})


def _leaves(tree: Any) -> dict[str, Any]:
    """A tree's leaves by name, such as `.params['Dense_0']['kernel']`."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name, leaf in leaves.items():
        if getattr(leaf, "sharding", None) is None:
            raise TypeError(f"state{name} is not an array on devices: it has no sharding, {leaf!r:.80}")
    return leaves


def _shapes(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _steps(directory: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", path.name))


def _unfinished(directory: pathlib.Path) -> list[pathlib.Path]:
    """What was never completed, under the names that orbax makes of it too."""
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"[0-9]+\.unfinished.*", path.name))


def _newest_intact(directory: pathlib.Path) -> dict[str, Any] | None:
    """What `HOST` says in the newest intact checkpoint."""
    if not directory.exists():
        return None
    for path in _unfinished(directory):
        logging.warning("Checkpoint %s passed over: never completed, or just being written", path)
    reasons = []
    for step in reversed(_steps(directory)):
        reason = damage(directory / str(step))
        if reason is None:
            return json.loads((directory / str(step) / HOST).read_bytes())
        logging.warning("Checkpoint %s passed over: %s", directory / str(step), reason)
        reasons.append(f"\n  {step}: {reason}")
    if reasons:
        raise NoIntactCheckpoint(f"no checkpoint in {directory} is intact; nothing was deleted{''.join(reasons)}")
    return None


def _metrics(directory: pathlib.Path) -> dict[int, float | None]:
    """`{step: metric}` of all checkpoints but the plainly damaged: those neither count as kept nor are deleted."""
    metrics = {}
    for step in _steps(directory):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            metrics[step] = json.loads((directory / str(step) / HOST).read_bytes())["metric"]
    return metrics


def _write_manifest(folder: pathlib.Path) -> None:
    """Bring all files to the disk, then the manifest of them: older checkpoints go once this one is intact."""
    files = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": sha256(path)}
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_text(json.dumps({"files": files}, indent=1))
    sync(unfinished)
    unfinished.replace(folder / MANIFEST)
    sync(folder)
