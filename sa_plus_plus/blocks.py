"""A kernel as a grid of blocks.

A kernel of shape `(d1, ..., dr, c_out)` is read as a matrix of `rows = d1 * ... * dr` by `cols = c_out`
(paper, section 4), or as its view says (`views.View`), and cut into tiles of `(b_r, b_c)`. Tiles on the far edges may
be partial; they are padded with zeros wherever a full tile is needed. Each matrix of a stack is cut separately: the
grids have the batch axes in front. Everything here is pure, differentiable and jittable.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import views
from sa_plus_plus.views import View

Block = tuple[int, int]
Array = TypeVar("Array", jax.Array, np.ndarray)


def view_of(shape: Sequence[int], view: View | None) -> View:
    """`view`, or the default with all axes but the last as rows, which takes 2 to 5 dimensions.

    Args:
      shape: of the kernel.
      view: or None for the default.
    """
    if view is not None:
        return view
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"a kernel has 2 to 5 dimensions, got shape {tuple(shape)}")
    return views.default(len(shape))


def matrix_shape(shape: Sequence[int], view: View | None = None) -> tuple[int, int]:
    """Rows and columns of a kernel's matrix: all axes but the last, and the last, unless the view differs.

    Args:
      shape: of the kernel.
      view: how it is read as matrices; by default as one, all axes but the last its rows.

    >>> matrix_shape((3, 3, 64, 128))
    (576, 128)
    """
    return view_of(shape, view).matrix(shape)


def matrices(kernel: Array, view: View | None = None) -> Array:
    """A kernel as `(*stack, rows, cols)`; no data moves if the view has its axes in order.

    Args:
      kernel: a JAX or NumPy array; the result is of the same kind.
      view: how it is read as matrices; by default as one, all axes but the last its rows.

    >>> matrices(np.zeros((6, 512, 8, 64)), View((0,), (1,), (2, 3))).shape
    (6, 512, 512)
    """
    view = view_of(kernel.shape, view)
    ordered = kernel if view.in_order else kernel.transpose(view.order)
    return ordered.reshape(*view.stack(kernel.shape), *view.matrix(kernel.shape))


def from_matrices(matrices: Array, shape: Sequence[int], view: View | None = None) -> Array:
    """Inverse of `matrices`: a kernel of `shape`.

    Args:
      matrices: `(*stack, rows, cols)`.
      shape: of the kernel.
      view: as in `matrices`.
    """
    view = view_of(shape, view)
    ordered = matrices.reshape([shape[axis] for axis in view.order])
    return ordered if view.in_order else ordered.transpose(np.argsort(view.order))


def as_block(block: int | Sequence[int | None], matrix: tuple[int, int] | None = None) -> Block:
    """`(b_r, b_c)` from a pair or from one integer for a square.

    Args:
      block: positive integers; None in a pair stands for the whole side of the matrix.
      matrix: its rows and columns; without them there is no whole side.

    Raises:
      ValueError: if a side is not a positive integer or there are not two of them.

    >>> as_block((1, None), (784, 300))
    (1, 300)
    """
    sides = as_sides(block)
    if matrix is None and None in sides:
        raise ValueError(f"block {block!r} has a side of None, the whole side of a matrix, but there is no matrix here")
    b_r, b_c = (m if b is None else b for b, m in zip(sides, matrix or (0, 0), strict=True))
    return b_r, b_c


def as_sides(block: int | Sequence[int | None]) -> tuple[int | None, int | None]:
    """The two sides of a block, None for the whole side of a matrix.

    Args:
      block: one integer for a square, or a pair of integers or None.

    Raises:
      ValueError: if a side is neither a positive integer nor None in a pair, or there are not two of them.
    """
    pair = isinstance(block, Sequence | np.ndarray)
    sides: tuple[Any, ...] = tuple(block) if pair else (block, block)  # type: ignore[arg-type]

    def fits(side: Any) -> bool:
        if side is None:
            return pair
        return isinstance(side, int | np.integer) and not isinstance(side, bool) and bool(side > 0)

    if len(sides) != 2 or not all(map(fits, sides)):
        raise ValueError(
            f"block must be a positive integer or a pair of them, got {block!r}; None in a pair is the whole side"
        )
    down, across = (None if side is None else int(side) for side in sides)
    return down, across


def grid_shape(shape: Sequence[int], block: Block, view: View | None = None) -> tuple[int, int]:
    """Number of blocks down and across each matrix: `(ceil(rows / b_r), ceil(cols / b_c))`.

    Args:
      shape: of the kernel.
      block: `(b_r, b_c)`.
      view: as in `to_blocks`.

    >>> grid_shape((390, 400), (20, 20))
    (20, 20)
    """
    (rows, cols), (b_r, b_c) = matrix_shape(shape, view), block
    return -(-rows // b_r), -(-cols // b_c)


def block_sizes(shape: Sequence[int], block: Block, view: View | None = None) -> np.ndarray:
    """Number of real weights in each block of a matrix's grid: fewer than `b_r * b_c` on a ragged edge.

    Args:
      shape: of the kernel.
      block: `(b_r, b_c)`.
      view: as in `to_blocks`.
    """
    sides = []
    for length, b, n in zip(matrix_shape(shape, view), block, grid_shape(shape, block, view), strict=True):
        sides.append(np.minimum(b, length - b * np.arange(n)))
    return np.outer(*sides)


def to_blocks(kernel: Array, block: Block, view: View | None = None) -> Array:
    """Cut a kernel into its blocks.

    Args:
      kernel: any dtype. For a NumPy array the result is one too, and nothing is compiled.
      block: `(b_r, b_c)`.
      view: how it is read as matrices; by default as one, all axes but the last its rows.

    Returns:
      Array `(*stack, grid_r, b_r, grid_c, b_c)`: entry `[..., i, :, j, :]` is block `(i, j)`, zero beyond the kernel's
      edge. The axes stay in the kernel's own memory order, so an even split moves no data.
    """
    (rows, cols), (b_r, b_c) = matrix_shape(kernel.shape, view), block
    g_r, g_c = grid_shape(kernel.shape, block, view)
    matrix = matrices(kernel, view)
    stack: tuple[int, ...] = matrix.shape[:-2]
    if (g_r * b_r, g_c * b_c) != (rows, cols):
        pad: Any = np.pad if isinstance(kernel, np.ndarray) else jnp.pad
        matrix = pad(matrix, (*((0, 0) for _ in stack), (0, g_r * b_r - rows), (0, g_c * b_c - cols)))
    return matrix.reshape(*stack, g_r, b_r, g_c, b_c)


def from_blocks(blocks: jax.Array, shape: Sequence[int], view: View | None = None) -> jax.Array:
    """Inverse of `to_blocks`: assemble a kernel of `shape` from its blocks, dropping the padding.

    Args:
      blocks: `(*stack, grid_r, b_r, grid_c, b_c)`.
      shape: the kernel's shape.
      view: as in `to_blocks`.

    Raises:
      ValueError: if the blocks do not tile a kernel of that shape.
    """
    *stack, g_r, b_r, g_c, b_c = blocks.shape
    if (expected := full_grid(shape, (b_r, b_c), view)) != (*stack, g_r, g_c):
        raise ValueError(
            f"blocks of shape {blocks.shape} do not tile a kernel of shape {tuple(shape)}: "
            f"expected a grid of {expected}, got {(*stack, g_r, g_c)}"
        )
    rows, cols = matrix_shape(shape, view)
    return from_matrices(blocks.reshape(*stack, g_r * b_r, g_c * b_c)[..., :rows, :cols], shape, view)


def full_grid(shape: Sequence[int], block: Block, view: View | None = None) -> tuple[int, ...]:
    """`(*stack, grid_r, grid_c)`: a number for each block of a kernel.

    Args:
      shape: of the kernel.
      block: `(b_r, b_c)`.
      view: as in `to_blocks`.
    """
    return *view_of(shape, view).stack(shape), *grid_shape(shape, block, view)


def expand_blocks(grid: jax.Array, shape: Sequence[int], block: Block, view: View | None = None) -> jax.Array:
    """Repeat each entry of a grid over its block: the array of the kernel's `shape` that is constant on blocks.

    Args:
      grid: `(*stack, grid_r, grid_c)`, any dtype.
      shape: the kernel's shape.
      block: `(b_r, b_c)`.
      view: as in `to_blocks`.

    Raises:
      ValueError: if the grid is not that of the shape.
    """
    if grid.shape != (expected := full_grid(shape, block, view)):
        raise ValueError(
            f"a kernel of shape {tuple(shape)} in blocks of {block} has a grid of {expected}, got one of {grid.shape}"
        )
    (rows, cols), (*stack, g_r, g_c) = matrix_shape(shape, view), grid.shape
    # Across first, then down: the second, larger step copies whole rows, and its gradient sums whole rows.
    strips = jnp.broadcast_to(grid[..., None], (*stack, g_r, g_c, block[1])).reshape(*stack, g_r, -1)[..., :cols]
    tall = jnp.broadcast_to(strips[..., :, None, :], (*stack, g_r, block[0], cols))
    return from_matrices(tall.reshape(*stack, -1, cols)[..., :rows, :], shape, view)


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32 if its own floating type is narrower.

    Args:
      x: of any floating type.
    """
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def sum_of_squares(kernel: jax.Array, block: Block, view: View | None = None) -> jax.Array:
    """Squared Frobenius norm of each block, `(*stack, grid_r, grid_c)`, accumulated in at least float32.

    Args:
      kernel: the kernel.
      block: `(b_r, b_c)`.
      view: as in `to_blocks`.
    """
    blocks = at_least_float32(to_blocks(kernel, block, view))
    return jnp.sum(jnp.sum(jnp.square(blocks), axis=-3), axis=-1)  # down first: sums whole rows


def frobenius(kernel: jax.Array, block: Block, view: View | None = None) -> jax.Array:
    """Frobenius norm of each block: `sqrt(sum of squares)`, with gradient 0 (not NaN) at a block of zeros.

    Args:
      kernel: the kernel.
      block: `(b_r, b_c)`.
      view: as in `to_blocks`.

    Returns:
      `(*stack, grid_r, grid_c)` in at least float32.
    """
    squares = sum_of_squares(kernel, block, view)
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def soft_threshold(norms: jax.Array, threshold: jax.Array) -> jax.Array:
    """`max(0, 1 - threshold / norm)`: the factors by which the proximal map of `threshold * norm` shrinks blocks.

    Args:
      norms: of the blocks, of any shape.
      threshold: not negative, of a shape that broadcasts to that of the norms.
    """
    survives = norms > threshold
    return jnp.where(survives, 1 - threshold / jnp.where(survives, norms, 1), 0)
