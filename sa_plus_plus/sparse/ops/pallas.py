"""Block-sparse matmul on a GPU: one Pallas kernel, lowered through Triton."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sa_plus_plus.sparse.array import Layout
from sa_plus_plus.sparse.ops import xla

LEAST = 16  # smallest side of a tile for tensor cores
# Largest tile: rows of y, columns of y, rows of a block. The accumulators of a tile must fit the registers of four
# warps, and three stages of its operands the 99 KB of shared memory of smaller GPUs.
LARGEST = {2: (128, 128, 64), 4: (64, 64, 32)}  # by the bytes of a number


def _side(length: int, most: int) -> int:
    """The side of a tile: Triton needs powers of two."""
    return min(max(LEAST, pl.next_power_of_2(length)), most)


def _within(first: Any, count: int, length: int) -> jax.Array | None:
    """Which of `count` indices are below `length`; None if `count` divides `length`, so that all always are."""
    return None if length % count == 0 else first + jnp.arange(count) < length


def _both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    return b if a is None else a if b is None else a & b


def _mask(rows: jax.Array | None, cols: jax.Array | None, shape: tuple[int, int]) -> jax.Array | None:
    return _both(
        None if rows is None else jnp.broadcast_to(rows[:, None], shape),
        None if cols is None else jnp.broadcast_to(cols[None], shape),
    )


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0)


def _tile(
    order: Any,
    starts: Any,
    rows: Any,
    x: Any,
    blocks: Any,
    *bias_and_y: Any,
    height: int,
    width: int,
    sides: tuple[int, int, int],
    relu: bool,
) -> None:
    """A tile of y within one grid column: the products of its blocks are accumulated in registers.

    All references are to whole arrays in GPU memory. A tile that extends beyond an edge is masked there.
    """
    *bias, y = bias_and_y
    tall, deep, wide = sides
    batch, (_, b_r, b_c) = x.shape[0], blocks.shape
    j, left, top = order[pl.program_id(0)], pl.program_id(1) * wide, pl.program_id(2) * tall
    column = j * b_c + left
    in_batch, in_block = _within(top, tall, batch), _within(left, wide, b_c)
    steps = pl.cdiv(b_r, deep)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        at, down = (step // steps, (step % steps) * deep) if steps > 1 else (step, 0)
        start = rows[at] * b_r + down
        real = _both(_within(down, deep, b_r), None if height % b_r == 0 else start + jnp.arange(deep) < height)
        across_x = _load(x.at[pl.ds(top, tall), pl.ds(start, deep)], _mask(in_batch, real, (tall, deep)))
        weights = _load(blocks.at[at, pl.ds(down, deep), pl.ds(left, wide)], _mask(real, in_block, (deep, wide)))
        # For float32, the tensor cores would keep 10 bits of each operand.
        precision = None if x.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
        return total + jnp.dot(across_x, weights, precision=precision, preferred_element_type=jnp.float32)

    zero = jnp.zeros((tall, wide), jnp.float32)
    total = jax.lax.fori_loop(starts[j] * steps, starts[j + 1] * steps, add, zero)
    inside = _both(in_block, None if width % b_c == 0 else column + jnp.arange(wide) < width)
    if bias:
        total = total + _load(bias[0].at[pl.ds(column, wide)], inside).astype(jnp.float32)[None]
    if relu:
        total = jnp.maximum(total, 0)
    plgpu.store(
        y.at[pl.ds(top, tall), pl.ds(column, wide)], total.astype(y.dtype), mask=_mask(in_batch, inside, (tall, wide))
    )


def matmul(
    x: jax.Array, blocks: jax.Array, bias: jax.Array | None, layout: Layout, relu: bool, interpret: bool
) -> jax.Array:
    """`x (batch, rows) @ w (rows, cols)`, plus bias, with optional ReLU, in the type of `x`.

    Tiles that run at the same time share rows of `x`, which stay in the GPU's cache. The columns with the most blocks
    come first, so that the last tiles are short.

    Args:
      x: `(batch, rows)`, float32, bfloat16 or float16.
      blocks: `(kept, b_r, b_c)` of the same type.
      bias: `(cols,)`.
      layout: the block positions of `w`.
      relu: whether to apply `max(., 0)`.
      interpret: whether to use Pallas's interpreter, which is slow but runs on any platform.
    """
    batch, (height, width), (b_r, b_c) = x.shape[0], layout.matrix, layout.block
    if not batch or not layout.nse:
        return xla.epilogue(xla.matmul(x, blocks, layout), bias, relu).astype(x.dtype)
    most = LARGEST[x.dtype.itemsize]
    sides = tall, _, wide = _side(batch, most[0]), _side(b_r, most[2]), _side(b_c, most[1])
    order = np.argsort(-np.diff(layout.indptr), kind="stable").astype(np.int32)
    call = pl.pallas_call(
        functools.partial(_tile, height=height, width=width, sides=sides, relu=relu),
        out_shape=jax.ShapeDtypeStruct((batch, width), x.dtype),
        grid=(layout.grid[1], pl.cdiv(b_c, wide), pl.cdiv(batch, tall)),  # the first varies fastest
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="block_sparse_matmul",
    )
    return call(order, layout.indptr, layout.indices, x, blocks, *([] if bias is None else [bias]))
