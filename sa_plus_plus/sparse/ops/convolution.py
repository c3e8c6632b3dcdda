"""Convolution with a block-sparse kernel, as matmuls with patches of the image."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sa_plus_plus.sparse.array import BlockSparse, Layout
from sa_plus_plus.sparse.ops import native
from sa_plus_plus.sparse.ops.matmul import Implementation, block_sparse_matmul, check, chosen

PATCH_BYTES = 2**22  # size of the patches built at a time: they fit a CPU's caches, and never exist all at once

Padding = str | Sequence[tuple[int, int]]


def block_sparse_conv(
    x: jax.Array,
    w: BlockSparse,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Padding = "SAME",
    bias: jax.Array | None = None,
    relu: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Convolution of images with a block-sparse kernel; for a 1 x 1 kernel it is one `block_sparse_matmul`.

    A larger kernel is multiplied with patches, a few rows of a few images at a time. The compiled CPU kernel reads them
    in place from the image, if the number of rows of a block divides the channels. Differentiable like the matmul.

    Args:
      x: `(batch, height, width, channels)`.
      w: a kernel `(k_h, k_w, channels, outputs)`; its blocks are over the matrix `(k_h * k_w * channels, outputs)`.
      strides: down and across.
      padding: `"SAME"`, `"VALID"` or `((top, bottom), (left, right))`, as `jax.lax.conv_general_dilated` takes it.
      bias: `(outputs,)`.
      relu: whether to apply `max(., 0)`.
      implementation: as `block_sparse_matmul` takes it.

    Returns:
      `(batch, rows, columns, outputs)` in the type of `x`.

    Raises:
      ValueError: if shapes or types do not fit.
    """
    if w.layout.view is not None:
        raise ValueError(f"a convolution's kernel is (height, width, channels, outputs), but w has a view: {w.layout}")
    if x.ndim != 4 or w.ndim != 4 or x.shape[3] != w.shape[2]:
        raise ValueError(
            "a convolution takes images (batch, height, width, channels) and a kernel (k_h, k_w, channels, outputs), "
            f"got {x.shape} and {w.shape}"
        )
    check(x, w, bias)
    if len(strides) != 2 or not all(isinstance(s, int | np.integer) and s > 0 for s in strides):
        raise ValueError(f"strides must be two positive integers, down and across, got {strides}")
    platform_choice = chosen(implementation, x.dtype)
    window, strides = (w.shape[0], w.shape[1]), (int(strides[0]), int(strides[1]))
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    x = _padded(x, padding)
    rows, columns = output_size(x.shape[1:3], window, strides)
    if min(rows, columns) < 1 or (isinstance(x.shape[0], int) and not x.shape[0]):
        return jnp.zeros((x.shape[0], max(rows, 0), max(columns, 0), w.shape[3]), x.dtype)
    in_place = window != (1, 1) and (window[1] * w.shape[2]) % w.layout.block[0] == 0
    if in_place and platform_choice in ("auto", "native") and not native.unavailable_reason():
        return _in_place(x, w.blocks, bias, w.layout, strides, relu, implementation)
    return _by_patches(x, w, bias, strides, relu, implementation)


def output_size(size: Sequence[int], window: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a convolution's result: `(n - k) // s + 1` each.

    Args:
      size: `(height, width)` of the image, padding included.
      window: `(k_h, k_w)`.
      strides: down and across.
    """
    (height, width), (k_h, k_w), (down, across) = size, window, strides
    return (height - k_h) // down + 1, (width - k_w) // across + 1


def patches(x: jax.Array, window: Sequence[int], strides: Sequence[int]) -> jax.Array:
    """The input patch of each output position: the convolution is `patches(x, ...) @ kernel.reshape(-1, outputs)`.

    Args:
      x: `(batch, height, width, channels)`, already padded.
      window: `(k_h, k_w)` of the kernel.
      strides: down and across.

    Returns:
      `(batch, rows, columns, k_h * k_w * channels)`, with `rows` and `columns` from `output_size`.
    """
    (rows, columns), (down, across) = output_size(x.shape[1:3], window, strides), strides
    shifted = [
        x[:, i : i + down * (rows - 1) + 1 : down, j : j + across * (columns - 1) + 1 : across]
        for i in range(window[0])
        for j in range(window[1])
    ]
    return jnp.concatenate(shifted, -1) if len(shifted) > 1 else shifted[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _in_place(
    x: jax.Array,
    blocks: jax.Array,
    bias: jax.Array | None,
    layout: Layout,
    strides: tuple[int, int],
    relu: bool,
    implementation: Implementation | None,
) -> jax.Array:
    """The compiled kernel on CPUs, patches on other platforms."""

    def compiled(x: jax.Array, blocks: jax.Array, bias: jax.Array | None) -> jax.Array:
        epilogue = native.Epilogue(activation="relu" if relu else "none")
        image = x.astype(jnp.float32)
        return native.conv(image, blocks, layout, strides=strides, bias=bias, epilogue=epilogue).astype(x.dtype)

    def plain(x: jax.Array, blocks: jax.Array, bias: jax.Array | None) -> jax.Array:
        return _by_patches(x, BlockSparse(blocks, layout), bias, strides, relu, implementation)

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, blocks: jax.Array, bias: jax.Array | None) -> jax.Array:
        return lax.platform_dependent(x, blocks, bias, cpu=compiled, default=plain)

    @call.def_vmap
    def rule(size: int, batched: Any, x: jax.Array, blocks: Any, bias: Any) -> tuple[jax.Array, bool]:
        if batched[1] or batched[2]:  # several kernels: plain JAX knows how
            axes = tuple(0 if is_batched else None for is_batched in batched)
            return jax.vmap(plain, axes, axis_size=size)(x, blocks, bias), True
        y = call(x.reshape(size * x.shape[1], *x.shape[2:]), blocks, bias)  # images mapped over are more images
        return y.reshape(size, x.shape[1], *y.shape[1:]), True

    return call(x, blocks, bias)


def _in_place_forward(x: Any, blocks: Any, bias: Any, *options: Any) -> tuple[jax.Array, Any]:
    return _in_place(x, blocks, bias, *options), (x, blocks, bias)


def _in_place_backward(layout: Layout, strides: Any, relu: bool, implementation: Any, saved: Any, g: jax.Array) -> Any:
    def by_patches(x: jax.Array, blocks: jax.Array, bias: jax.Array | None) -> jax.Array:
        return _by_patches(x, BlockSparse(blocks, layout), bias, strides, relu, implementation)

    _, pull_back = jax.vjp(by_patches, *saved)
    return pull_back(g)


_in_place.defvjp(_in_place_forward, _in_place_backward)


def _by_patches(
    x: jax.Array,
    w: BlockSparse,
    bias: jax.Array | None,
    strides: tuple[int, int],
    relu: bool,
    implementation: Implementation | None,
) -> jax.Array:
    """Matmuls with patches of already padded images."""
    window = (w.shape[0], w.shape[1])
    rows, columns = output_size(x.shape[1:3], window, strides)

    def convolve(x: jax.Array) -> jax.Array:
        return block_sparse_matmul(patches(x, window, strides), w, bias=bias, relu=relu, implementation=implementation)

    if window == (1, 1) or not isinstance(x.shape[0], int):  # a symbol of `jax.export` cannot be cut into tiles
        return convolve(x)
    images, high = _tile(x.shape[0], rows, columns * int(np.prod(w.shape[:3])) * x.dtype.itemsize)
    bands = -(-rows // high)
    if x.shape[0] == images and bands == 1:
        return convolve(x)
    # Bands of equal height: the last may extend below the image, into rows that are dropped.
    x = _padded(x, ((0, (bands * high - 1) * strides[0] + window[0] - x.shape[1]), (0, 0)))
    tall = (high - 1) * strides[0] + window[0]

    def tile(i: jax.Array) -> jax.Array:
        zero = jnp.zeros_like(i)
        start = (i // bands * images, i % bands * high * strides[0], zero, zero)
        return convolve(lax.dynamic_slice(x, start, (images, tall, *x.shape[2:])))

    y = lax.map(tile, jnp.arange(x.shape[0] // images * bands, dtype=jnp.int32))
    y = y.reshape(-1, bands, images, high, columns, w.shape[3]).swapaxes(1, 2)
    return y.reshape(x.shape[0], bands * high, columns, w.shape[3])[:, :rows]


def _tile(batch: int, rows: int, row_bytes: int) -> tuple[int, int]:
    """How many images, and how many output rows of each, give patches of about `PATCH_BYTES`."""
    if rows * row_bytes > PATCH_BYTES:
        bands = -(-rows * row_bytes // PATCH_BYTES)
        return 1, -(-rows // bands)
    most = PATCH_BYTES // (rows * row_bytes)
    return max(n for n in range(1, min(batch, most) + 1) if batch % n == 0), rows


def _padded(x: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """Images with zeros around them; negative padding removes rows and columns."""
    if not any(map(any, padding)):
        return x
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)))
