"""One layer's problem: which blocks of a matrix to remove, and the new values of the rest, to change outputs least."""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.oneshot.uses import Use
from sa_plus_plus.plans import OUTPUTS

DAMPING = 0.01


class Problem(NamedTuple):
    """Minimise `tr((V - W)^T H (V - W))` over `V` that is zero outside the kept blocks, `H = X^T X + damping I`.

    Both sides are whole numbers of blocks: `padded` pads them with dummy inputs and outputs.

    Attributes:
      hessian: `H`, `(K, K)` float64.
      weights: `W`, `(K, N)` float64.
      block: `(b_r, b_c)`.
      damping: the number added to the diagonal.
      covered: the axis of the grid along which there is a kept block everywhere: 1 for one in each column; None for any
        blocks.
    """

    hessian: np.ndarray
    weights: np.ndarray
    block: blk.Block
    damping: float
    covered: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks down and across."""
        return blk.grid_shape(self.weights.shape, self.block)

    def spread(self, mask: np.ndarray) -> np.ndarray:
        """Each block's number repeated over the block, `(K, N)`."""
        return mask.repeat(self.block[0], 0).repeat(self.block[1], 1)

    def norms(self, matrix: np.ndarray) -> np.ndarray:
        """Squared Frobenius norm of each block of a matrix."""
        return np.sum(blk.to_blocks(matrix, self.block) ** 2, (1, 3))

    def covering(self, mask: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """The mask, with as many blocks, once each row or column that is to keep a block does.

        One that has none gets its best block, in place of the worst of those that are not the best kept ones of theirs.

        Args:
          mask: `(grid_r, grid_c)`, with a block at least for each.
          scores: of the blocks.
        """
        if self.covered is None:
            return mask
        across = 1 - self.covered
        alone = ~mask.any(across, keepdims=True)
        best = np.zeros_like(mask)
        places = np.where(mask | alone, scores, -np.inf).argmax(across)
        np.put_along_axis(best, np.expand_dims(places, across), True, across)
        missing, spare = best & ~mask, np.flatnonzero(mask & ~best)
        worst = spare[np.argsort(scores.ravel()[spare], kind="stable")[: missing.sum()]]
        result = mask | missing
        result.ravel()[worst] = False
        return result

    def loss(self, weights: np.ndarray) -> float:
        """`tr((V - W)^T H (V - W))`."""
        change = weights - self.weights
        return float(np.sum(change * (self.hessian @ change)))


Solved = tuple[np.ndarray, np.ndarray]  # a layer's mask and weights
Choose = Callable[[int], Solved]  # takes the number of kept blocks


def top(scores: np.ndarray, kept: int) -> np.ndarray:
    """Mask of the highest-scoring blocks; among equal scores the lower (row-major) index wins."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:kept]] = True
    return mask.reshape(scores.shape)


def padded(gram: np.ndarray, weights: np.ndarray, block: blk.Block, damping: float, path: str) -> Problem:
    """The problem of a layer.

    Args:
      gram: `X^T X`, `(inputs, inputs)` float64; it becomes part of the problem.
      weights: `(inputs, outputs)` float64.
      block: `(b_r, b_c)`.
      damping: to add to the diagonal, as a multiple of its mean.
      path: of the layer, for errors.

    Raises:
      ValueError: if the damped matrix has no inverse.
    """
    (rows, cols), (b_r, b_c) = weights.shape, block
    mean = float(np.mean(np.diag(gram)))
    gram[np.arange(rows), np.arange(rows)] += damping * mean
    _check_invertible(gram, path, damping)
    if below := -rows % b_r:
        larger = mean * np.eye(rows + below)
        larger[:rows, :rows] = gram
        gram = larger
    return Problem(gram, np.pad(weights, ((0, below), (0, -cols % b_c))), block, damping * mean)


def problem_of(use: Use, gram: np.ndarray, matrix: np.ndarray, damping: float) -> Problem:
    """The problem of one matrix, which `solver` solves.

    Args:
      use: from `visit_layers`, like the next two arguments.
      gram: `X^T X`, float64.
      matrix: inputs as rows, float64.
      damping: as `one_shot` takes it.

    Raises:
      ValueError: for a bad damping, or if the damped `X^T X` has no inverse; for one of all zeros the identity is
        taken instead.
    """
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping is a multiple of the mean of the diagonal of X^T X, at least 0; got {damping}")
    block = use.layer.block[::-1] if use.transposed else use.layer.block
    covered = int(not use.transposed) if use.layer.min_kept == OUTPUTS else None
    # Unknown inputs count as equally large: every method then keeps the largest blocks.
    known = gram.copy() if np.diag(gram).any() else np.eye(len(gram))
    return padded(known, matrix, block, damping, use.name)._replace(covered=covered)


def _check_invertible(hessian: np.ndarray, path: str, damping: float) -> None:
    smallest = 0.0
    with contextlib.suppress(np.linalg.LinAlgError):
        smallest = float(np.diag(np.linalg.cholesky(hessian)).min()) ** 2
    if smallest <= len(hessian) * np.finfo(np.float64).eps * float(np.diag(hessian).max()):
        raise ValueError(
            f"the inputs of {path} on the calibration data are linearly dependent, with damping={damping}: give more "
            "examples, or a positive damping such as 0.01"
        )


def refitted(problem: Problem, mask: np.ndarray) -> np.ndarray:
    """The best weights in the kept blocks: for each column of blocks, `H_SS V_S = (H W)_S` over its kept rows `S`.

    Args:
      problem: of the layer.
      mask: `(grid_r, grid_c)`, true where a block stays.
    """
    target = problem.hessian @ problem.weights
    result, (b_r, b_c) = np.zeros_like(target), problem.block
    supports, which = np.unique(mask, axis=1, return_inverse=True)
    for number, support in enumerate(supports.T):
        rows = np.flatnonzero(support.repeat(b_r))
        columns = np.flatnonzero((which.ravel() == number).repeat(b_c))
        if len(rows):
            place = np.ix_(rows, columns)
            result[place] = np.linalg.solve(problem.hessian[np.ix_(rows, rows)], target[place])
    return result


def magnitude(problem: Problem) -> np.ndarray:
    """Scores: the Frobenius norm of each block, squared."""
    return problem.norms(problem.weights)


def wanda(problem: Problem) -> np.ndarray:
    """Scores: the norm of `|W_ij| ‖X_i‖` over each block, squared (Sun et al., 2023: Wanda, with blocks)."""
    norms = np.sqrt(np.maximum(np.diag(problem.hessian) - problem.damping, 0))
    return problem.norms(problem.weights * norms[:, None])


def pieces(count: int, most: int) -> int:
    """How many items to process at a time, so that `count` items take at most `most` steps."""
    return max(1, math.ceil(count / most))
