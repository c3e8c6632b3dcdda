"""Export of pruned kernels and networks to formats of other runtimes."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sa_plus_plus.files import write_atomically
from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.files.onnx_rewrites import rewritten


def to_bsr(w: BlockSparse) -> Any:
    """The kernel's matrix as a `scipy.sparse.bsr_array`, whose product with activations is `x @ to_bsr(w)`.

    SciPy has no partial blocks: if the blocks do not divide the matrix, it is padded with rows and columns of zeros.
    Needs SciPy.

    Args:
      w: float32, float64, or another type that SciPy supports; not bfloat16.

    Raises:
      TypeError: for a type that SciPy does not support.
    """
    import scipy.sparse  # noqa: PLC0415 - optional

    if w.dtype.kind not in "fiuc":
        raise TypeError(f"SciPy has no {w.dtype.name}: widen the blocks first, to float32")
    by_rows, order = w.layout.transposed  # its columns are this matrix's rows
    shape = tuple(n * b for n, b in zip(w.layout.grid, w.layout.block, strict=True))
    return scipy.sparse.bsr_array((np.asarray(w.blocks)[order], by_rows.indices, by_rows.indptr), shape=shape)


def to_onnx(path: str | os.PathLike[str], fn: Callable[..., Any], *examples: Any, tolerance: float = 1e-4) -> int:
    """Write a network as an ONNX model, its weights in full. Returns the file's size.

    The package `jax2onnx` converts it. It knows functions of flax and Equinox by name, which gives the fewest
    operators; where that fails or is wrong (flax's `max_pool`), the network is given to it as primitive operations.
    `onnxruntime` runs the model, and only one that gives the network's results is written.

    Args:
      path: of the file, written atomically.
      fn: the network with its parameters, `lambda x: model.apply({"params": params}, x)`, of arrays to one array.
      examples: arrays for each argument of `fn`, on which the results are compared; the model takes these shapes.
      tolerance: how far the results may differ, relative to the largest.

    Raises:
      ImportError: without jax2onnx or onnxruntime.
      ValueError: if the converted model gives other results, or none, with the reason for each way of converting.
    """
    try:
        import jax2onnx  # noqa: F401, PLC0415 - optional
        import onnxruntime  # noqa: F401, PLC0415
    except ImportError as error:
        raise ImportError(f"ONNX needs two more packages: pip install jax2onnx onnxruntime ({error})") from error
    inputs = [np.asarray(x) for x in examples]
    want = np.asarray(fn(*inputs), np.float64)
    reasons = []
    for described, network in (("by name", fn), ("by its primitive operations", rewritten(fn, *inputs))):
        try:
            content = _converted(network, inputs, want, tolerance)
            break
        except ValueError as error:
            reasons.append(f"converted {described}: {error}")
    else:
        raise ValueError("jax2onnx cannot convert this network, nothing was written:\n  " + "\n  ".join(reasons))
    write_atomically(pathlib.Path(path), lambda file: file.write(content))
    return len(content)


def _converted(fn: Callable[..., Any], inputs: Sequence[np.ndarray], want: np.ndarray, tolerance: float) -> bytes:
    """The model that jax2onnx makes of a function, if it gives the results wanted.

    Raises:
      ValueError: if it gives others, or none.
    """
    import jax2onnx  # noqa: PLC0415 - optional
    import onnxruntime  # noqa: PLC0415

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    try:  # neither package has a common base class for its errors
        content = jax2onnx.to_onnx(fn, shapes).SerializeToString()
    except Exception as error:
        raise ValueError(f"no model, {_shortly(error)}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it would print is in the exception
    try:
        session = onnxruntime.InferenceSession(content, options)
        got = session.run(None, {put.name: x for put, x in zip(session.get_inputs(), inputs, strict=True)})[0]
    except Exception as error:
        raise ValueError(f"a model that does not run, {_shortly(error)}") from error
    if got.shape != want.shape:
        raise ValueError(f"a model with other results, of shape {got.shape} instead of {want.shape}")
    most, largest = np.abs(got - want).max(initial=0), np.abs(want).max(initial=0)
    if not most <= tolerance * largest:
        raise ValueError(f"a model with other results: they differ by {most:.2g}, and the largest is {largest:.2g}")
    return content


def _shortly(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
