"""A kernel as a grid of blocks.

A kernel of shape `(d1, ..., dr, c_out)` is read as a matrix of `rows = d1 * ... * dr` by `cols = c_out`
(paper, section 4) and cut into tiles of `(b_r, b_c)`. Tiles on the far edges may be partial; they are
completed with zeros wherever a full tile is needed. Everything here is pure, differentiable and jittable.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Block = tuple[int, int]
Array = TypeVar("Array", jax.Array, np.ndarray)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a kernel's matrix: all axes but the last, and the last.

    >>> matrix_shape((3, 3, 64, 128))
    (576, 128)
    """
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"a kernel has 2 to 5 dimensions, got shape {tuple(shape)}")
    return math.prod(shape[:-1]), shape[-1]


def as_block(block: int | Sequence[int]) -> Block:
    """`(b_r, b_c)` from a pair or from one integer for a square block.

    Raises:
      ValueError: if a side is not a positive integer or there are not two of them.
    """
    sides = tuple(block) if isinstance(block, Sequence | np.ndarray) else (block, block)
    whole = all(isinstance(b, int | np.integer) and not isinstance(b, bool) and b > 0 for b in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(f"block must be a positive integer or a pair of them, got {block!r}")
    return int(sides[0]), int(sides[1])


def grid_shape(shape: Sequence[int], block: Block) -> tuple[int, int]:
    """Number of blocks down and across: `(ceil(rows / b_r), ceil(cols / b_c))`.

    >>> grid_shape((390, 400), (20, 20))
    (20, 20)
    """
    (rows, cols), (b_r, b_c) = matrix_shape(shape), block
    return -(-rows // b_r), -(-cols // b_c)


def block_sizes(shape: Sequence[int], block: Block) -> np.ndarray:
    """How many real weights each block of the grid holds: fewer than `b_r * b_c` on a ragged edge."""
    sides = []
    for length, b, n in zip(matrix_shape(shape), block, grid_shape(shape, block), strict=True):
        sides.append(np.minimum(b, length - b * np.arange(n)))
    return np.outer(*sides)


def to_blocks(kernel: Array, block: Block) -> Array:
    """Cut a kernel into its blocks.

    Args:
      kernel: 2 to 5 dimensions, any dtype. Of a NumPy array the result is one too, and nothing is compiled.
      block: `(b_r, b_c)`.

    Returns:
      Array `(grid_r, b_r, grid_c, b_c)`: entry `[i, :, j, :]` is block `(i, j)`, zero beyond the kernel's edge.
      The axes stay in the kernel's own memory order, so an even split moves no data.
    """
    (rows, cols), (b_r, b_c) = matrix_shape(kernel.shape), block
    g_r, g_c = grid_shape(kernel.shape, block)
    matrix = kernel.reshape(rows, cols)
    if (g_r * b_r, g_c * b_c) != (rows, cols):
        pad: Any = np.pad if isinstance(kernel, np.ndarray) else jnp.pad
        matrix = pad(matrix, ((0, g_r * b_r - rows), (0, g_c * b_c - cols)))
    return matrix.reshape(g_r, b_r, g_c, b_c)


def from_blocks(blocks: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Inverse of `to_blocks`: put blocks together to a kernel of `shape`, dropping the padding.

    Args:
      blocks: `(grid_r, b_r, grid_c, b_c)`.
      shape: the kernel's shape.

    Raises:
      ValueError: if the blocks do not tile a kernel of that shape.
    """
    g_r, b_r, g_c, b_c = blocks.shape
    if grid_shape(shape, (b_r, b_c)) != (g_r, g_c):
        raise ValueError(
            f"blocks of shape {blocks.shape} do not tile a kernel of shape {tuple(shape)}: "
            f"expected a grid of {grid_shape(shape, (b_r, b_c))}, got {(g_r, g_c)}"
        )
    rows, cols = matrix_shape(shape)
    return blocks.reshape(g_r * b_r, g_c * b_c)[:rows, :cols].reshape(shape)


def spread(grid: jax.Array, shape: Sequence[int], block: Block) -> jax.Array:
    """Repeat each entry of a grid over its block: the array of the kernel's `shape` that is constant on blocks.

    Args:
      grid: `(grid_r, grid_c)`, any dtype.
      shape: the kernel's shape.
      block: `(b_r, b_c)`.

    Raises:
      ValueError: if the grid is not that of the shape.
    """
    if grid.shape != grid_shape(shape, block):
        raise ValueError(
            f"a kernel of shape {tuple(shape)} in blocks of {block} has a grid of {grid_shape(shape, block)}, "
            f"got one of {grid.shape}"
        )
    (rows, cols), (g_r, g_c) = matrix_shape(shape), grid.shape
    # Across first, then down: the second, large step copies whole rows, and its gradient adds up whole rows.
    strips = jnp.broadcast_to(grid[:, :, None], (g_r, g_c, block[1])).reshape(g_r, -1)[:, :cols]
    matrix = jnp.broadcast_to(strips[:, None, :], (g_r, block[0], cols)).reshape(-1, cols)[:rows]
    return matrix.reshape(shape)


def widened(x: jax.Array) -> jax.Array:
    """`x` in float32 if its own floating type is narrower."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def sum_of_squares(kernel: jax.Array, block: Block) -> jax.Array:
    """Squared Frobenius norm of each block, `(grid_r, grid_c)`, accumulated in at least float32."""
    blocks = widened(to_blocks(kernel, block))
    return jnp.sum(jnp.sum(jnp.square(blocks), axis=1), axis=-1)  # down first: adds up whole rows


def frobenius(kernel: jax.Array, block: Block) -> jax.Array:
    """Frobenius norm of each block: `sqrt(sum of squares)`, with gradient 0 (not NaN) at a block of zeros.

    Args:
      kernel: 2 to 5 dimensions.
      block: `(b_r, b_c)`.

    Returns:
      `(grid_r, grid_c)` in at least float32.
    """
    squares = sum_of_squares(kernel, block)
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))
