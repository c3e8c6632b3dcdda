"""Minimisation of a smooth function: optax's L-BFGS until the gradient is small, in one compiled loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial

from sa_plus_plus.convex.problems import Problem
from sa_plus_plus.convex.scaling import norm, power_of_two


class Minimum(NamedTuple):
    """Where a descent ended.

    Attributes:
      x: the point, a pytree.
      value: of the function there.
      gradient_norm: 2-norm of the gradient there.
      steps: taken.
      converged: whether the gradient reached the tolerance.
    """

    x: Any
    value: jax.Array
    gradient_norm: jax.Array
    steps: jax.Array
    converged: jax.Array


class Units(NamedTuple):
    """Units for a function, powers of two: in these its gradient and the curvature along it are about 1 at one point.

    Attributes:
      x: of its argument.
      value: of its value.
    """

    x: jax.Array
    value: jax.Array


class _State(NamedTuple):
    x: Any
    value: jax.Array
    gradient: Any
    lbfgs: Any
    best: Any
    best_value: jax.Array
    best_norm: jax.Array
    stalled: jax.Array
    step: jax.Array


def lbfgs(
    fn: Callable[[Any], jax.Array], x: Any, tol: float | jax.Array = 1e-9, max_steps: int = 500, memory: int = 10
) -> Minimum:
    """Minimise `fn` from `x` by L-BFGS with a zoom line search, in units in which the first step has length 1.

    Args:
      fn: a smooth function of a pytree; a scalar.
      x: where to start.
      tol: stop when the gradient's 2-norm is at most this.
      max_steps: largest number of steps; five steps without a gain also end the descent.
      memory: pairs kept.

    Returns:
      The best point found. Supports `jit` and `vmap` (which runs all until the last is done).
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax mixes dtypes
        solver = optax.lbfgs(memory_size=memory, linesearch=optax.scale_by_zoom_linesearch(30))
        units = units_at(fn, x)
        scaled = Partial(_in_units, Partial(fn), *units)
        tol = tol * (units.x / units.value)
        x = jax.tree.map(lambda a: a / units.x, x)
        value, gradient = jax.value_and_grad(scaled)(x)
        zero = jnp.zeros((), jnp.int32)
        state = _State(x, value, gradient, solver.init(x), x, value, norm(gradient), zero, zero)

        def body(s: _State) -> _State:
            updates, inner = solver.update(s.gradient, s.lbfgs, s.x, value=s.value, grad=s.gradient, value_fn=scaled)
            x = optax.apply_updates(s.x, updates)
            value, gradient = jax.value_and_grad(scaled)(x)
            steepness = norm(gradient)
            slack = 8 * jnp.finfo(value.dtype).eps * jnp.abs(s.best_value)
            better = (value < s.best_value - slack) | ((value <= s.best_value + slack) & (steepness < s.best_norm))
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), x, s.best)
            return _State(
                x,
                value,
                gradient,
                inner,
                best,
                jnp.where(better, value, s.best_value),
                jnp.where(better, steepness, s.best_norm),
                jnp.where(better, 0, s.stalled + 1),
                s.step + 1,
            )

        def go_on(s: _State) -> jax.Array:
            return (s.best_norm > tol) & (s.step < max_steps) & (s.stalled < 5) & jnp.isfinite(s.value)

        end = lax.while_loop(go_on, body, state)
        best = jax.tree.map(lambda a: a * units.x, end.best)
        steepness = end.best_norm * (units.value / units.x)
        return Minimum(best, end.best_value * units.value, steepness, end.step, end.best_norm <= tol)


def units_at(fn: Callable[[Any], jax.Array], at: Any) -> Units:
    """`x = ||g|| / c` and `value = ||g||^2 / c`, rounded, for the gradient `g` and the curvature `c` along it.

    Args:
      fn: a scalar function of a pytree, twice differentiable.
      at: where.
    """
    steepness, curvature = norm(jax.grad(fn)(at)), curvature_along_gradient(fn, at)
    x = power_of_two(steepness / curvature)
    return Units(x, power_of_two(steepness * x))


def in_units(problem: Problem) -> tuple[Problem, Units]:
    """The problem in units of its own at 0, `L(x z) / value`, so that solvers see the same for any scale of the data.

    Args:
      problem: the loss.
    """
    units = units_at(problem.value, problem.origin)
    return Problem(Partial(_in_units, problem.value, *units), problem.origin), units


def _in_units(fn: Callable[[Any], jax.Array], unit: jax.Array, of_value: jax.Array, x: Any) -> jax.Array:
    return fn(jax.tree.map(lambda a: a * unit, x)) / of_value


def proximal_step(
    fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    curvature: jax.Array,
    candidate: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of a proximal method; the curvature is doubled until the quadratic model bounds `fn`.

    Near the minimum, differences of `fn` are lost to rounding, so the difference of the gradients along the step counts
    too.

    Args:
      fn: smooth.
      x: where the step starts.
      curvature: the first value to try.
      candidate: `(gradient, curvature) -> point`.

    Returns:
      The accepted curvature, the point, and the gradient there.
    """
    value_and_grad = jax.value_and_grad(fn)
    value, here = value_and_grad(x)
    eps = jnp.finfo(x.dtype).eps
    slack = jnp.sqrt(eps) / 8 * jnp.abs(value)

    def attempt(c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        new = candidate(here, c)
        reached, there = value_and_grad(new)
        move = new - x
        length = jnp.sum(jnp.square(move))
        noise = length <= jnp.square(4 * eps) * jnp.sum(jnp.square(new))
        bounded = reached <= value + jnp.sum(here * move) + c / 2 * length + slack
        steep = jnp.sum((there - here) * move) <= 1.001 * c * length
        return c, new, there, noise | (bounded & steep) | (c > 1e30)

    end = lax.while_loop(lambda s: ~s[3], lambda s: attempt(2 * s[0]), attempt(curvature))
    return end[0], end[1], end[2]


def curvature_along_gradient(fn: Callable[[Any], jax.Array], at: Any) -> jax.Array:
    """Second derivative of `fn` along its gradient, 1 where that is not positive: a first one for `proximal_step`.

    Args:
      fn: a scalar function of a pytree, twice differentiable.
      at: where.
    """
    gradient = jax.grad(fn)
    g = gradient(at)
    length = norm(g)
    direction = jax.tree.map(lambda a: a / jnp.where(length > 0, length, 1), g)
    image = jax.jvp(gradient, (at,), (direction,))[1]
    along = sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(direction), jax.tree.leaves(image), strict=True))
    return jnp.where(along > 0, along, 1).astype(length.dtype)
