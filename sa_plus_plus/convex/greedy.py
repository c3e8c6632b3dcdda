"""Greedy selection of groups: group OMP, OMPR (Algorithm 2), IHT, one-shot magnitude, and brute force.

All minimise `L(beta)` with at most `k` nonzero groups. A support is a mask over the groups, so that shapes do not
depend on the selection and everything supports `jit` and `vmap`.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import sa_plus_plus.convex.group_lasso as group_lasso
import sa_plus_plus.convex.penalties as penalties
from sa_plus_plus import select
from sa_plus_plus.convex.descent import curvature_along_gradient, in_units, lbfgs, proximal_step
from sa_plus_plus.convex.group_lasso import check_groups
from sa_plus_plus.convex.groups import Groups, norms, spread
from sa_plus_plus.convex.penalised import require_subadditive
from sa_plus_plus.convex.penalties import Penalty
from sa_plus_plus.convex.problems import Problem, gradient_at_zero, units_of_coefficients
from sa_plus_plus.convex.scaling import norm

_MOST_SUPPORTS = 200_000
_NOTHING = np.zeros(0, np.int32)


_Pair = tuple[jax.Array, jax.Array]
_Triple = tuple[jax.Array, jax.Array, jax.Array]


class Refit(NamedTuple):
    """The minimum over a support.

    Attributes:
      coefficients: the minimiser.
      value: the loss there.
      converged: whether the gradient reached the tolerance.
    """

    coefficients: jax.Array
    value: jax.Array
    converged: jax.Array


_Best = tuple[jax.Array, Refit]  # support, minimum there
_Chain = tuple[_Best, _Best]  # the latest, the best so far


class Selection(NamedTuple):
    """The outcome of a selection.

    Attributes:
      support: mask, `(count,)`.
      coefficients: the loss's minimiser over that support.
      value: the loss there.
      values: the loss after each step or round.
      entered: the group added in each step or round of `omp` and `ompr`; empty for the others.
      converged: whether all minimisations that led there reached their tolerance.
    """

    support: jax.Array
    coefficients: jax.Array
    value: jax.Array
    values: jax.Array
    entered: jax.Array | np.ndarray
    converged: jax.Array


def refit(
    problem: Problem, groups: Groups, support: jax.Array, start: jax.Array | None = None, tol: float | None = None
) -> Refit:
    """Minimise the loss over a support, by L-BFGS in coefficients for columns of one scale.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      support: mask of groups, `(count,)`.
      start: where to begin.
      tol: on the gradient's 2-norm by these coefficients, relative to that at 0; 1e-8 in float64, 1e-4 in float32 by
        default.
    """
    start = problem.origin if start is None else start
    units = units_of_coefficients(problem)
    mask = spread(groups, support.astype(start.dtype)) * units
    tol = (1e-8 if start.dtype.itemsize > 4 else 1e-4) if tol is None else tol
    scale = norm(gradient_at_zero(problem) * units)
    first = jnp.where(mask > 0, start / units, 0)
    end = lbfgs(lambda b: problem.value(b * mask), first, tol * scale, max_steps=300)
    return Refit(end.x * mask, end.value, end.converged)


def omp(problem: Problem, groups: Groups, k: int, tol: float | None = None) -> Selection:
    """Group orthogonal matching pursuit: add the group of largest gradient norm, minimise over the support, repeat.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      k: how many groups.
      tol: of each minimisation, as for `refit`.

    Returns:
      `values` has the loss after each of the `k` additions.

    Raises:
      ValueError: if `k` is not between 1 and the number of groups.
    """
    check_groups(problem, groups)
    check_k(groups, k)
    return _omp(problem, groups, k, tol)


def ompr(
    problem: Problem,
    groups: Groups,
    support: jax.Array,
    rounds: int,
    penalty: Penalty | None = None,
    ratio: float | None = None,
    tol: float | None = None,
) -> Selection:
    """Group orthogonal matching pursuit with replacement (Algorithm 2).

    Each round minimises `L(beta) + lambda q^{-1}(sum over i outside of S of q(||beta_i||))` with a large lambda, adds
    the group outside of `S` with the largest norm, and drops the one in `S` with the smallest. By Theorem 1.1 the
    minimiser is the same for every subadditive `q`, and as lambda rises to the point where all groups outside of `S`
    vanish, the added group is the one with the largest gradient norm: by default that limit is taken.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      support: mask of the initial groups; all supports have its size.
      rounds: `R`, the number of replacements.
      penalty: `q`; any subadditive one gives the same result.
      ratio: if set, below 1: lambda as a share of that point, and the problem is solved explicitly.
      tol: of each minimisation.

    Returns:
      The best support found; `values` `(rounds + 1,)` has the loss of each, including the first.

    Raises:
      ValueError: if the penalty is not subadditive, the support has another shape, is empty or has all groups, or the
        ratio is outside of (0, 1).
    """
    check_groups(problem, groups)
    require_subadditive(penalties.absolute() if penalty is None else penalty)
    if support.shape != (groups.count,):
        raise ValueError(f"the support must be a mask over {groups.count} groups, got shape {support.shape}")
    if not isinstance(support, jax.core.Tracer) and not 0 < int(np.sum(np.asarray(support, bool))) < groups.count:
        raise ValueError(f"the support must have some groups and not all {groups.count}, got {int(np.sum(support))}")
    if ratio is not None and not 0 < ratio < 1:
        raise ValueError(f"lambda's ratio to the critical one must be in (0, 1), got {ratio}")
    return _ompr(problem, groups, jnp.asarray(support, bool), rounds, ratio, tol)


def iht(
    problem: Problem, groups: Groups, k: int, steps: int = 300, start: jax.Array | None = None, tol: float | None = None
) -> Selection:
    """Iterative hard thresholding: a gradient step, then the `k` groups of largest norm (Blumensath and Davies 2009).

    The step is halved until the loss is below its quadratic bound. At the end the loss is minimised over the support.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      k: how many groups.
      steps: gradient steps.
      start: where to begin; 0 if None.
      tol: of the last minimisation.

    Raises:
      ValueError: if `k` is not between 1 and the number of groups.
    """
    check_groups(problem, groups)
    check_k(groups, k)
    return _iht(problem, groups, k, steps, problem.origin if start is None else start, tol)


def magnitude(problem: Problem, groups: Groups, k: int, tol: float | None = None) -> Selection:
    """One shot: minimise over all groups, keep the `k` of largest norm, minimise over those.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      k: how many groups to keep.
      tol: as `refit` takes it.

    Raises:
      ValueError: if `k` is not between 1 and the number of groups.
    """
    check_groups(problem, groups)
    check_k(groups, k)
    return _magnitude(problem, groups, k, tol)


def brute_force(problem: Problem, groups: Groups, k: int, tol: float | None = None, batch: int = 64) -> Selection:
    """The best of all supports of `k` groups.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      k: how many groups.
      tol: of each minimisation.
      batch: supports tried at a time.

    Raises:
      ValueError: if `k` does not fit the groups or there are more than 200,000 supports.
    """
    check_groups(problem, groups)
    check_k(groups, k)
    count = math.comb(groups.count, k)
    if count > _MOST_SUPPORTS:
        raise ValueError(
            f"{k} of {groups.count} groups make {count:,} supports, more than {_MOST_SUPPORTS:,}: use omp or ompr"
        )
    return _best_of(problem, groups, jnp.asarray(supports(groups.count, k)), tol, batch)


def from_group_lasso(
    problem: Problem, groups: Groups, k: int, count: int = 40, ratio: float = 1e-3, tol: float | None = 1e-4
) -> Selection:
    """The first `k` groups on a group LASSO path, with the loss then minimised over those.

    If the path jumps from fewer than `k` groups to more, those of largest norm are taken.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      k: how many groups.
      count: lambdas on the path.
      ratio: last to first lambda.
      tol: of the path's solutions, as for `group_lasso.solve`.
    """
    check_groups(problem, groups)
    check_k(groups, k)
    grid = group_lasso.lambda_grid(problem, groups, count, ratio)
    solutions = group_lasso.path(problem, groups, grid, tol)
    lengths = jax.vmap(functools.partial(norms, groups))(solutions.coefficients)
    enough = jnp.sum(lengths > 0, axis=1) >= k
    at = jnp.where(jnp.any(enough), jnp.argmax(enough), count - 1)
    kept = _kept(problem, groups, select.top_k(lengths[at], k), solutions.coefficients[at], None)
    return kept._replace(converged=kept.converged & solutions.converged[at])


def supports(count: int, k: int) -> np.ndarray:
    """Masks of all supports of `k` of `count` groups, `(number, count)`.

    Args:
      count: number of groups.
      k: size of a support.
    """
    index = np.array(list(itertools.combinations(range(count), k)))
    masks = np.zeros((len(index), count), bool)
    np.put_along_axis(masks, index, True, axis=1)
    return masks


def random_support(key: jax.Array, count: int, k: int | jax.Array) -> jax.Array:
    """A mask of `k` of `count` groups, drawn uniformly.

    Args:
      key: a `jax.random.key`.
      count: number of groups.
      k: size of the support, may be traced.
    """
    return select.top_k(jax.random.uniform(key, (count,)), k)


def as_support(groups: Groups, chosen: Sequence[int]) -> jax.Array:
    """The mask of some groups given by their numbers.

    Args:
      groups: how the coefficients are grouped.
      chosen: their numbers, from 0.
    """
    index = np.asarray(chosen, int)
    if index.size and (index.min() < 0 or index.max() >= groups.count):
        raise ValueError(f"groups are numbered 0 to {groups.count - 1}, got {sorted(int(i) for i in index)}")
    return jnp.zeros(groups.count, bool).at[index].set(True)


def check_k(groups: Groups, k: int) -> None:
    """Raise ValueError if `k` is not a valid number of groups.

    Args:
      groups: how the coefficients are grouped.
      k: how many are to be kept.
    """
    if not 1 <= k <= groups.count:
        raise ValueError(f"k must be between 1 and the number of groups, {groups.count}; got {k}")


@functools.partial(jax.jit, static_argnames="k")
def _omp(problem: Problem, groups: Groups, k: int, tol: float | None) -> Selection:
    def step(state: _Pair, _: None) -> tuple[_Pair, _Triple]:
        support, beta = state
        gradient = norms(groups, jax.grad(problem.value)(beta))
        enters = jnp.argmax(jnp.where(support, -1, gradient))
        support = support | (jnp.arange(groups.count) == enters)
        found = refit(problem, groups, support, beta, tol)
        return (support, found.coefficients), (found.value, enters, found.converged)

    start = jnp.zeros(groups.count, bool), problem.origin
    (support, beta), (values, entered, converged) = lax.scan(step, start, length=k)
    return Selection(support, beta, values[-1], values, entered, jnp.all(converged))


@functools.partial(jax.jit, static_argnames=("rounds", "ratio"))
def _ompr(
    problem: Problem, groups: Groups, support: jax.Array, rounds: int, ratio: float | None, tol: float | None
) -> Selection:
    number = jnp.arange(groups.count)
    gradient = jax.grad(problem.value)
    first = support, refit(problem, groups, support, None, tol)

    def swap(support: jax.Array, beta: jax.Array) -> _Pair:
        outside = jnp.where(support, -1, norms(groups, gradient(beta)))
        inside = norms(groups, beta)
        if ratio is not None:
            lam = jnp.where(support, 0, ratio * jnp.max(outside))
            inside = norms(groups, group_lasso.solve(problem, groups, lam, beta).coefficients)
            outside = jnp.where(support, -1, inside)
        enters, leaves = jnp.argmax(outside), jnp.argmin(jnp.where(support, inside, jnp.inf))
        return (support | (number == enters)) & (number != leaves), enters

    def step(state: _Chain, _: None) -> tuple[_Chain, _Triple]:
        (support, found), best = state
        support, enters = swap(support, found.coefficients)
        found = refit(problem, groups, support, found.coefficients, tol)
        better = found.value < best[1].value
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (support, found), best)
        return ((support, found), best), (found.value, enters, found.converged)

    (_, (support, best)), (values, entered, converged) = lax.scan(step, (first, first), length=rounds)
    values = jnp.concatenate([first[1].value[None], values])
    converged = jnp.all(converged) & first[1].converged
    return Selection(support, best.coefficients, best.value, values, entered, converged)


@functools.partial(jax.jit, static_argnames="steps")
def _iht(problem: Problem, groups: Groups, k: int, steps: int, start: jax.Array, tol: float | None) -> Selection:
    scaled, units = in_units(problem)

    def threshold(x: jax.Array) -> jax.Array:
        return spread(groups, select.top_k(norms(groups, x), k).astype(x.dtype)) * x

    def step(state: _Pair, _: None) -> tuple[_Pair, jax.Array]:
        beta, c = state
        c, new = proximal_step(scaled.value, beta, c, lambda here, c: threshold(beta - here / c))[:2]
        return (new, 0.95 * c), scaled.value(new)

    first = threshold(start / units.x)
    (beta, _), values = lax.scan(step, (first, curvature_along_gradient(scaled.value, first)), length=steps)
    support = select.top_k(norms(groups, beta), k)
    return _kept(problem, groups, support, beta * units.x, tol)._replace(values=values * units.value)


@jax.jit
def _magnitude(problem: Problem, groups: Groups, k: int, tol: float | None) -> Selection:
    dense = refit(problem, groups, jnp.ones(groups.count, bool), None, tol)
    kept = _kept(problem, groups, select.top_k(norms(groups, dense.coefficients), k), dense.coefficients, tol)
    return kept._replace(converged=kept.converged & dense.converged)


@jax.jit
def _kept(problem: Problem, groups: Groups, support: jax.Array, beta: jax.Array, tol: float | None) -> Selection:
    found = refit(problem, groups, support, beta, tol)
    return Selection(support, found.coefficients, found.value, found.value[None], _NOTHING, found.converged)


@functools.partial(jax.jit, static_argnames="batch")
def _best_of(problem: Problem, groups: Groups, masks: jax.Array, tol: float | None, batch: int) -> Selection:
    def loss(mask: jax.Array) -> _Pair:
        found = refit(problem, groups, mask, None, tol)
        return found.value, found.converged

    values, converged = lax.map(loss, masks, batch_size=min(batch, masks.shape[0]))
    support = masks[jnp.argmin(values)]
    found = refit(problem, groups, support, None, tol)
    return Selection(support, found.coefficients, found.value, values, _NOTHING, jnp.all(converged))
