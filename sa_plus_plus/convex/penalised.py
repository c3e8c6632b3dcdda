"""Problems with a non-convex group penalty, and Theorem 1.1's shortcut. There are two forms:

    sum:         L(beta) + lambda sum_i q(||beta_i||)
    composite:   L(beta) + lambda q^{-1}(sum_i q(||beta_i||))

The second is the paper's objective (1).
"""

import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

import sa_plus_plus.convex.group_lasso as group_lasso
from sa_plus_plus.convex.descent import curvature_along_gradient, in_units, lbfgs, proximal_step
from sa_plus_plus.convex.group_lasso import Solution, check_groups, check_lambda
from sa_plus_plus.convex.groups import Groups, norms, spread
from sa_plus_plus.convex.penalties import Penalty, in_unit, prox, shrink_by_search
from sa_plus_plus.convex.problems import Problem

Form = Literal["sum", "composite"]


class OneGroup(NamedTuple):
    """The conclusion of Theorem 1.1 for objective (1).

    Attributes:
      solution: of the group LASSO, with the value of objective (1).
      active: number of non-zero groups.
      applies: whether the solver converged to at most one group, within the range where `q` increases: then the
        solution is the unique minimiser of objective (1) as well, where it is that of the group LASSO.
    """

    solution: Solution
    active: jax.Array
    applies: jax.Array


def regulariser(penalty: Penalty, form: Form, lengths: jax.Array) -> jax.Array:
    """`sum q` or `q^{-1}(sum q)` of the groups' norms `(count,)`; infinite where the sum reaches `q`'s ceiling.

    Args:
      penalty: `q`.
      form: `"sum"` or `"composite"`.
      lengths: norms of the groups, `(count,)`.
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    total = jnp.sum(penalty.value(lengths))
    return total if form == "sum" else penalty.inverse(total)


def objective(
    problem: Problem, groups: Groups, penalty: Penalty, lam: jax.Array | float, beta: jax.Array, form: Form
) -> jax.Array:
    """`L(beta)` plus lambda times the regulariser.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      penalty: `q`.
      lam: a scalar.
      beta: coefficients, of the groups' shape.
      form: `"sum"` or `"composite"`.
    """
    return problem.value(beta) + lam * regulariser(penalty, form, norms(groups, beta))


def solve(
    problem: Problem,
    groups: Groups,
    penalty: Penalty,
    lam: jax.Array | float,
    form: Form = "sum",
    start: jax.Array | None = None,
    tol: float | None = None,
    max_steps: int = 500,
    polished: bool = True,
) -> Solution:
    """A local minimiser: proximal descent, then L-BFGS on the groups that are left.

    `sum` updates all groups at once. `composite` goes from group to group: with the others fixed, the regulariser is a
    function of one norm, whose proximal operator is found by a search over its whole range. Neither
    problem is convex: start from several places (`vmap` over `start`).

    Args:
      problem: the loss, coefficients of shape `S`.
      groups: how the coefficients, of the shape of `S`, are grouped.
      penalty: `q`.
      lam: positive scalar.
      form: which of the two objectives.
      start: of shape `S`; 0 if None.
      tol: the descent stops when a step (a sweep over the groups) moves the coefficients by less than this, relatively;
        by default 1e-8 in float64, 1e-5 in float32. The polished point's gradient, relative to `critical_lambda`, is
        reported as `residual`.
      max_steps: steps or sweeps.
      polished: whether L-BFGS follows; without it `residual` is the last step's relative length.

    Raises:
      ValueError: on a lambda that is not positive, groups of another shape, an unknown form.
    """
    check_groups(problem, groups)
    check_lambda(lam)
    dtype = problem.origin.dtype
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    tol = (1e-8 if dtype.itemsize > 4 else 1e-5) if tol is None else tol
    start = problem.origin if start is None else start
    return _solve(problem, groups, penalty, jnp.asarray(lam, dtype), form, start, tol, max_steps, polished)


def one_group(
    problem: Problem, groups: Groups, penalty: Penalty, lam: jax.Array | float, tol: float | None = None
) -> OneGroup:
    """Objective (1) solved through the group LASSO, where Theorem 1.1 allows it.

    Since `q` is subadditive, `q^{-1}(sum q(x_i)) >= sum x_i` with equality at one group: a group LASSO minimiser of at
    most one group minimises objective (1) too.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      penalty: `q`, subadditive and increasing.
      lam: positive scalar, close enough below `group_lasso.critical_lambda`, or above.
      tol: as for `group_lasso.solve`.

    Returns:
      A `OneGroup`; check `applies`.

    Raises:
      ValueError: if the penalty is not subadditive.
    """
    require_subadditive(penalty)
    solution = group_lasso.solve(problem, groups, lam, tol=tol)
    lengths = norms(groups, solution.coefficients)
    active = jnp.sum(lengths > 0)
    applies = solution.converged & (active <= 1) & (jnp.max(lengths) < penalty.increasing_to)
    value = objective(problem, groups, penalty, lam, solution.coefficients, "composite")
    return OneGroup(solution._replace(value=value), active, applies)


def require_subadditive(penalty: Penalty) -> None:
    """Raise ValueError for a penalty that Theorem 1.1 does not cover.

    Args:
      penalty: `q`.
    """
    if not penalty.subadditive:
        raise ValueError(
            f"Theorem 1.1 needs a subadditive penalty, and {penalty.name} is not one: its objective (1) may have a "
            "lower minimum than the group LASSO's solution; use penalised.solve, or absolute, power, log"
        )


@functools.partial(jax.jit, static_argnames=("penalty", "form", "max_steps", "polished"))
def _solve(
    problem: Problem,
    groups: Groups,
    penalty: Penalty,
    lam: jax.Array,
    form: Form,
    start: jax.Array,
    tol: jax.Array | float,
    max_steps: int,
    polished: bool,
) -> Solution:
    if form == "composite" and math.isfinite(penalty.ceiling):  # shrink the start to where the objective is finite
        total = jnp.sum(norms(groups, start))
        start = start * jnp.minimum(1, 0.9 * penalty.ceiling / jnp.where(total > 0, total, 1))
    problem, units = in_units(problem)
    start, penalty = start / units.x, in_unit(penalty, units.x)
    lam = lam / units.value * (units.x if form == "composite" else 1)
    step = _all_at_once if form == "sum" else _group_by_group
    curvature = curvature_along_gradient(problem.value, start)

    def body(
        state: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        beta, c, _, n = state
        new, c = step(problem, groups, penalty, lam, beta, c)
        change = jnp.sqrt(jnp.sum(jnp.square(new - beta)))
        return new, c, change / (jnp.sqrt(jnp.sum(jnp.square(new))) + jnp.finfo(c.dtype).tiny), n + 1

    def go_on(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        beta, _, change, n = state
        return (change > tol) & (n < max_steps) & ((n == 0) | jnp.any(beta != 0))

    first = (start, curvature, jnp.asarray(jnp.inf, start.dtype), jnp.zeros((), jnp.int32))
    beta, _, change, steps = lax.while_loop(go_on, body, first)
    value, residual = objective(problem, groups, penalty, lam, beta, form), change
    if polished:
        beta, value, steepness = polish(problem, groups, penalty, lam, form, beta)
        tau = group_lasso.critical_lambda(problem, groups)
        residual = steepness / jnp.where(tau > 0, tau, 1)
    return Solution(beta * units.x, value * units.value, residual, steps, (change <= tol) | ~jnp.any(beta != 0))


def polish(
    problem: Problem, groups: Groups, penalty: Penalty, lam: jax.Array | float, form: Form, beta: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """L-BFGS over the non-zero groups, where the objective is smooth: the point, its value and gradient norm.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      penalty: `q`.
      lam: a scalar.
      form: `"sum"` or `"composite"`.
      beta: where to start; its groups of zeros stay zero.
    """
    alive = norms(groups, beta) > 0
    mask = spread(groups, alive.astype(beta.dtype))

    def smooth(x: jax.Array) -> jax.Array:
        lengths = jnp.where(alive, norms(groups, x * mask), 0)
        return problem.value(x * mask) + lam * _regulariser_of(penalty, form, lengths, alive)

    end = lbfgs(smooth, beta, tol=1e-11 if beta.dtype.itemsize > 4 else 1e-5, max_steps=200)
    better = end.value <= objective(problem, groups, penalty, lam, beta, form)
    beta = jnp.where(better, end.x * mask, beta)
    return beta, objective(problem, groups, penalty, lam, beta, form), end.gradient_norm


def _regulariser_of(penalty: Penalty, form: Form, lengths: jax.Array, alive: jax.Array) -> jax.Array:
    """The regulariser with a finite gradient if one group or all groups are zero."""
    total = jnp.sum(jnp.where(alive, penalty.value(jnp.where(alive, lengths, 1)), 0))
    if form == "sum":
        return total
    some = jnp.any(alive)
    return jnp.where(some, penalty.inverse(jnp.where(some, total, min(penalty.ceiling, 2.0) / 2)), 0)


def _all_at_once(
    problem: Problem, groups: Groups, penalty: Penalty, lam: jax.Array, beta: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def candidate(gradient: jax.Array, c: jax.Array) -> jax.Array:
        return prox(penalty, groups, beta - gradient / c, lam / c)

    c, beta, _ = proximal_step(problem.value, beta, c, candidate)
    return beta, 0.95 * c


def _group_by_group(
    problem: Problem, groups: Groups, penalty: Penalty, lam: jax.Array, beta: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def one(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        beta, c = state
        mine = jnp.arange(groups.count) == i
        inside = spread(groups, mine)
        rest = jnp.sum(jnp.where(mine, 0, penalty.value(norms(groups, beta))))

        def regulariser(x: jax.Array) -> jax.Array:
            return penalty.inverse(rest + penalty.value(x))

        def slope(x: jax.Array) -> jax.Array:
            return penalty.derivative(x) / penalty.derivative(regulariser(x))

        def candidate(gradient: jax.Array, c: jax.Array) -> jax.Array:
            ahead = jnp.where(inside, beta - gradient / c, 0)
            length = jnp.sqrt(jnp.sum(jnp.square(ahead)))
            to = shrink_by_search(regulariser, slope, length[None], (lam / c)[None])[0]
            return jnp.where(inside, ahead * to / jnp.where(length > 0, length, 1), beta)

        c, beta, _ = proximal_step(problem.value, beta, c, candidate)
        return beta, 0.95 * c

    return lax.fori_loop(0, groups.count, one, (beta, c))
