"""Pruned kernels and networks in formats of other runtimes."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sa_plus_plus.sparse.kernel import BlockSparse
from sa_plus_plus.sparse.storage import write_atomically


def to_bsr(w: BlockSparse) -> Any:
    """The kernel's matrix as a `scipy.sparse.bsr_array`, whose product with activations is `x @ to_bsr(w)`.

    SciPy has no partial blocks: where the blocks do not divide the matrix, it is larger than the kernel's by rows and
    columns of zeros. Needs SciPy.

    Args:
      w: of float32, float64, or another type that SciPy has; not bfloat16.

    Raises:
      TypeError: for a type that SciPy does not have.
    """
    import scipy.sparse  # noqa: PLC0415 - optional

    if w.dtype.kind not in "fiuc":
        raise TypeError(f"SciPy has no {w.dtype.name}: widen the blocks first, to float32")
    by_rows, order = w.layout.transposed  # its columns are this matrix's rows
    shape = tuple(n * b for n, b in zip(w.layout.grid, w.layout.block, strict=True))
    return scipy.sparse.bsr_array((np.asarray(w.blocks)[order], by_rows.rows, by_rows.starts), shape=shape)


def to_onnx(path: str | os.PathLike[str], fn: Callable[..., Any], *examples: Any) -> int:
    """Write a network as an ONNX model, its weights in full; needs the package `jax2onnx`. Returns the file's size.

    Args:
      path: of the file, written atomically.
      fn: the network with its parameters, `lambda x: model.apply({"params": params}, x)`.
      examples: an array, or its shape and dtype, for each argument of `fn`.

    Raises:
      ImportError: without jax2onnx.
    """
    try:
        import jax2onnx  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("ONNX needs the package jax2onnx: pip install jax2onnx") from error
    shapes = [jax.ShapeDtypeStruct(np.shape(x), x.dtype) for x in examples]
    content = jax2onnx.to_onnx(fn, shapes).SerializeToString()
    write_atomically(pathlib.Path(path), content)
    return len(content)
