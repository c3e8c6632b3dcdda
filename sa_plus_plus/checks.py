"""Whether a network is as sparse as was planned, and finite."""

from typing import Any

import jax
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import Plan, path_string
from sa_plus_plus.views import View

_CAUSES = (
    "possible causes: an unfinished schedule, an average of weights over steps by another than sapp.ema, something "
    "after `sparsify` in the chain that changes the updates, such as clipping, or around it that freezes the layer, "
    "such as optax.masked; train to the end of the schedule and take what `finalize` returns"
)
_DIVERGED = (
    "training has diverged: lower the learning rate, clip gradients inside `sparsify` or put `optax.apply_if_finite` "
    "around it, and go back to a checkpoint that is finite"
)


def check_pruned(params: Any, plan: Plan) -> None:
    """Raise an error if layers keep more blocks than planned, or hold weights that are not finite.

    A block is kept if any of its weights is not zero. Fewer blocks than planned are not an error.

    Args:
      params: the result of `Sparsifier.finalize`, or of the loop around `sparsify`.
      plan: `sp.plan(params)`.

    Raises:
      ValueError: naming each such layer and what may have caused it; or if a layer of the plan is missing from the
        tree or has another shape.
      TypeError: under `jax.jit`, where weights have no values to look at.
    """
    if found := faults(params, plan):
        raise ValueError("\n".join("\n  ".join([head + ":", *sentences]) for head, sentences in found))


def faults(params: Any, plan: Plan) -> list[tuple[str, list[str]]]:
    """What is wrong with a network that should be pruned: each fault, and a sentence for each layer that has it.

    Layers with weights that are not finite come first, most of them first, then those that keep more blocks than
    planned, largest surplus first.

    Args:
      params: tree of JAX or NumPy arrays.
      plan: `sp.plan(params)`.

    Raises:
      ValueError: if a layer of the plan is missing from the tree or has another shape.
      TypeError: under `jax.jit`.
    """
    broken, found, surplus = [], [], 0
    for path, kernel in planned_kernels(params, plan).items():
        layer = plan.pruned[path]
        if isinstance(kernel, jax.core.Tracer):
            raise TypeError("finding blocks of zeros needs the weights' values: call this outside jit, vmap and grad")
        kernel = np.asarray(kernel)
        kept, n = int(occupied(kernel, layer.block, layer.view).sum()), layer.blocks
        surplus += kept - layer.kept
        if bad := int(kernel.size - np.isfinite(kernel).sum()):
            broken.append((bad / kernel.size, f"{path}: {bad:,} of {kernel.size:,} weights are NaN or infinite"))
        elif kept > layer.kept:
            sentence = (
                f"{path}: {kept:,} of {n:,} blocks are not zero, {layer.kept:,} planned "
                f"({1 - kept / n:.1%} of blocks pruned instead of {1 - layer.kept / n:.1%})"
            )
            found.append(((kept - layer.kept) / n, sentence))
    if plan.scope == "global" and surplus <= 0:
        found = []  # some layers may keep more, since others keep fewer
    listed = (
        ("hold weights that are not finite", _DIVERGED, broken),
        ("keep more blocks than planned", _CAUSES, found),
    )
    return [
        (
            f"{len(layers)} of {len(plan.pruned)} layers {what} ({why})",
            [text for _, text in sorted(layers, reverse=True)],
        )
        for what, why, layers in listed
        if layers
    ]


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
