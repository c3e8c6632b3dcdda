"""The group LASSO by accelerated proximal gradient steps with restart, for any convex problem.

minimise  L(beta) + lambda sum_i ||beta_i||
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sa_plus_plus import blocks
from sa_plus_plus.convex.descent import Units, curvature_along_gradient, in_units, proximal_step
from sa_plus_plus.convex.groups import Groups, norms, scale, spread
from sa_plus_plus.convex.problems import Problem, gradient_at_zero


class Solution(NamedTuple):
    """The result of a solver.

    Attributes:
      coefficients: of the problem's shape; groups that are zero are exactly so.
      value: objective there, penalty included.
      residual: violation of the optimality conditions, relative to `critical_lambda`.
      steps: taken.
      converged: whether `residual` reached the tolerance.
    """

    coefficients: jax.Array
    value: jax.Array
    residual: jax.Array
    steps: jax.Array
    converged: jax.Array


class _State(NamedTuple):
    beta: jax.Array
    ahead: jax.Array
    momentum: jax.Array
    curvature: jax.Array
    residual: jax.Array
    step: jax.Array


def critical_lambda(problem: Problem, groups: Groups) -> jax.Array:
    """`tau = max_i ||grad L(0)_i||`: from this value up the minimiser is 0 (Theorem 1.1).

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
    """
    return jnp.max(norms(groups, gradient_at_zero(problem)))


def objective(problem: Problem, groups: Groups, lam: jax.Array | float, beta: jax.Array) -> jax.Array:
    """`L(beta) + lambda sum_i ||beta_i||`; `lam` is a scalar or one value per group.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      lam: a scalar, or one value a group.
      beta: coefficients, of the groups' shape.
    """
    return problem.value(beta) + jnp.sum(lam * norms(groups, beta))


def kkt_residual(groups: Groups, lam: jax.Array | float, beta: jax.Array, gradient: jax.Array) -> jax.Array:
    """Distance of the subgradient's nearest element from 0, the largest over the groups.

        ||g_i + lambda beta_i / ||beta_i|| ||  where beta_i is not 0,   max(||g_i|| - lambda, 0)  where it is

    Args:
      groups: how the coefficients are grouped.
      lam: a scalar, or one value a group.
      beta: coefficients, of the groups' shape.
      gradient: of the loss at `beta`, of the same shape.
    """
    length = norms(groups, beta)
    weight = jnp.where(length > 0, lam / jnp.where(length > 0, length, 1), 0)
    inside = norms(groups, gradient + spread(groups, weight) * beta)
    outside = jnp.maximum(norms(groups, gradient) - lam, 0)
    return jnp.max(jnp.where(length > 0, inside, outside))


def duality_gap(problem: Problem, groups: Groups, lam: jax.Array | float, beta: jax.Array) -> jax.Array:
    """An upper bound on how far the objective at `beta` is above its minimum.

    The dual point is the residual; without a ridge it is scaled until it is feasible.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      lam: a scalar, or one value a group.
      beta: coefficients, of the groups' shape.

    Raises:
      ValueError: for a problem made by `problems.function`, whose dual is not known.
    """
    if problem.dual is None:
        raise ValueError("a duality gap needs a loss whose dual is known; for any other use kkt_residual")
    dual = problem.dual
    z = dual.predict(beta)
    toward = norms(groups, dual.transpose(jax.grad(dual.loss)(z)))
    free = jnp.where(dual.ridge > 0, 1.0, 0.0).astype(z.dtype)
    c = jnp.minimum(1, jnp.min(lam / jnp.maximum(toward, jnp.finfo(z.dtype).tiny)))
    c = free + (1 - free) * c
    over = jnp.sum(jnp.square(jnp.maximum(c * toward - lam, 0)))
    ridge_conjugate = jnp.where(dual.ridge > 0, over / (2 * jnp.where(dual.ridge > 0, dual.ridge, 1)), 0)
    return objective(problem, groups, lam, beta) + dual.conjugate(z, c) + ridge_conjugate


def solve(
    problem: Problem,
    groups: Groups,
    lam: jax.Array | float,
    start: jax.Array | None = None,
    tol: float | None = None,
    max_steps: int = 20_000,
) -> Solution:
    """The group LASSO's minimiser by FISTA with backtracking and adaptive restart.

    Args:
      problem: the loss, coefficients of shape `S`.
      groups: how the coefficients, of the shape of `S`, are grouped.
      lam: positive; a scalar, or one value per group, `(count,)`, which may be 0 for unpenalised groups.
      start: where to begin, of shape `S`; 0 if None.
      tol: on the largest violation of the optimality conditions, relative to `critical_lambda`. By default 1e-9 in
        float64 and 2e-5 in float32.
      max_steps: of the loop, each one gradient and a line search.

    Returns:
      A `Solution`. Supports `jit`, and `vmap` over `lam`, `start` and the problem's data.

    Raises:
      ValueError: if `lam` is not positive and finite, or groups and problem differ in shape.
    """
    check_groups(problem, groups)
    check_lambda(lam)
    tol = default_tolerance(problem) if tol is None else tol
    lam = jnp.asarray(lam, problem.origin.dtype)
    return _solve(problem, groups, lam, problem.origin if start is None else start, tol, max_steps)


def path(
    problem: Problem,
    groups: Groups,
    lams: jax.Array,
    tol: float | None = None,
    max_steps: int = 20_000,
) -> Solution:
    """Solutions for many lambdas, each started from the previous one, in one program.

    Args:
      problem: the loss.
      groups: how the coefficients are grouped.
      lams: `(k,)`, best in decreasing order; `lambda_grid` makes them.
      tol: as of `solve`.
      max_steps: for each lambda.

    Returns:
      A `Solution` whose arrays have a leading axis of length `k`. For least squares with many lambdas
      `least_squares_path` is much faster.
    """
    check_groups(problem, groups)
    check_lambda(lams)
    tol = default_tolerance(problem) if tol is None else tol
    return _path(problem, groups, jnp.asarray(lams, problem.origin.dtype), tol, max_steps)


def lambda_grid(problem: Problem, groups: Groups, count: int = 100, ratio: float = 1e-2) -> jax.Array:
    """`count` lambdas from `critical_lambda` down to `ratio` of it, evenly spaced in logarithm.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      count: of lambdas, at least 2.
      ratio: of the last to the first, in (0, 1).
    """
    check_grid(count, ratio)
    steps = jnp.linspace(0, 1, count, dtype=problem.origin.dtype)
    return critical_lambda(problem, groups) * jnp.exp(math.log(ratio) * steps)


def check_grid(count: int, ratio: float) -> None:
    """Raise ValueError unless `count` and `ratio` describe a grid of lambdas.

    Args:
      count: number of lambdas.
      ratio: the last lambda over the first.
    """
    if count < 2 or not 0 < ratio < 1:
        raise ValueError(f"a path takes at least 2 lambdas and a ratio in (0, 1), got {count} and {ratio}")


def default_tolerance(problem: Problem) -> float:
    """Default tolerance of the relative optimality conditions: 1e-9 in float64, 2e-5 in float32.

    Args:
      problem: the loss; its dtype decides.
    """
    return 1e-9 if problem.origin.dtype.itemsize > 4 else 2e-5


def check_groups(problem: Problem, groups: Groups) -> None:
    """Raise ValueError if groups are not those of the problem's coefficients.

    Args:
      problem: the loss.
      groups: to be compared with its coefficients.
    """
    if groups.shape != problem.origin.shape:
        raise ValueError(
            f"the groups are of coefficients of shape {groups.shape}, the problem's have {problem.origin.shape}: make "
            "the groups for that shape"
        )


def check_lambda(lam: jax.Array | np.ndarray | float) -> None:
    """Raise ValueError if a lambda is not positive (some may be 0 if given per group) or not finite.

    Args:
      lam: a scalar, or one value a group.
    """
    if isinstance(lam, jax.core.Tracer):
        return
    values = jnp.asarray(lam)
    if not bool(jnp.isfinite(values).all()) or not bool((values >= 0).all()) or not bool((values > 0).any()):
        raise ValueError(f"lambda must be positive and finite, got {lam}; with lambda 0 there is nothing to select")
    if values.ndim == 0 and not float(values) > 0:
        raise ValueError(f"lambda must be positive, got {lam}")


@functools.partial(jax.jit, static_argnames="max_steps")
def _path(problem: Problem, groups: Groups, lams: jax.Array, tol: float, max_steps: int) -> Solution:
    scaled, units = in_units(problem)

    def step(beta: jax.Array, lam: jax.Array) -> tuple[jax.Array, Solution]:
        solution = _descended(scaled, groups, lam, beta, tol, max_steps)
        return solution.coefficients, solution

    return _back(lax.scan(step, problem.origin, lams * (units.x / units.value))[1], units)


@functools.partial(jax.jit, static_argnames="max_steps")
def _solve(
    problem: Problem, groups: Groups, lam: jax.Array, start: jax.Array, tol: jax.Array | float, max_steps: int
) -> Solution:
    scaled, units = in_units(problem)
    lam = lam * (units.x / units.value)
    return _back(_descended(scaled, groups, lam, start / units.x, tol, max_steps), units)


def _back(solution: Solution, units: Units) -> Solution:
    """The solution in the units of the problem as it was given."""
    return solution._replace(coefficients=solution.coefficients * units.x, value=solution.value * units.value)


def _descended(
    problem: Problem, groups: Groups, lam: jax.Array, start: jax.Array, tol: jax.Array | float, max_steps: int
) -> Solution:
    dtype = problem.origin.dtype
    gradient = jax.grad(problem.value)
    tau = critical_lambda(problem, groups)
    unit = jnp.where(tau > 0, tau, 1)  # of residuals

    def candidate(ahead: jax.Array, here: jax.Array, c: jax.Array) -> jax.Array:
        return shrink(groups, ahead - here / c, lam / c)

    def body(s: _State) -> _State:
        step = functools.partial(candidate, s.ahead)
        curvature, beta, there = proximal_step(problem.value, s.ahead, s.curvature, step)
        # O'Donoghue and Candes: restart when the step points against the momentum
        restart = jnp.sum((s.ahead - beta) * (beta - s.beta)) > 0
        momentum = jnp.where(restart, 1, (1 + jnp.sqrt(1 + 4 * s.momentum**2)) / 2)
        ahead = beta + jnp.where(restart, 0, (s.momentum - 1) / momentum) * (beta - s.beta)
        residual = kkt_residual(groups, lam, beta, there)
        return _State(beta, ahead, momentum, 0.98 * curvature, residual, s.step + 1)

    def go_on(s: _State) -> jax.Array:
        return (s.residual > tol * unit) & (s.step < max_steps)

    one = jnp.ones((), dtype)
    first = kkt_residual(groups, lam, start, gradient(start))
    state = _State(start, start, one, curvature_along_gradient(problem.value, start), first, jnp.zeros((), jnp.int32))
    end = lax.while_loop(go_on, body, state)
    return Solution(
        end.beta, objective(problem, groups, lam, end.beta), end.residual / unit, end.step, end.residual <= tol * unit
    )


def shrink(groups: Groups, beta: jax.Array, t: jax.Array) -> jax.Array:
    """Proximal operator of `sum_i t_i ||beta_i||`.

    Args:
      groups: how the coefficients are grouped.
      beta: coefficients, of the groups' shape.
      t: `(count,)`, or a scalar.
    """
    return scale(groups, blocks.soft_threshold(norms(groups, beta), t), beta)
