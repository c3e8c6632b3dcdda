"""The blocks in which a kernel is pruned, inferred from its zeros or taken from the plan."""

from collections.abc import Sequence

import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.checks import occupied
from sa_plus_plus.planning import Plan

SQUARES = (128, 64, 32, 20, 16, 10, 8, 5, 4)  # sides that are tried if zeros form no blocks
MOST_SIDE = 128
STRAY = 0.1  # largest share of zero/nonzero transitions that may be within blocks
ALIKE = 1.1  # a larger block is preferred if its share of kept weights is at most this times the lowest


def pruned_in(kernel: np.ndarray, candidates: Sequence[blk.Block] = ()) -> tuple[blk.Block | None, float]:
    """The largest block with about the lowest share of nonzero blocks, and that share; None if no block is zero.

    Args:
      kernel: 2 to 5 dimensions.
      candidates: blocks to choose from; by default those that the zeros suggest.
    """
    (rows, cols), nonzero = blk.matrix_shape(kernel.shape), kernel != 0
    if nonzero.all() or not nonzero.size:
        return None, 1.0
    nonzero = nonzero.reshape(rows, cols)
    shares = {}
    for b_r, b_c in sorted(candidates or _suggested(nonzero), key=lambda block: -block[0] * block[1]):
        if b_r <= rows or b_c <= cols:  # else it is the whole kernel
            shares[b_r, b_c] = float(occupied(nonzero, (b_r, b_c)).mean())
    least = min(shares.values(), default=1.0)
    if least == 1:
        return None, 1.0
    return next((block, share) for block, share in shares.items() if share <= ALIKE * least)


def planned_blocks(plan: Plan, shape: Sequence[int]) -> list[blk.Block]:
    """The blocks of a plan's pruned kernels whose matrix has the size of this kernel's.

    A kernel that is multiplied from the left is traced as its transpose, so transposed matrices count too.

    Args:
      plan: `sp.plan(params)`.
      shape: of a kernel as it was traced.
    """
    matrix, found = blk.matrix_shape(shape), []
    for layer in plan.pruned.values():
        planned = blk.matrix_shape(layer.shape, layer.view)
        if planned == matrix:
            found.append(layer.block)
        if len(shape) == 2 and planned == matrix[::-1]:
            found.append(layer.block[::-1])
    return list(dict.fromkeys(found))


def _suggested(nonzero: np.ndarray) -> list[blk.Block]:
    """Blocks at whose edges runs of zeros begin and end; squares of common sizes if there are none."""
    rows, cols = nonzero.shape
    found = {
        (_side(rows, down, across), _side(cols, across, down))
        for down in _spacings(nonzero)
        for across in _spacings(nonzero.T)
        if down or across
    }
    if max((b_r * b_c for b_r, b_c in found), default=0) < SQUARES[-1]:
        return [(side, side) for side in SQUARES]
    return [*found]


def _side(length: int, spacing: int, other: int) -> int:
    """A block's side along an axis; without an edge there, a square's if that spans the axis, else the whole axis."""
    if not spacing:
        return other if length <= other else min(length, MOST_SIDE)
    return next(side for side in range(min(spacing, MOST_SIDE), 0, -1) if spacing % side == 0)


def _spacings(nonzero: np.ndarray) -> list[int]:
    """The largest spacing of rows between which zeros begin or end: of all such rows, and of most; 0 for none."""
    counts = np.count_nonzero(nonzero[1:] != nonzero[:-1], axis=1)
    edges = np.flatnonzero(counts) + 1
    if not edges.size:
        return [0]
    exact, total = int(np.gcd.reduce(edges)), counts.sum()
    most = (s for s in range(MOST_SIDE, exact, -1) if counts[s - 1 :: s].sum() >= (1 - STRAY) * total)
    return [exact, *[next(most, exact)][: 1 if exact < MOST_SIDE else 0]]
