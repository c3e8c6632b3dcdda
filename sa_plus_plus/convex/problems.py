"""Convex problems: a differentiable loss of one array of coefficients, with its dual if known.

A problem is a pytree of its data, so it can be an argument of a jitted function (the design matrix is not copied into
the program), and its `y` or ridge can be vmapped.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from sa_plus_plus.convex.scaling import power_of_two


class Problem(NamedTuple):
    """A convex loss `L`.

    Attributes:
      value: `L(beta)`, a `jax.tree_util.Partial` over the data.
      origin: zeros of the coefficients' shape and type.
      dual: the data for a duality gap, if the loss is a known one.
    """

    value: Partial
    origin: jax.Array
    dual: "Dual | None" = None


class Dual(NamedTuple):
    """The data for a duality gap of a loss `f(X beta) + ridge / 2 ||beta||^2`.

    Attributes:
      predict: `beta -> X beta`.
      transpose: `residual -> X' residual`, of the coefficients' shape.
      loss: `z -> f(z)`, convex.
      conjugate: `(z, c) -> f*(c * grad f(z))` for `0 <= c <= 1`.
      ridge: scalar.
    """

    predict: Partial
    transpose: Partial
    loss: Partial
    conjugate: Partial
    ridge: jax.Array


def function(value: Callable[..., jax.Array], shape: int | Sequence[int], *data: Any, dtype: Any = None) -> Problem:
    """Any convex differentiable function; its gradient is JAX's.

    Args:
      value: `(*data, beta) -> L(beta)`, a scalar.
      shape: of the coefficients.
      *data: first arguments of `value`. Arrays in a closure would become constants of the compiled program.
      dtype: of the coefficients; JAX's default floating type if None.

    Raises:
      ValueError: if `value` does not give a finite scalar at 0.
    """
    origin = jnp.zeros((shape,) if isinstance(shape, int) else tuple(shape), dtype or float)
    problem = Problem(Partial(value, *data), origin)
    out = jax.eval_shape(problem.value, origin)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"the loss must give a floating scalar, got {out} for coefficients of shape {origin.shape}")
    at_zero = problem.value(origin)
    if not isinstance(at_zero, jax.core.Tracer) and not np.isfinite(at_zero):
        raise ValueError(f"the loss at 0 is {float(at_zero)}: all starts and lambda's scale are taken from there")
    return problem


def least_squares(x: jax.Array, y: jax.Array, ridge: float = 0.0) -> Problem:
    """`||X beta - Y||^2 / (2 n) + ridge / 2 ||beta||^2`.

    Args:
      x: `(n, p)`.
      y: `(n,)`, or `(n, m)` for several responses, whose coefficients are `(p, m)`.
      ridge: not negative.

    Raises:
      ValueError: on shapes that do not fit, values that are not finite, a negative ridge.
    """
    x, y = _checked(x, y, ridge)
    if y.ndim not in (1, 2):
        raise ValueError(f"y must have shape (n,) or (n, responses), got {y.shape}")
    return _linear(x, squares_loss, _squares_conjugate, y, (x.shape[1], *y.shape[1:]), ridge)


def logistic(x: jax.Array, y: jax.Array, ridge: float = 0.0) -> Problem:
    """Mean of `log(1 + exp(-(2y - 1) x'beta))`, plus the ridge.

    Args:
      x: `(n, p)`.
      y: `(n,)`, of 0 and 1 in any type.
      ridge: not negative.

    Raises:
      ValueError: as for `least_squares`, or if `y` has other values.
    """
    x = jnp.asarray(x)
    y = jnp.asarray(y).astype(x.dtype)
    x, y = _checked(x, y, ridge)
    if y.ndim != 1:
        raise ValueError(f"y must have shape (n,), got {y.shape}; use multinomial for several classes")
    if not isinstance(y, jax.core.Tracer) and not np.isin(np.asarray(y), (0, 1)).all():
        wrong = np.asarray(y)[~np.isin(np.asarray(y), (0, 1))][0]
        raise ValueError(f"labels must be 0 or 1, got {wrong}")
    return _linear(x, logistic_loss, _logistic_conjugate, y, (x.shape[1],), ridge)


def multinomial(x: jax.Array, labels: jax.Array, classes: int, ridge: float = 0.0) -> Problem:
    """Mean cross-entropy of `softmax(x W')`, plus the ridge; the coefficients `W` are classes x features.

    Args:
      x: `(n, p)`.
      labels: `(n,)`, integers below `classes`.
      classes: how many.
      ridge: not negative.

    Raises:
      ValueError: as for `least_squares`, or if a label is not a class.
    """
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if not isinstance(labels, jax.core.Tracer) and ((labels < 0) | (labels >= classes)).any():
        wrong = np.asarray(labels)[np.asarray((labels < 0) | (labels >= classes))][0]
        raise ValueError(f"label {int(wrong)} is none of the {classes} classes 0 to {classes - 1}")
    x, y = _checked(x, jax.nn.one_hot(labels, classes, dtype=x.dtype), ridge)
    return _linear(x, softmax_loss, _softmax_conjugate, y, (classes, x.shape[1]), ridge)


def value_and_grad(problem: Problem) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """`beta -> (L(beta), gradient)`.

    Args:
      problem: the loss.
    """
    return jax.value_and_grad(problem.value)


def gradient_at_zero(problem: Problem) -> jax.Array:
    """`grad L(0)`, of the coefficients' shape.

    Args:
      problem: the loss.
    """
    return jax.grad(problem.value)(problem.origin)


def units_of_coefficients(problem: Problem) -> jax.Array:
    """For each coefficient, one over the largest entry of its column of `X`, a power of two; 1 if `X` is not known.

    Args:
      problem: the loss.
    """
    if problem.dual is None:
        return jnp.ones_like(problem.origin)
    (x,), by_rows = problem.dual.predict.args, problem.dual.predict.func is _predict_rows
    units = 1 / power_of_two(jnp.max(jnp.abs(x), axis=0))
    if problem.origin.ndim == 1:
        return units
    return jnp.broadcast_to(units[None] if by_rows else units[:, None], problem.origin.shape)


def _checked(x: jax.Array, y: jax.Array, ridge: float) -> tuple[jax.Array, jax.Array]:
    x, y = jnp.asarray(x), jnp.asarray(y)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"X must be floating point, got {x.dtype}; write X.astype(float)")
    if y.dtype != x.dtype:
        raise ValueError(f"X is {x.dtype} and y {y.dtype}: give both one floating type")
    if x.ndim != 2 or not x.size or y.ndim < 1 or y.shape[0] != x.shape[0]:
        raise ValueError(f"X must be (n, p) and y have n rows, got shapes {x.shape} and {y.shape}")
    for name, a in (("X", x), ("y", y)):
        if isinstance(a, jax.core.Tracer):
            continue
        # a sum is not finite where a term is not; it needs no array of flags as large as the data
        if not bool(_finite(a)):
            where = tuple(int(i[0]) for i in np.nonzero(~np.isfinite(np.asarray(a))))
            raise ValueError(f"{name} is not finite: {np.asarray(a)[where]} at {where}")
    if not isinstance(ridge, jax.core.Tracer) and not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge must be finite and not negative, got {ridge}")
    return x, y


@jax.jit
def _finite(a: jax.Array) -> jax.Array:
    return jnp.isfinite(a).all()  # fused: no array of flags


def _linear(
    x: jax.Array,
    loss: Callable[..., jax.Array],
    conjugate: Callable[..., jax.Array],
    y: jax.Array,
    shape: tuple[int, ...],
    ridge: float,
) -> Problem:
    ridge_ = jnp.asarray(ridge, x.dtype)
    by_rows = loss is softmax_loss
    predict = Partial(_predict_rows if by_rows else _predict, x)
    transpose = Partial(_transpose_rows if by_rows else _transpose, x)
    dual = Dual(predict, transpose, Partial(loss, y), Partial(conjugate, y), ridge_)
    return Problem(Partial(_value, dual), jnp.zeros(shape, x.dtype), dual)


def _value(dual: Dual, beta: jax.Array) -> jax.Array:
    return dual.loss(dual.predict(beta)) + jnp.sum(dual.ridge * beta * beta) / 2  # 0 for no ridge, whatever beta^2 is


def _predict(x: jax.Array, beta: jax.Array) -> jax.Array:
    return x @ beta


def _transpose(x: jax.Array, r: jax.Array) -> jax.Array:
    return jnp.tensordot(x, r, (0, 0))  # contracts the rows: no transposed copy


def _predict_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("np,cp->nc", x, w)


def _transpose_rows(x: jax.Array, r: jax.Array) -> jax.Array:
    return jnp.einsum("nc,np->cp", r, x)


def squares_loss(y: jax.Array, z: jax.Array) -> jax.Array:
    """`||z - y||^2 / (2 n)`.

    Args:
      y: labels, `(n,)` or `(n, responses)`.
      z: predictions, of the same shape.
    """
    return jnp.sum(jnp.square(z - y)) / (2 * y.shape[0])


def _squares_conjugate(y: jax.Array, z: jax.Array, c: jax.Array) -> jax.Array:
    n = y.shape[0]
    u = c * (z - y) / n  # f*(u) = <u, y> + n/2 ||u||^2
    return jnp.sum(u * y) + n / 2 * jnp.sum(jnp.square(u))


def logistic_loss(y: jax.Array, z: jax.Array) -> jax.Array:
    """`mean(log(1 + exp(z)) - y z)`.

    Args:
      y: labels 0 and 1, `(n,)`.
      z: logits, `(n,)`.
    """
    return jnp.mean(jnp.logaddexp(0, z) - y * z)


def _logistic_conjugate(y: jax.Array, z: jax.Array, c: jax.Array) -> jax.Array:
    q = y + c * (jax.nn.sigmoid(z) - y)  # n u = q - y, f*(u) = mean of q log q + (1 - q) log(1 - q)
    return jnp.mean(_x_log_x(q) + _x_log_x(1 - q))


def softmax_loss(y: jax.Array, z: jax.Array) -> jax.Array:
    """`mean(log sum_c exp(z_c) - y . z)`.

    Args:
      y: labels as one-hot rows, `(n, classes)`.
      z: logits, `(n, classes)`.
    """
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - jnp.sum(y * z, axis=1))


def _softmax_conjugate(y: jax.Array, z: jax.Array, c: jax.Array) -> jax.Array:
    q = y + c * (jax.nn.softmax(z, axis=1) - y)
    return jnp.mean(jnp.sum(_x_log_x(q), axis=1))


def _x_log_x(q: jax.Array) -> jax.Array:
    return jnp.where(q > 0, q * jnp.log(jnp.where(q > 0, q, 1)), 0)
