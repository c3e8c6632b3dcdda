"""Restricted smoothness and strong convexity by enumeration, and the resulting guarantee of Theorem B.3."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sa_plus_plus.convex.problems as problems
from sa_plus_plus.convex.greedy import supports
from sa_plus_plus.convex.group_lasso import check_groups
from sa_plus_plus.convex.groups import Groups, members
from sa_plus_plus.convex.problems import Problem

_MOST_SUPPORTS = 50_000


class Guarantee(NamedTuple):
    """Theorem B.3 for one problem.

    Attributes:
      k: number of groups of the reference solution.
      size: `k'`, the number of groups that OMPR keeps: the smallest that satisfies `k' >= k (L_2^2 / mu_{k+k'}^2 + 1)`.
      smoothness: `L_2`.
      convexity: `mu_{k+k'}`.
    """

    k: int
    size: int
    smoothness: float
    convexity: float

    def rounds(self, distance: float, eps: float) -> int:
        """`R = ceil(k (L_2 / mu) log(distance / eps))`, for the initial `distance` of the loss from its optimum."""
        return max(0, math.ceil(self.k * self.smoothness / self.convexity * math.log(max(distance / eps, 1))))


def hessian_bounds(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Matrices below and above every Hessian of the loss, `(p, p)` over the flat coefficients.

    For least squares both are the Hessian itself; for binary logistic regression they are `ridge I`, the only bound
    that holds everywhere, and the Hessian at 0, where `p (1 - p)` is largest.

    Args:
      problem: least squares or binary logistic regression.

    Raises:
      ValueError: for another loss.
    """
    kind = None if problem.dual is None else problem.dual.loss.func
    if kind not in (problems.squares_loss, problems.logistic_loss):
        raise ValueError("bounds of the Hessian are known for least_squares and logistic problems only")
    size = problem.origin.size
    above = np.asarray(_hessian_at_zero(problem)).reshape(size, size)
    if kind is problems.squares_loss:
        return above, above
    assert problem.dual is not None
    return float(problem.dual.ridge) * np.eye(size), above


def restricted_smoothness(hessian: np.ndarray, groups: Groups, size: int) -> float:
    """The largest eigenvalue over all supports of `size` groups.

    Args:
      hessian: `(p, p)` over the flat coefficients.
      groups: how the `p` coefficients are grouped.
      size: groups in a support.
    """
    return max(float(e[-1]) for e in _eigenvalues(hessian, groups, size))


def restricted_convexity(hessian: np.ndarray, groups: Groups, size: int) -> float:
    """The least eigenvalue over all supports of `size` groups (of all groups, if there are no more).

    Args:
      hessian: `(p, p)` over the flat coefficients.
      groups: how the `p` coefficients are grouped.
      size: groups in a support.
    """
    return min(float(e[0]) for e in _eigenvalues(hessian, groups, min(size, groups.count)))


def guarantee(problem: Problem, groups: Groups, k: int) -> Guarantee | None:
    """The smallest `k'` for which Theorem B.3 holds, or None if there is none below the number of groups.

    Args:
      problem: as `hessian_bounds` takes it.
      groups: how its coefficients are grouped.
      k: size of the support to compare with.

    Raises:
      ValueError: if bounds of the Hessian are not known or there are more than 50,000 supports to enumerate.
    """
    check_groups(problem, groups)
    below, above = hessian_bounds(problem)
    smoothness = restricted_smoothness(above, groups, min(2, groups.count))
    for size in range(2 * k, groups.count):
        convexity = restricted_convexity(below, groups, k + size)
        if convexity > 0 and size >= k * ((smoothness / convexity) ** 2 + 1):
            return Guarantee(k, size, smoothness, convexity)
    return None


@jax.jit
def _hessian_at_zero(problem: Problem) -> jax.Array:
    return jax.hessian(problem.value)(problem.origin)


def _eigenvalues(hessian: np.ndarray, groups: Groups, size: int) -> list[np.ndarray]:
    if not 1 <= size <= groups.count:
        raise ValueError(f"a support has 1 to {groups.count} groups, got {size}")
    if math.comb(groups.count, size) > _MOST_SUPPORTS:
        count = math.comb(groups.count, size)
        raise ValueError(f"{size} of {groups.count} groups make {count:,} supports, more than {_MOST_SUPPORTS:,}")
    coordinates = members(groups)
    matrix = np.asarray(jnp.asarray(hessian))
    found = []
    for mask in supports(groups.count, size):
        index = np.concatenate([coordinates[i] for i in np.flatnonzero(mask)])
        found.append(np.linalg.eigvalsh(matrix[np.ix_(index, index)]))
    return found
