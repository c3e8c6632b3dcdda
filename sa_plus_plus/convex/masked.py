"""Differentiable pruning as regularisation: the masked problems of Hoff and of Lemmas 2.1 to 2.3.

Each minimises `L(effective(w, beta)) + lambda cost(w, beta)` over a mask `w` (one number per group) and coefficients
`beta`, and its minimum equals that of `L(u) + lambda factor sum_i q(||u_i||)`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import sa_plus_plus.convex.penalties as penalties
from sa_plus_plus.convex.descent import curvature_along_gradient, lbfgs
from sa_plus_plus.convex.group_lasso import check_groups, check_lambda
from sa_plus_plus.convex.groups import Groups, norms, scale
from sa_plus_plus.convex.lambert import lambert_w
from sa_plus_plus.convex.penalties import Penalty
from sa_plus_plus.convex.problems import Problem, gradient_at_zero
from sa_plus_plus.convex.scaling import norm


@dataclasses.dataclass(frozen=True)
class Masking:
    """A masked problem and the equivalent regularised problem.

    Attributes:
      name: of the problem.
      mask: `(groups, w, beta) -> (count,)`: the factor of each group of `beta`.
      cost: `(w, beta) -> scalar`.
      penalty: `q` of the regularised problem.
      factor: of `q`.
      best_mask: `||u_i|| -> w_i` of the minimiser; then `beta_i = u_i / multiplier(w_i)`.
      multiplier: `w -> factor from beta_i to u_i` at the minimiser.
      smooth_mask: the parametrisation `v -> w` used for descent, with `cost` smooth in `v`.
      smooth_inverse: `w -> v`.
    """

    name: str
    mask: Callable[[Groups, jax.Array, jax.Array], jax.Array]
    cost: Callable[[jax.Array, jax.Array], jax.Array]
    penalty: Penalty
    factor: float
    best_mask: Callable[[jax.Array], jax.Array]
    multiplier: Callable[[jax.Array], jax.Array] = lambda w: w
    smooth_mask: Callable[[jax.Array], jax.Array] = lambda v: v
    smooth_inverse: Callable[[jax.Array], jax.Array] = lambda w: w

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Masking) and self.name == other.name


class Masked(NamedTuple):
    """The result of a solver.

    Attributes:
      w: mask variables, `(count,)`; as they were given for `own_norm`, which has none.
      beta: of the coefficients' shape.
      coefficients: the effective ones.
      value: objective of the masked problem.
      gradient_norm: at the end.
      steps: taken.
      converged: whether the gradient reached the tolerance.
    """

    w: jax.Array
    beta: jax.Array
    coefficients: jax.Array
    value: jax.Array
    gradient_norm: jax.Array
    steps: jax.Array
    converged: jax.Array


def _own_mask(groups: Groups, w: jax.Array, beta: jax.Array) -> jax.Array:
    return w


def hoff() -> Masking:
    """`L({w_i beta_i}) + lambda / 2 (||w||^2 + ||beta||^2)` is the group LASSO (Hoff 2017)."""
    return Masking(
        "hoff",
        _own_mask,
        lambda w, beta: (jnp.sum(jnp.square(w)) + jnp.sum(jnp.square(beta))) / 2,
        penalties.absolute(),
        1.0,
        lambda a: jnp.sqrt(a),
    )


def exponential() -> Masking:
    """`L({exp(w_i) beta_i}) + lambda (||w||^2 + ||beta||^2)` has `q = penalties.lambert()` (Lemma 2.1)."""
    return Masking(
        "exponential",
        lambda groups, w, beta: jnp.exp(w),
        lambda w, beta: jnp.sum(jnp.square(w)) + jnp.sum(jnp.square(beta)),
        penalties.lambert(),
        1.0,
        lambda a: lambert_w(2 * jnp.square(a)) / 2,
        multiplier=jnp.exp,
    )


def l1() -> Masking:
    """`L({w_i beta_i}) + lambda (||w||_1 + ||beta||^2)` has `(3/2) 2^{1/3} ||u_i||^{2/3}` (Lemma 2.2).

    Restricting `w` to nonnegative values does not change the minimum (flip `beta_i` instead), and `w = v^2` makes the
    cost smooth.
    """
    return Masking(
        "l1",
        _own_mask,
        lambda w, beta: jnp.sum(jnp.abs(w)) + jnp.sum(jnp.square(beta)),
        penalties.power(2 / 3),
        1.5 * 2 ** (1 / 3),
        lambda a: penalties.power(2 / 3).value(a) * 2 ** (1 / 3),
        smooth_mask=jnp.square,
        smooth_inverse=lambda w: jnp.sqrt(jnp.abs(w)),
    )


def own_norm() -> Masking:
    """`L({||beta_i|| beta_i}) + lambda ||beta||^2` is the group LASSO (Lemma 2.3, PowerPropagation by blocks)."""
    return Masking(
        "own_norm",
        lambda groups, w, beta: norms(groups, beta),
        lambda w, beta: jnp.sum(jnp.square(beta)),
        penalties.absolute(),
        1.0,
        lambda a: jnp.sqrt(a),
    )


def effective(masking: Masking, groups: Groups, w: jax.Array, beta: jax.Array) -> jax.Array:
    """The coefficients that the loss sees.

    Args:
      masking: how coefficients are masked.
      groups: how the coefficients are grouped.
      w: mask, `(count,)`.
      beta: coefficients, of the groups' shape.
    """
    return scale(groups, masking.mask(groups, w, beta), beta)


def objective(
    problem: Problem, groups: Groups, masking: Masking, lam: jax.Array | float, w: jax.Array, beta: jax.Array
) -> jax.Array:
    """`L(effective(w, beta)) + lambda cost(w, beta)`.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      masking: how coefficients are masked.
      lam: a scalar.
      w: mask, `(count,)`.
      beta: coefficients, of the groups' shape.
    """
    return problem.value(effective(masking, groups, w, beta)) + lam * masking.cost(w, beta)


def split(masking: Masking, groups: Groups, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `(w, beta)` of lowest cost with `effective(w, beta) = u`: the map between minimisers of the two problems.

    Args:
      masking: how coefficients are masked.
      groups: how the coefficients are grouped.
      u: effective coefficients, of the groups' shape.
    """
    lengths = norms(groups, u)
    w = masking.best_mask(lengths)
    mask = masking.multiplier(w)
    inverse = jnp.where(mask > 0, 1 / jnp.where(mask > 0, mask, 1), 0)
    return w, scale(groups, inverse, u)


def solve(
    problem: Problem,
    groups: Groups,
    masking: Masking,
    lam: jax.Array | float,
    w: jax.Array,
    beta: jax.Array,
    tol: float | None = None,
    max_steps: int = 1000,
) -> Masked:
    """A local minimiser of a masked problem over `(w, beta)`, by L-BFGS.

    A group that starts at `w_i = 0, beta_i = 0` stays there where the mask multiplies.

    Args:
      problem: the loss.
      groups: how its coefficients are grouped.
      masking: how coefficients are masked: `hoff()`, `exponential()`, `l1()`, `own_norm()`.
      lam: positive scalar.
      w: where the mask starts, `(count,)`; ones make `beta` the effective coefficients (zeros for `exponential`).
      beta: where the coefficients start.
      tol: on the gradient's 2-norm, relative to that of `lambda cost` where the effective coefficients are one gradient
        step of the loss from 0; by default 1e-10 in float64, 1e-5 in float32.
      max_steps: largest number of steps.

    Raises:
      ValueError: on a lambda that is not positive, or shapes that do not fit.
    """
    check_groups(problem, groups)
    check_lambda(lam)
    if w.shape != (groups.count,) or beta.shape != groups.shape:
        raise ValueError(
            f"w and beta must have shapes {(groups.count,)} and {groups.shape}, got {w.shape}, {beta.shape}"
        )
    tol = (1e-10 if beta.dtype.itemsize > 4 else 1e-5) if tol is None else tol
    return _solve(problem, groups, masking, jnp.asarray(lam, beta.dtype), w, beta, tol, max_steps)


@functools.partial(jax.jit, static_argnames=("masking", "max_steps"))
def _solve(
    problem: Problem,
    groups: Groups,
    masking: Masking,
    lam: jax.Array,
    w: jax.Array,
    beta: jax.Array,
    tol: jax.Array | float,
    max_steps: int,
) -> Masked:
    def fn(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        return objective(problem, groups, masking, lam, masking.smooth_mask(x[0]), x[1])

    def cost(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        return lam * masking.cost(masking.smooth_mask(x[0]), x[1])

    step = gradient_at_zero(problem) / curvature_along_gradient(problem.value, problem.origin)
    typical_w, typical_beta = split(masking, groups, -step)
    scale = norm(jax.grad(cost)((masking.smooth_inverse(typical_w), typical_beta)))
    end = lbfgs(fn, (masking.smooth_inverse(w), beta), tol=tol * scale, max_steps=max_steps)
    w, beta = masking.smooth_mask(end.x[0]), end.x[1]
    return Masked(w, beta, effective(masking, groups, w, beta), end.value, end.gradient_norm, end.steps, end.converged)
