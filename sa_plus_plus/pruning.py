"""One array pruned by blocks: the largest ones stay."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus import select
from sa_plus_plus.plan_options import check_options
from sa_plus_plus.views import View, Viewable, as_view


def prune(
    w: blk.Array, *, block: int | Sequence[int | None], sparsity: float, view: Viewable | None = None
) -> blk.Array:
    """An array with all but its largest blocks set to zero.

    Of the `N` blocks of each matrix, those with the `floor((1 - sparsity) N)` largest Frobenius norms stay as they are.
    Works under `jax.jit`, with `block` and `sparsity` static. `sapp.magnitude` does the same to a network, `one_shot`
    does better with example inputs, and training better still.

        >>> w = np.arange(16.0, dtype=np.float32).reshape(4, 4)
        >>> prune(w, block=2, sparsity=0.5)
        array([[ 0.,  0.,  0.,  0.],
               [ 0.,  0.,  0.,  0.],
               [ 8.,  9., 10., 11.],
               [12., 13., 14., 15.]], dtype=float32)

    Args:
      w: 2 to 5 dimensions, floating point. For a NumPy array the result is one too.
      block: `(b_r, b_c)` over the array's matrix, or one integer for a square; None in a pair is the whole side. Blocks
        on the edges may be partial and count like others.
      sparsity: share of the blocks to remove, in [0, 1).
      view: how it is read as matrices, such as `"o i -> i o"` or `"[l] i o"` (see `views.as_view`); by default as one,
        all axes but the last its rows.

    Raises:
      ValueError: if an option is out of range, no block would stay, the view does not fit, the array is empty or has
        other than 2 to 5 dimensions, or weights are not finite.
      TypeError: if it is no array of floating-point numbers.
    """
    if not isinstance(w, jax.Array | np.ndarray):
        raise TypeError(
            f"prune takes one array, got {type(w).__name__}: for a tree of arrays see magnitude or one_shot"
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"only floating-point arrays can be pruned, got {w.dtype}")
    check_options(block, sparsity)
    read = blk.view_of(w.shape, None if view is None else as_view(view, w.ndim))
    if not w.size:
        raise ValueError(f"the array has no weights: its shape is {w.shape}")
    if not isinstance(w, jax.core.Tracer) and not bool(jnp.isfinite(w).all()):
        raise ValueError("the array has weights that are NaN or infinite")
    sides = blk.as_block(block, read.matrix(w.shape))
    total = int(np.prod(blk.grid_shape(w.shape, sides, read)))
    kept = select.kept_blocks(total, sparsity)
    if not kept:
        raise ValueError(
            f"sparsity {sparsity} leaves no block of the {total} in {w.shape}: lower it or use smaller blocks"
        )
    return largest_blocks(w, sides, kept, read)


def largest_blocks(w: blk.Array, block: blk.Block, kept: int, view: View | None = None) -> blk.Array:
    """The array with all but its largest blocks set to zero.

    Args:
      w: floating point; for a NumPy array the result is one too.
      block: `(b_r, b_c)`.
      kept: how many blocks of each matrix stay.
      view: how it is read as matrices.
    """
    norms = blk.frobenius(jnp.asarray(w), block, view)
    mask = blk.expand_blocks(select.top_k_per_layer({"": norms}, {"": kept})[""], w.shape, block, view)
    if isinstance(w, np.ndarray):  # in its own type, which JAX may narrow
        return np.where(np.asarray(mask), w, np.zeros((), w.dtype))
    return jnp.where(mask, w, jnp.zeros((), w.dtype))
