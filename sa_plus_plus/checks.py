"""Whether a network is as sparse as was planned."""

from typing import Any

import jax
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import Plan, path_string
from sa_plus_plus.views import View


def check_pruned(params: Any, plan: Plan) -> None:
    """Raise an error if layers keep more blocks than planned: the schedule was not finished, or not applied.

    A block is kept if any of its weights is not zero. Fewer blocks than planned are not an error.

    Args:
      params: what `Sparsifier.finalize`, or the loop around `sparsify`, ended with.
      plan: `sp.plan(params)`.

    Raises:
      ValueError: naming each such layer; or if a layer of the plan is missing from the tree or has another shape.
      TypeError: under `jax.jit`, where weights have no values to look at.
    """
    if sentences := unpruned(params, plan):
        listed = "\n".join(f"  {sentence}" for sentence in sentences)
        raise ValueError(
            f"{len(sentences)} of {len(plan.pruned)} layers keep more blocks than planned; train to the end of the "
            f"schedule and take what `finalize` returns:\n{listed}"
        )


def unpruned(params: Any, plan: Plan) -> list[str]:
    """One sentence for each layer that keeps more blocks than planned, largest surplus first.

    Args:
      params: tree of JAX or NumPy arrays.
      plan: `sp.plan(params)`.

    Raises:
      ValueError: if a layer of the plan is missing from the tree or has another shape.
      TypeError: under `jax.jit`.
    """
    found, surplus = [], 0
    for path, kernel in planned_kernels(params, plan).items():
        layer = plan.pruned[path]
        if isinstance(kernel, jax.core.Tracer):
            raise TypeError(
                "which blocks are zero is told by the weights' values: call this outside jit, vmap and grad"
            )
        kept, n = int(occupied(np.asarray(kernel), layer.block, layer.view).sum()), layer.blocks
        surplus += kept - layer.kept
        if kept > layer.kept:
            sentence = (
                f"{path}: {kept:,} of {n:,} blocks are not zero, {layer.kept:,} planned "
                f"({1 - kept / n:.1%} of blocks pruned instead of {1 - layer.kept / n:.1%})"
            )
            found.append(((kept - layer.kept) / n, sentence))
    if plan.scope == "global" and surplus <= 0:
        return []  # some layers may keep more, since others keep fewer
    return [sentence for _, sentence in sorted(found, key=lambda pair: -pair[0])]


def planned_kernels(params: Any, plan: Plan) -> dict[str, Any]:
    """The kernels that are to be pruned, by path.

    Args:
      params: a parameter tree.
      plan: of such a tree.

    Raises:
      ValueError: if a layer of the plan is missing from the tree or has another shape.
    """
    leaves = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, layer in plan.pruned.items():
        if path not in leaves or np.shape(leaves[path]) != layer.shape:
            found = f"has the shape {np.shape(leaves[path])}" if path in leaves else "is not there"
            raise ValueError(f"the plan has a kernel {path} of shape {layer.shape}, which {found} in this tree")
    return {path: leaves[path] for path in plan.pruned}


def occupied(kernel: np.ndarray, block: blk.Block, view: View | None = None) -> np.ndarray:
    """Which blocks hold anything but zeros.

    Args:
      kernel: of numbers or of booleans that say which are not zero.
      block: `(b_r, b_c)`.
      view: how it is read as matrices; by default as one, all axes but the last its rows.

    Returns:
      Boolean `(*stack, grid_r, grid_c)`.
    """
    (rows, cols), (b_r, b_c) = blk.matrix_shape(kernel.shape, view), block
    found = blk.matrices(kernel.astype(bool, copy=False), view)
    for axis, side, length in ((-2, b_r, rows), (-1, b_c, cols)):
        if side > 1:
            found = np.logical_or.reduceat(found, np.arange(0, length, side), axis=axis)
    return found
