"""A matrix times a block-sparse one on a GPU: one Pallas kernel, lowered through Triton."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

import sa_plus_plus.sparse.xla as xla
from sa_plus_plus.sparse.array import Layout

LEAST = 16  # a side of what the tensor cores multiply
TALL, WIDE, DEEP = 128, 128, 64  # at most, of a tile: rows of y, columns of y, rows of a block


def _side(length: int, most: int) -> int:
    """Triton's tiles have sides that are powers of two."""
    return min(max(LEAST, pl.next_power_of_2(length)), most)


def _tile(
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
    """A tile of y within one grid column: the products of its blocks are added up in registers.

    All references are to whole arrays in the GPU's memory. A tile that reaches beyond an edge is masked there.
    """
    *bias, y = bias_and_y
    tall, deep, wide = sides
    batch, (_, b_r, b_c) = x.shape[0], blocks.shape
    top, j, left = pl.program_id(0) * tall, pl.program_id(1), pl.program_id(2) * wide
    inside_batch = top + jnp.arange(tall) < batch
    across = left + jnp.arange(wide)
    steps = pl.cdiv(b_r, deep)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        at, down = step // steps, (step % steps) * deep
        start = rows[at] * b_r + down
        real = (down + jnp.arange(deep) < b_r) & (start + jnp.arange(deep) < height)
        across_x = plgpu.load(
            x.at[pl.ds(top, tall), pl.ds(start, deep)], mask=inside_batch[:, None] & real[None, :], other=0
        )
        weights = plgpu.load(
            blocks.at[at, pl.ds(down, deep), pl.ds(left, wide)], mask=real[:, None] & (across < b_c)[None, :], other=0
        )
        # In float32 the tensor cores would keep 10 bits of each factor.
        precision = None if x.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
        return total + jnp.dot(across_x, weights, precision=precision, preferred_element_type=jnp.float32)

    zero = jnp.zeros((tall, wide), jnp.float32)
    total = jax.lax.fori_loop(starts[j] * steps, starts[j + 1] * steps, add, zero)
    column = j * b_c + left
    inside = (across < b_c) & (j * b_c + across < width)
    if bias:
        addend = plgpu.load(bias[0].at[pl.ds(column, wide)], mask=inside, other=0)
        total = total + addend.astype(jnp.float32)[None]
    if relu:
        total = jnp.maximum(total, 0)
    plgpu.store(
        y.at[pl.ds(top, tall), pl.ds(column, wide)],
        total.astype(y.dtype),
        mask=inside_batch[:, None] & inside[None, :],
    )


def matmul(
    x: jax.Array, blocks: jax.Array, bias: jax.Array | None, layout: Layout, relu: bool, interpret: bool
) -> jax.Array:
    """`x (batch, rows) @ w (rows, cols)`, plus bias, rectified if asked, in the type of `x`.

    Args:
      x: `(batch, rows)`, float32, bfloat16 or float16.
      blocks: `(kept, b_r, b_c)` of the same type.
      bias: `(cols,)`.
      layout: where the blocks of `w` stand.
      relu: `max(., 0)` of the result.
      interpret: by Pallas's interpreter, on any platform, slowly.
    """
    batch, (height, width), (b_r, b_c) = x.shape[0], layout.matrix, layout.block
    if not batch or not layout.nse:
        return xla.epilogue(xla.matmul(x, blocks, layout), bias, relu).astype(x.dtype)
    sides = tall, _, wide = _side(batch, TALL), _side(b_r, DEEP), _side(b_c, WIDE)
    call = pl.pallas_call(
        functools.partial(_tile, height=height, width=width, sides=sides, relu=relu),
        out_shape=jax.ShapeDtypeStruct((batch, width), x.dtype),
        grid=(pl.cdiv(batch, tall), layout.grid[1], pl.cdiv(b_c, wide)),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4 if tall * wide <= 64 * 64 else 8, num_stages=3),
        name="block_sparse_matmul",
    )
    return call(layout.indptr, layout.indices, x, blocks, *([] if bias is None else [bias]))
