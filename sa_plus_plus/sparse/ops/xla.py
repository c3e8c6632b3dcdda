"""Block-sparse matmul in plain JAX: works on every platform, in every floating type."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.sparse.array import Layout

FEW = 32  # number of rows of x below which rearranging the weights does not pay off
TILE = 32  # rows of x at once on a CPU: the gathered inputs stay in its caches
LARGE_TILE = 2048  # elsewhere, and for gradients: the gathered inputs fit in memory
WASTE = 1 / 8  # largest share of the work on a group of columns that may be padding


Product = Callable[[jax.Array, jax.Array], jax.Array]


class Group(NamedTuple):
    """Columns of the grid computed together, as if all had `n` blocks.

    Attributes:
      columns: `(g,)`.
      rows: `(g, n)`, the grid row of each block; 0 for padding.
      at: `(g, n)`, the number of each block; the number of blocks for padding.
    """

    columns: np.ndarray
    rows: np.ndarray
    at: np.ndarray


@functools.lru_cache(maxsize=256)
def groups(layout: Layout) -> tuple[Group, ...]:
    """Group the nonempty grid columns by about equal numbers of blocks.

    Starting from the fullest, a group takes columns until more than `WASTE` of it would be padding.
    """
    counts = np.diff(layout.indptr)
    order = np.argsort(-counts, kind="stable")
    order = order[: np.count_nonzero(counts)]
    result = []
    while order.size:
        full = counts[order[0]]
        enough = np.cumsum(counts[order]) >= (1 - WASTE) * full * np.arange(1, order.size + 1)
        size = order.size if enough.all() else int(enough.argmin())
        columns, order = np.sort(order[:size]), order[size:]
        at = layout.indptr[columns, None] + np.arange(full)
        at = np.where(at < layout.indptr[columns + 1, None], at, layout.nse)
        result.append(Group(columns, np.append(layout.indices, 0)[at], at))
    return tuple(result)


def _weights(blocks: jax.Array, group: Group) -> jax.Array:
    """The blocks of a group of columns, `(g, n * b_r, b_c)`, zeros for padding."""
    kept, b_r, b_c = blocks.shape
    if group.at.size == kept and (group.at.ravel() == np.arange(kept)).all():  # all columns alike: nothing to move
        return blocks.reshape(len(group.columns), -1, b_c)
    if (group.at == kept).any():
        blocks = jnp.concatenate([blocks, jnp.zeros((1, b_r, b_c), blocks.dtype)])
    return blocks[group.at].reshape(len(group.columns), -1, b_c)


def _inputs(x: jax.Array, group: Group) -> jax.Array:
    """The entries of `x (batch, grid_r, b_r)` for the weights of a group of columns, `(batch, g, n * b_r)`."""
    g, n = group.rows.shape
    return x[:, group.rows].reshape(x.shape[0], g, n * x.shape[2])


def _dots(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`(batch, g, k)` times `(g, k, b_c)`: a batched matmul over `g`."""
    return jnp.einsum("bgk,gkc->bgc", _held(x), _held(weights), preferred_element_type=sum_type(x))


def _sums(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The same as a reduction, which XLA compiles to one kernel on CPUs; its many small matmuls take longer."""
    return jnp.sum(blk.at_least_float32(x)[..., None] * blk.at_least_float32(weights)[None], axis=-2)


def _by_blocks(x: jax.Array, blocks: jax.Array, layout: Layout) -> jax.Array:
    """Each block's product, then their sums down the columns: the weights stay where they are."""
    products = _dots(x[:, layout.indices], blocks)
    full = np.diff(layout.indptr).max()
    at = layout.indptr[:-1, None] + np.arange(full)
    at = np.where(at < layout.indptr[1:, None], at, layout.nse)
    return jnp.sum(jnp.pad(products, ((0, 0), (0, 1), (0, 0)))[:, at], axis=2)


def _by_columns(product: Product, layout: Layout, x: jax.Array, weights: list[jax.Array]) -> jax.Array:
    """One matmul per grid column, all columns of a group at once."""
    cut = groups(layout)
    parts = [product(_inputs(x, group), w) for group, w in zip(cut, weights, strict=True)]
    columns = np.concatenate([group.columns for group in cut])
    place = np.full(layout.grid[1], len(columns))  # where there is nothing: the zeros behind the last
    place[columns] = np.arange(len(columns))
    if (place == len(columns)).any():
        parts.append(jnp.zeros_like(parts[0][:, :1]))
    y = jnp.concatenate(parts, axis=1)
    return y if np.array_equal(place, np.arange(y.shape[1])) else y[:, place]


def _tiles(x: jax.Array, most: int) -> jax.Array:
    """`(batch, ...)` as `(tiles, rows, ...)` of at most that many rows, padded with zeros."""
    batch = x.shape[0]
    tiles = -(-batch // most)
    rows = -(-batch // tiles)
    padding = ((0, tiles * rows - batch), *[(0, 0)] * (x.ndim - 1))
    return jnp.pad(x, padding).reshape(tiles, rows, *x.shape[1:])


def _tiled(product: Product, most: int, layout: Layout, x: jax.Array, weights: list[jax.Array]) -> jax.Array:
    """`_by_columns` over a limited number of rows of `x` at a time, since it gathers all inputs of each block."""
    y = jax.lax.map(lambda tile: _by_columns(product, layout, tile, weights), _tiles(x, most))
    return y.reshape(-1, *y.shape[2:])[: x.shape[0]]


def _in_blocks(x: jax.Array, side: int) -> jax.Array:
    """`(batch, length)` as `(batch, number of blocks, side)`, padded with zeros."""
    batch, length = x.shape
    number = -(-length // side)
    return jnp.pad(x, ((0, 0), (0, number * side - length))).reshape(batch, number, side)


def sum_type(x: jax.Array) -> np.dtype:
    """The accumulation type of products with `x`: at least float32."""
    return x.dtype if x.dtype.itemsize >= 4 else np.dtype(np.float32)


def _held(x: jax.Array) -> jax.Array:
    """The operand as it is multiplied: on CPUs, XLA does not support bfloat16 with float32 sums for every shape."""
    return blk.at_least_float32(x) if jax.default_backend() == "cpu" else x


def matmul(x: jax.Array, blocks: jax.Array, layout: Layout) -> jax.Array:
    """`x (batch, rows) @ w (rows, cols)`, in at least float32.

    Args:
      x: `(batch, rows)`.
      blocks: `(kept, b_r, b_c)`.
      layout: the block positions of `w`.
    """
    batch, (_, width) = x.shape[0], layout.matrix
    known = isinstance(batch, int)  # and not a symbol of `jax.export`
    if not layout.nse or (known and not batch):
        return jnp.zeros((batch, width), sum_type(x))
    x = _in_blocks(x, layout.block[0])
    if not known:
        y = _by_columns(_dots, layout, x, [_weights(blocks, group) for group in groups(layout)])
    elif batch < FEW:
        y = _by_blocks(x, blocks, layout)
    else:
        weights = [_weights(blocks, group) for group in groups(layout)]
        y = jax.lax.platform_dependent(
            x,
            weights,
            cpu=functools.partial(_tiled, _sums, TILE, layout),
            default=functools.partial(_tiled, _dots, LARGE_TILE, layout),
        )
    return y.reshape(batch, y.shape[1] * y.shape[2])[:, :width]


def epilogue(y: jax.Array, bias: jax.Array | None, relu: bool) -> jax.Array:
    """Applied to a product `(batch, cols)` before rounding: a bias `(cols,)` is added, then `max(., 0)`."""
    if bias is not None:
        y = y + bias.astype(y.dtype)[None]
    return jax.nn.relu(y) if relu else y


def weight_gradient(x: jax.Array, g: jax.Array, layout: Layout) -> jax.Array:
    """`x^T g` at the kept blocks, `(kept, b_r, b_c)`, in at least float32.

    Args:
      x: `(batch, rows)`.
      g: `(batch, cols)`.
      layout: which blocks to compute.
    """
    shape, dtype = (layout.nse, *layout.block), sum_type(x)
    if not x.shape[0] or not layout.nse:
        return jnp.zeros(shape, dtype)

    def add(total: jax.Array, tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, g = tile
        parts = []
        for group in groups(layout):
            columns = g[:, group.columns]
            part = jnp.einsum("bgk,bgc->gkc", _held(_inputs(x, group)), _held(columns), preferred_element_type=dtype)
            parts.append(part.reshape(-1, *layout.block))
        return total + jnp.concatenate(parts)[place], None

    numbers = np.concatenate([group.at.ravel() for group in groups(layout)])
    place = np.argsort(numbers, kind="stable")[: layout.nse]  # behind them is padding
    tiles = _tiles(_in_blocks(x, shape[1]), LARGE_TILE), _tiles(_in_blocks(g, shape[2]), LARGE_TILE)
    nothing = jnp.sum(x[:0].astype(dtype)) + jnp.sum(g[:0].astype(dtype))  # a zero, typed as sums in `shard_map` are
    return jax.lax.scan(add, jnp.broadcast_to(nothing, shape), tiles)[0]
