"""Optimal Brain Surgeon with blocks: remove the cheapest block, adjust the remaining weights, and repeat.

Removing block `B` of a column of blocks costs `tr(W_B^T [G_BB]^-1 W_B) / 2`, where `G` is the inverse of `H` on the
remaining rows of the column, and the closed form `W -= G_:B [G_BB]^-1 W_B` adjusts them (Hassibi and Stork, 1993).
Removing blocks one by one is a Cholesky factorisation of `H^-1` pivoted by cost.
"""

import functools
from collections.abc import Callable

import numpy as np

from sa_plus_plus.oneshot.layers import Choose, Problem, Solved, pieces, refitted, wanda

MOST_ROUNDS = 64  # limit on how often the costs of a column are recomputed
MOST_OPERATIONS = 4e11  # limit for a separate order per column; above it, one pass over the rows


def obs(problem: Problem) -> Choose:
    """Mask and weights by Optimal Brain Surgeon, for any number of kept blocks.

    Each column of blocks has its own order of removal, and the blocks of all columns are removed in the order of their
    costs (Frantar and Alistarh, 2022: Optimal Brain Compression). If that takes too long, one pass goes through the
    rows of blocks, as in SparseGPT (the same, 2023). Either way the remaining weights are least-squares optimal at the
    end.
    """
    inverse = np.linalg.inv(problem.hessian)
    inverse = (inverse + inverse.T) / 2
    exact = problem.grid[1] * float(len(inverse)) ** 3 <= MOST_OPERATIONS
    masks = by_columns(problem, inverse) if exact else functools.partial(by_rows, problem, inverse)

    def choose(kept: int) -> Solved:
        mask = problem.covering(masks(kept), wanda(problem))
        return mask, refitted(problem, mask)

    return choose


def by_columns(problem: Problem, inverse: np.ndarray) -> Callable[[int], np.ndarray]:
    """Masks from a separate order of removal for each column of blocks."""
    (grid_r, grid_c), (b_r, b_c) = problem.grid, problem.block
    orders, costs = np.empty((grid_c, grid_r), int), np.empty((grid_c, grid_r))
    for j in range(grid_c):
        column = problem.weights[:, j * b_c : (j + 1) * b_c]
        orders[j], costs[j], _ = removed(inverse, column, b_r, grid_r, pieces(grid_r, MOST_ROUNDS))
    # A block goes only after those before it in its column.
    ranks = np.argsort(np.maximum.accumulate(costs, 1).ravel(), kind="stable")

    def mask_of(kept: int) -> np.ndarray:
        mask = np.ones((grid_r, grid_c), bool)
        columns, places = np.divmod(ranks[: mask.size - kept], grid_r)
        mask[orders[columns, places], columns] = False
        return mask

    return mask_of


def removed(
    inverse: np.ndarray, weights: np.ndarray, side: int, count: int, at_once: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Remove blocks of one column of blocks, always the cheapest ones.

    Args:
      inverse: `H^-1`, `(K, K)`.
      weights: `(K, b_c)`.
      side: rows of a block.
      count: how many to remove.
      at_once: how many between two rankings.

    Returns:
      The blocks in the order of removal, the cost of each, and the resulting weights.
    """
    size, grid = len(inverse), len(inverse) // side
    weights, live = weights.copy(), np.ones(grid, bool)
    factors, done = np.empty((count * side, size)), 0  # the Cholesky factor's columns
    corners = np.einsum("ikil->ikl", inverse.reshape(grid, side, grid, side)).copy()  # G_BB of each block
    order: list[int] = []
    costs: list[float] = []
    while len(order) < count:
        candidates = np.flatnonzero(live)
        blocks = weights.reshape(grid, side, -1)[candidates]
        ranked = np.argsort(np.sum(blocks * np.linalg.solve(corners[candidates], blocks), (1, 2)), kind="stable")
        chosen = candidates[ranked[: min(at_once, count - len(order))]]
        rows = (chosen[:, None] * side + np.arange(side)).ravel()
        columns = inverse[rows] - factors[:done, rows].T @ factors[:done]
        lower = np.linalg.cholesky(columns[:, rows])
        columns = np.linalg.solve(lower, columns)
        step = np.linalg.solve(lower, weights[rows])
        weights -= columns.T @ step
        parts = columns.reshape(len(rows), grid, side)
        corners -= np.einsum("rgk,rgl->gkl", parts, parts, optimize=True)
        factors[done : done + len(rows)] = columns
        done += len(rows)
        live[chosen] = False
        weights[rows] = 0
        order += chosen.tolist()
        costs += (np.sum(step.reshape(len(chosen), -1) ** 2, 1) / 2).tolist()
    return np.array(order), np.array(costs), weights


def by_rows(problem: Problem, inverse: np.ndarray, kept: int) -> np.ndarray:
    """Mask by one pass over the rows of blocks.

    With `H^-1 = U^T U`, `U` upper triangular, the inverse of `H` on the rows from `t` on is `U_t^T U_t` of the rows of
    `U` from `t` on. Before each group of rows all remaining blocks are ranked.
    """
    (grid_r, grid_c), side = problem.grid, problem.block[0]
    upper, weights = np.linalg.cholesky(inverse).T, problem.weights.copy()
    corners = np.einsum("ikil->ikl", inverse.reshape(grid_r, side, grid_r, side)).copy()
    mask, left = np.ones((grid_r, grid_c), bool), grid_r * grid_c - kept
    group = pieces(grid_r, MOST_ROUNDS)
    for start in range(0, grid_r, group):
        stop = min(start + group, grid_r)
        rows = weights[start * side :].reshape(grid_r - start, side, -1)
        costs = (rows * (np.linalg.inv(corners[start:]) @ rows)).sum(1).reshape(grid_r - start, grid_c, -1).sum(-1)
        going = np.zeros(costs.size, bool)
        going[np.argsort(costs.ravel(), kind="stable")[:left]] = True
        mask[start:stop] = ~going.reshape(costs.shape)[: stop - start]
        left -= int(np.count_nonzero(~mask[start:stop]))
        here = slice(start * side, stop * side)
        steps = np.zeros((here.stop - here.start, weights.shape[1]))
        for i in range(start, stop):
            row = slice(i * side, (i + 1) * side)
            gone = ~mask[i].repeat(problem.block[1])
            step = np.linalg.solve(upper[row, row].T, weights[row] * gone)
            steps[(i - start) * side : (i - start + 1) * side] = step
            within = slice(row.stop, here.stop)
            weights[within] -= upper[row, within].T @ step
        weights[here.stop :] -= upper[here, here.stop :].T @ steps
        parts = upper[here, here.stop :].reshape(here.stop - here.start, grid_r - stop, side)
        corners[stop:] -= np.einsum("rgk,rgl->gkl", parts, parts, optimize=True)
    return mask
