"""Running a sweep's cells: any number of processes share them, and interrupted cells are resumed."""

import contextlib
import functools
import json
import pathlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import ml_collections
from rich.console import Console

import sa_plus_plus as sapp  # noqa: F401 - registers the algorithms
from experiments import data, runs, tasks
from experiments.outputs import workdir
from experiments.training import loop, program
from experiments.training.setup import Setup, prepare
from experiments.utils import files

FAILED = "failed.txt"
WAIT = 1.0  # seconds between two looks at what other processes do


class Cell(Protocol):
    """One run: `folder` is its place below the directory of all."""

    @property
    def folder(self) -> pathlib.Path: ...

    def config(self) -> ml_collections.ConfigDict: ...


OneCell = TypeVar("OneCell", bound=Cell)


def state(cell: Cell, directory: pathlib.Path) -> str:
    """`done`, `diverged`, `failed`, `started` or `waiting`."""
    folder = directory / cell.folder
    if (result := workdir.result_of(folder)) is not None:
        return "diverged" if result["diverged"] else "done"
    if (folder / FAILED).exists():
        return "failed"
    return "started" if (folder / workdir.CONFIG).exists() else "waiting"


def work(
    cells: Sequence[OneCell], directory: pathlib.Path, console: Console
) -> Iterator[tuple[OneCell, dict[str, Any]]]:
    """Run the cells that no other process runs, until all are done or have failed.

    A cell is held by a lock on its directory, which ends with the process that holds it, however that ends; another
    process then takes its run up at its newest checkpoint. A cell that fails leaves `failed.txt` with the traceback,
    is not tried again by this call, and does not stop the others.

    Args:
      cells: what to run.
      directory: of the sweeps.
      console: where the runs show their progress.

    Yields:
      Each cell that this process has done, and the content of its `result.json`.

    Raises:
      loop.Preempted: on SIGTERM, once the current cell is saved, or finished if it is in its last evaluation.
    """
    for cell in cells:  # what an earlier call gave up is tried again
        if _idle(cell, directory):
            (directory / cell.folder / FAILED).unlink(missing_ok=True)
    compiled = _once_for_all_seeds()
    with _on_sigterm() as stop:
        while left := [cell for cell in cells if state(cell, directory) in ("started", "waiting")]:
            done = 0
            for cell in left:
                if (result := _do(cell, directory, console, compiled, stop)) is not None:
                    done += 1
                    yield cell, result
                stop()
            if not done:
                time.sleep(WAIT)


@contextlib.contextmanager
def _on_sigterm() -> Iterator[Callable[[], None]]:
    """A function that raises `Preempted` after a SIGTERM; a run itself checks for one only in its training steps."""
    received = threading.Event()

    def stop() -> None:
        if received.is_set():
            raise loop.Preempted(0)

    before = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _do(
    cell: Cell,
    directory: pathlib.Path,
    console: Console,
    compiled: Callable[[Setup], program.Program],
    stop: Callable[[], None],
) -> dict[str, Any] | None:
    """Run a cell; None if it is already done, belongs to another process, or fails."""
    folder = directory / cell.folder
    try:
        with workdir.claim(folder):
            if state(cell, directory) not in ("started", "waiting"):  # since the last look
                return None
            config = cell.config()
            try:
                workdir.record_config(folder, config)
                setup = prepare(config, dataset=_dataset(json.dumps(config.data.to_dict())))
                workdir.record_data(folder, setup.fingerprint())
                stop()
                return runs.run(setup, folder, console, compiled=compiled)
            except loop.Preempted:  # by SIGTERM, which is for all cells
                raise
            except Exception as error:
                files.write_text(folder / FAILED, traceback.format_exc())
                console.print(f"{cell.folder} failed: {error!r}; see {folder / FAILED}", style="red", highlight=False)
                return None
    except workdir.InUseError:
        return None


def _idle(cell: Cell, directory: pathlib.Path) -> bool:
    """Whether a cell has failed and no process is running it."""
    if state(cell, directory) != "failed":
        return False
    try:
        with workdir.claim(directory / cell.folder):
            return True
    except workdir.InUseError:
        return False


@functools.lru_cache(maxsize=2)
def _dataset(config: str) -> data.Dataset:
    """Read once for all cells."""
    return tasks.dataset_of(ml_collections.ConfigDict(json.loads(config)))


def _once_for_all_seeds() -> Callable[[Setup], program.Program]:
    """`program.compiled`, cached for the last run regardless of its seed."""
    last: dict[str, program.Program] = {}

    def compiled(setup: Setup) -> program.Program:
        config = setup.config.copy_and_resolve_references()
        config.seed = 0
        key = config.to_json()
        if key not in last:
            last.clear()
            last[key] = program.compiled(setup)
        return last[key]

    return compiled
