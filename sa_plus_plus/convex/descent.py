"""Minimisation of a smooth function: optax's L-BFGS until the gradient is small, in one compiled loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax


class Minimum(NamedTuple):
    """Where a descent ended.

    Attributes:
      x: the point, a pytree.
      value: of the function there.
      gradient_norm: 2-norm of the gradient there.
      steps: taken.
    """

    x: Any
    value: jax.Array
    gradient_norm: jax.Array
    steps: jax.Array


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
    """Minimise `fn` from `x` by L-BFGS with a zoom line search.

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
        value, gradient = jax.value_and_grad(fn)(x)
        norm = optax.tree.norm(gradient)
        zero = jnp.zeros((), jnp.int32)
        state = _State(x, value, gradient, solver.init(x), x, value, norm, zero, zero)

        def body(s: _State) -> _State:
            updates, inner = solver.update(s.gradient, s.lbfgs, s.x, value=s.value, grad=s.gradient, value_fn=fn)
            x = optax.apply_updates(s.x, updates)
            value, gradient = jax.value_and_grad(fn)(x)
            norm = optax.tree.norm(gradient)
            slack = 8 * jnp.finfo(value.dtype).eps * jnp.abs(s.best_value)
            better = (value < s.best_value - slack) | ((value <= s.best_value + slack) & (norm < s.best_norm))
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), x, s.best)
            return _State(
                x,
                value,
                gradient,
                inner,
                best,
                jnp.where(better, value, s.best_value),
                jnp.where(better, norm, s.best_norm),
                jnp.where(better, 0, s.stalled + 1),
                s.step + 1,
            )

        def go_on(s: _State) -> jax.Array:
            return (s.best_norm > tol) & (s.step < max_steps) & (s.stalled < 5) & jnp.isfinite(s.value)

        end = lax.while_loop(go_on, body, state)
        return Minimum(end.best, end.best_value, end.best_norm, end.step)


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


def curvature_along_gradient(fn: Callable[[jax.Array], jax.Array], at: jax.Array) -> jax.Array:
    """Second derivative of `fn` along its gradient, 1 where that is 0: a first curvature for `proximal_step`.

    Args:
      fn: a scalar function, twice differentiable.
      at: where.
    """
    gradient = jax.grad(fn)
    g = gradient(at)
    length = jnp.sqrt(jnp.sum(jnp.square(g)))
    direction = g / jnp.where(length > 0, length, 1)
    along = jnp.sum(direction * jax.jvp(gradient, (at,), (direction,))[1])
    return jnp.where(along > 0, along, 1).astype(at.dtype)
