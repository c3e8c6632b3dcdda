"""Checkpoints of orbax: directories."""

import pathlib
import warnings
from typing import Any

import jax
import numpy as np

from sa_plus_plus.contrib.commands.checkpoint import Checkpoint
from sa_plus_plus.files import write_directory_atomically
from sa_plus_plus.planning import Plan

_MARK = "_METADATA"  # in the directory of a tree of arrays


def item_in(folder: pathlib.Path) -> pathlib.Path | None:
    """The directory of a tree of arrays: this one, or an item of the last step of a `CheckpointManager`; None without.

    Args:
      folder: the directory.

    Raises:
      ValueError: if there are several items.
    """
    if (folder / _MARK).exists():
        return folder
    steps = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    step = max(steps, key=lambda path: int(path.name)) if steps else folder
    items = [path for path in (step, *sorted(step.iterdir())) if (path / _MARK).exists()]
    if len(items) > 1:
        raise ValueError(
            f"{step} has {len(items)} items of orbax, {', '.join(i.name for i in items)}: give one of them"
        )
    return items[0] if items else None


def read(folder: pathlib.Path) -> Checkpoint:
    """The checkpoint in a directory.

    Args:
      folder: with a tree of arrays.

    Raises:
      ValueError: if it is damaged or empty.
      ImportError: without orbax.
    """
    orbax = _orbax()
    try:
        with warnings.catch_warnings(), orbax.PyTreeCheckpointer() as checkpointer:
            warnings.simplefilter("ignore")
            shapes = checkpointer.metadata(folder.absolute()).item_metadata.tree
            arguments = jax.tree.map(
                lambda x: orbax.RestoreArgs(restore_type=np.ndarray if getattr(x, "shape", ()) else None), shapes
            )
            params = checkpointer.restore(folder.absolute(), restore_args=arguments)
    except Exception as error:  # orbax and tensorstore raise errors of many kinds
        raise ValueError(f"{folder} is no intact checkpoint of orbax: {type(error).__name__}: {error}") from error
    if not jax.tree.leaves(params):
        raise ValueError(f"{folder} holds no arrays")
    return Checkpoint(folder, "orbax", params, _write)


def _write(output: pathlib.Path, params: Any, plan: Plan) -> None:
    del plan  # such directories have no metadata of ours

    def fill(folder: pathlib.Path) -> None:
        with _orbax().PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute(), params, force=True)

    write_directory_atomically(output, fill)


def _orbax() -> Any:
    try:
        import orbax.checkpoint  # noqa: PLC0415 - optional: only its checkpoints need it
    except ImportError as error:
        raise ImportError(
            "checkpoints of orbax need its package: pip install orbax-checkpoint, or all that the commands can use by "
            "pip install 'sa_plus_plus[commands]'"
        ) from error
    return orbax.checkpoint
