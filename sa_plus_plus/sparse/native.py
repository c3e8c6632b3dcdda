"""A matrix times a block-sparse one by the compiled kernel for CPUs in `csrc`, where it was built."""

import ctypes
import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.sparse.array import Layout

MATMUL, CONV = TARGETS = ("sa_plus_plus_block_sparse_matmul", "sa_plus_plus_block_sparse_conv")
DTYPES = (np.dtype(np.float32), np.dtype(jnp.bfloat16))


@functools.cache
def missing() -> str | None:
    """Why there is no compiled kernel, or None where there is; it is loaded at the first call."""
    built = sorted(pathlib.Path(__file__).parent.glob("_native.*"))
    if not built:
        return "it was not compiled when the package was installed, which takes a C++17 compiler"
    try:
        library = ctypes.CDLL(str(built[-1]))
        made_for, here = library.sa_plus_plus_ffi_version(), _ffi_version()
    except (OSError, AttributeError, TypeError) as error:
        return f"{built[-1].name} cannot be loaded: {error}"
    # XLA would not merely refuse a kernel made for another interface: its whole CPU backend would not start.
    if made_for > here or made_for // 1000 != here // 1000:
        return f"{built[-1].name} was compiled for version {made_for} of XLA's interface, this jaxlib has {here}"
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return None


def _ffi_version() -> int:
    """`1000 * major + minor` of the interface for foreign functions that the installed jaxlib has."""
    header = (pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    major, minor = (int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1]) for part in ("MAJOR", "MINOR"))  # type: ignore[index]
    return 1000 * major + minor


def matmul(x: jax.Array, blocks: jax.Array, bias: jax.Array | None, layout: Layout, relu: bool) -> jax.Array:
    """`x (batch, rows) @ w (rows, cols)`, plus bias, rectified if asked, in float32.

    Args:
      x: `(batch, rows)`; the kernel reads float32, so a narrower one is widened, which XLA fuses with what made it.
      blocks: `(kept, b_r, b_c)`, float32 or bfloat16.
      bias: `(cols,)`.
      layout: where the blocks of `w` stand.
      relu: `max(., 0)` of the result.
    """
    out = jax.ShapeDtypeStruct((x.shape[0], blk.matrix_shape(layout.shape)[1]), jnp.float32)
    return _call(MATMUL, out, x, blocks, bias, layout, relu=relu)


def conv(
    x: jax.Array, blocks: jax.Array, bias: jax.Array | None, layout: Layout, strides: tuple[int, int], relu: bool
) -> jax.Array:
    """Convolution of images that are padded already, plus bias, rectified if asked, in float32; no patch is ever made.

    Args:
      x: `(batch, height, width, channels)`.
      blocks: `(kept, b_r, b_c)`, float32 or bfloat16; `b_r` divides the channels, so that a block is of one place in
        the window.
      bias: `(outputs,)`.
      layout: where the blocks of the kernel `(k_h, k_w, channels, outputs)` stand.
      strides: down and across.
      relu: `max(., 0)` of the result.
    """
    k_h, k_w, _, outputs = layout.shape
    (down, across), (batch, height, width, _) = strides, x.shape
    shape = (batch, (height - k_h) // down + 1, (width - k_w) // across + 1, outputs)
    sides = {"window_rows": k_h, "window_columns": k_w, "stride_down": down, "stride_across": across}
    options = {name: np.int64(n) for name, n in sides.items()}
    return _call(CONV, jax.ShapeDtypeStruct(shape, jnp.float32), x, blocks, bias, layout, relu=relu, **options)


def _call(
    target: str,
    out: jax.ShapeDtypeStruct,
    x: jax.Array,
    blocks: jax.Array,
    bias: jax.Array | None,
    layout: Layout,
    **options: Any,
) -> jax.Array:
    bias = jnp.zeros(0, jnp.float32) if bias is None else bias.astype(jnp.float32)
    x = x.astype(jnp.float32)
    call = jax.ffi.ffi_call(target, out, vmap_method="sequential")
    y = call(x, blocks, layout.indices, layout.indptr, bias, **options)
    # Under `jax.shard_map` what is computed differs from device to device where any operand does.
    varying = set().union(*(jax.typeof(operand).manual_axis_type.varying for operand in (x, blocks, bias)))
    return jax.lax.pcast(y, tuple(varying), to="varying") if varying else y
