"""Checkpoints of NumPy: `.npz` files."""

import functools
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from sa_plus_plus.contrib.commands.checkpoint import Checkpoint
from sa_plus_plus.files import write_atomically
from sa_plus_plus.planning import Plan

_BFLOAT16 = np.dtype("V2")  # as which NumPy writes it


def read(path: pathlib.Path) -> Checkpoint:
    """The checkpoint in a `.npz` file.

    Args:
      path: of the file.

    Raises:
      ValueError: if it is damaged, empty, or holds something else than arrays of numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged, or has other things than arrays of numbers: {error}") from error
    if not arrays or not all(isinstance(x, np.ndarray) for x in arrays.values()):
        raise ValueError(f"{path} holds no arrays")
    params = {name: x.view(jnp.bfloat16) if x.dtype == _BFLOAT16 else x for name, x in arrays.items()}
    return Checkpoint(path, ".npz", params, functools.partial(_write, compressed, [*arrays]))


def _write(compressed: bool, names: Sequence[str], output: pathlib.Path, params: Mapping[str, Any], plan: Plan) -> None:
    del plan  # such files have no metadata
    compression = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED

    def fill(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", compression) as archive:  # `np.savez` takes no array named "file"
            for name in names:  # in the file's order; JAX sorts keys
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                    array = np.asarray(params[name])
                    plain = array.view(_BFLOAT16) if array.dtype == jnp.bfloat16 else array
                    np.lib.format.write_array(entry, plain, allow_pickle=False)

    write_atomically(output, fill)
