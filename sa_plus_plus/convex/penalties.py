"""Penalties of a group's norm: value, inverse, derivative and proximal operator of each.

A penalty is a function `q` on `[0, inf)` with `q(0) = 0`; the regulariser is `sum_i q(||beta_i||)` or, as in the
paper's objective (1), `q^{-1}(sum_i q(||beta_i||))`. Everything is elementwise and supports `jit` and `vmap`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sa_plus_plus.convex.groups import Groups, norms, scale
from sa_plus_plus.convex.lambert import lambert_w

Scalar = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Penalty:
    """A penalty `q` of a norm `x >= 0`.

    Attributes:
      name: with its parameters; penalties with the same name are the same function.
      value: `q(x)`.
      derivative: `q'(x)`, at 0 the limit from the right (which may be infinite).
      inverse: `q^{-1}(s)`; infinite if `s` is not below `ceiling`, the supremum of `q`.
      shrink: `(v, t) -> argmin_{x >= 0} (x - v)^2 / 2 + t q(x)` for `v, t >= 0` of one shape; the least of several.
      increasing_to: `q` is strictly increasing on `[0, increasing_to]`, which is everywhere for most.
      ceiling: supremum of `q`.
      subadditive: whether `q(x + y) <= q(x) + q(y)`.
      concave: whether `q` is concave.
    """

    name: str
    value: Scalar
    derivative: Scalar
    inverse: Scalar
    shrink: Callable[[jax.Array, jax.Array], jax.Array]
    increasing_to: float = math.inf
    ceiling: float = math.inf
    subadditive: bool = True
    concave: bool = True

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:  # by name: equal penalties compile once
        return isinstance(other, Penalty) and self.name == other.name


def prox(penalty: Penalty, groups: Groups, x: jax.Array, t: jax.Array | float) -> jax.Array:
    """Proximal operator of the group form.

        argmin_u ||u - x||^2 / 2 + t sum_i q(||u_i||)

    Each group keeps its direction; its norm is shrunk.

    Args:
      penalty: the penalty.
      groups: of `x`.
      x: of the groups' shape.
      t: step, a scalar or one value per group.
    """
    length = norms(groups, x)
    to = penalty.shrink(length, jnp.broadcast_to(jnp.asarray(t, x.dtype), length.shape))
    return scale(groups, jnp.where(length > 0, to / jnp.where(length > 0, length, 1), 0), x)


def in_unit(penalty: Penalty, unit: jax.Array) -> Penalty:
    """`x -> q(unit x)`: the penalty of norms that are given in multiples of a unit.

    Args:
      penalty: `q`.
      unit: positive.
    """
    return dataclasses.replace(
        penalty,
        value=lambda x: penalty.value(unit * x),
        derivative=lambda x: unit * penalty.derivative(unit * x),
        inverse=lambda s: penalty.inverse(s) / unit,
        shrink=lambda v, t: penalty.shrink(unit * v, unit * (unit * t)) / unit,
    )


def absolute() -> Penalty:
    """`q(x) = x`: the group LASSO."""
    return Penalty(
        "absolute",
        value=lambda x: x,
        derivative=jnp.ones_like,
        inverse=lambda s: s,
        shrink=lambda v, t: jnp.maximum(v - t, 0),
    )


def power(p: float) -> Penalty:
    """`q(x) = x^p` with `0 < p <= 1`.

    The shrinkage has no closed form for most `p`: Newton's method from `v` on the stationarity condition, which is
    convex and increasing where the minimiser lies, so that every step stays on its safe side.

    Args:
      p: the exponent.

    Raises:
      ValueError: if `p` is outside of `(0, 1]`.
    """
    if not 0 < p <= 1:
        raise ValueError(f"the power must be above 0 and at most 1 for a subadditive penalty, got {p}")
    if p == 1:
        return absolute()

    def value(x: jax.Array) -> jax.Array:
        zero = x == 0
        return jnp.where(zero, 0, jnp.where(zero, 1, x) ** p)

    def shrink(v: jax.Array, t: jax.Array) -> jax.Array:
        turn = (t * p * (1 - p)) ** (1 / (2 - p))  # left of it the objective is concave
        start = jnp.maximum(v, turn)

        def newton(_: int, x: jax.Array) -> jax.Array:
            safe = jnp.where(x > 0, x, 1)
            slope = safe - v + t * p * safe ** (p - 1)
            curvature = 1 + t * p * (p - 1) * safe ** (p - 2)
            step = jnp.where(curvature > 0, slope / jnp.where(curvature > 0, curvature, 1), 0)
            return jnp.clip(x - step, turn, start)

        x = lax.fori_loop(0, 12, newton, start)
        return _lowest(value, v, t, [jnp.zeros_like(v), x])

    return Penalty(
        f"power({p:g})",
        value=value,
        derivative=lambda x: jnp.where(x > 0, p * jnp.where(x > 0, x, 1) ** (p - 1), jnp.inf),
        inverse=lambda s: jnp.where(s > 0, jnp.where(s > 0, s, 1) ** (1 / p), 0),
        shrink=shrink,
    )


def log(eps: float = 1.0) -> Penalty:
    """`q(x) = log(1 + x / eps)`.

    Args:
      eps: the norm from which the curve is flatter than half its slope at 0.

    Raises:
      ValueError: if `eps` is not positive.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")

    def value(x: jax.Array) -> jax.Array:
        return jnp.log1p(x / eps)

    def shrink(v: jax.Array, t: jax.Array) -> jax.Array:
        root = jnp.sqrt(jnp.maximum((v + eps) ** 2 - 4 * t, 0))
        x = jnp.maximum((v - eps + root) / 2, 0)
        return _lowest(value, v, t, [jnp.zeros_like(v), x])

    return Penalty(
        f"log({eps:g})",
        value=value,
        derivative=lambda x: 1 / (eps + x),
        inverse=lambda s: eps * jnp.expm1(s),
        shrink=shrink,
    )


def lambert() -> Penalty:
    """The penalty equivalent to exponential masks (Lemma 2.1).

        q(a) = W(2 a^2)^2 / 4 + W(2 a^2) / 2,   q'(a) = W(2 a^2) / a

    It is increasing but *not* subadditive, and concave only above `sqrt(e/2) = 1.166`: near 0 it is `a^2`, like a
    ridge.
    """

    def value(x: jax.Array) -> jax.Array:
        w = lambert_w(2 * jnp.square(x))
        return w * w / 4 + w / 2

    def derivative(x: jax.Array) -> jax.Array:
        # a = sqrt(w e^w / 2), so w / a = 2 a e^-w, which is right at 0 too
        return 2 * x * jnp.exp(-lambert_w(2 * jnp.square(x)))

    def inverse(s: jax.Array) -> jax.Array:
        w = 4 * s / (1 + jnp.sqrt(1 + 4 * s))  # the root of w^2 / 4 + w / 2 = s, without cancellation
        return jnp.sqrt(w / 2) * jnp.exp(w / 2)

    return Penalty(
        "lambert",
        value=value,
        derivative=derivative,
        inverse=inverse,
        shrink=lambda v, t: shrink_by_search(value, derivative, v, t),
        subadditive=False,
        concave=False,
    )


def mcp(gamma: float = 3.0) -> Penalty:
    """Minimax concave penalty with slope 1 at 0: `x - x^2 / (2 gamma)` up to `gamma`, constant beyond.

    Args:
      gamma: where it becomes constant.

    Raises:
      ValueError: if `gamma` is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")

    def value(x: jax.Array) -> jax.Array:
        x = jnp.minimum(x, gamma)
        return x - jnp.square(x) / (2 * gamma)

    def shrink(v: jax.Array, t: jax.Array) -> jax.Array:
        bend = 1 - t / gamma  # where not positive the objective is concave below gamma: an end is best
        inner = jnp.where(bend > 0, (v - t) / jnp.where(bend > 0, bend, 1), 0)
        return _lowest(value, v, t, [jnp.zeros_like(v), jnp.clip(inner, 0, gamma), jnp.maximum(v, gamma)])

    return Penalty(
        f"mcp({gamma:g})",
        value=value,
        derivative=lambda x: jnp.maximum(1 - x / gamma, 0),
        inverse=lambda s: jnp.where(s < gamma / 2, 2 * s / (1 + jnp.sqrt(jnp.maximum(1 - 2 * s / gamma, 0))), jnp.inf),
        shrink=shrink,
        increasing_to=gamma,
        ceiling=gamma / 2,
    )


def scad(a: float = 3.7, knee: float = 1.0) -> Penalty:
    """Smoothly clipped absolute deviation with slope 1 up to `knee`, falling to 0 at `a * knee`, constant beyond.

    Args:
      a: where it becomes constant, in multiples of `knee`.
      knee: where the slope begins to fall.

    Raises:
      ValueError: if `a` is not above 1 or `knee` not positive.
    """
    if not a > 1 or not knee > 0:
        raise ValueError(f"SCAD needs a > 1 and knee > 0, got a={a}, knee={knee}")
    end, ceiling = a * knee, knee * (a + 1) / 2

    def value(x: jax.Array) -> jax.Array:
        bent = (2 * end * x - jnp.square(x) - knee**2) / (2 * (a - 1) * knee)
        return jnp.where(x <= knee, x, jnp.where(x <= end, bent, ceiling))

    def shrink(v: jax.Array, t: jax.Array) -> jax.Array:
        bend = (a - 1) * knee - t
        middle = jnp.where(bend > 0, ((a - 1) * knee * v - t * end) / jnp.where(bend > 0, bend, 1), knee)
        candidates = [
            jnp.zeros_like(v),
            jnp.clip(v - t, 0, knee),
            jnp.clip(middle, knee, end),
            jnp.maximum(v, end),
        ]
        return _lowest(value, v, t, candidates)

    def inverse(s: jax.Array) -> jax.Array:
        root = jnp.sqrt(jnp.maximum(end**2 - knee**2 - 2 * (a - 1) * knee * s, 0))
        return jnp.where(s <= knee, s, jnp.where(s < ceiling, end - root, jnp.inf))

    return Penalty(
        f"scad({a:g}, {knee:g})",
        value=value,
        derivative=lambda x: jnp.where(x <= knee, 1, jnp.maximum(end - x, 0) / ((a - 1) * knee)),
        inverse=inverse,
        shrink=shrink,
        increasing_to=end,
        ceiling=ceiling,
    )


def shrink_by_search(value: Scalar, derivative: Scalar, v: jax.Array, t: jax.Array) -> jax.Array:
    """`argmin_{0 <= x <= v} (x - v)^2 / 2 + t q(x)` for any increasing smooth `q`: a grid, then safeguarded Newton.

    Args:
      value: `q`.
      derivative: `q'`.
      v: lengths to shrink.
      t: of the shape of `v`.
    """
    cells = 64
    grid = jnp.linspace(0, 1, cells + 1, dtype=v.dtype).reshape(-1, *[1] * v.ndim) * v[None]
    unit = jnp.where(v > 0, v, 1)[None]
    height = jnp.square((grid - v[None]) / unit) / 2 + t[None] / unit * (value(grid) / unit)
    at = jnp.argmin(height, axis=0)
    low, high = (
        jnp.maximum(at - 1, 0).astype(v.dtype) / cells * v,
        jnp.minimum(at + 1, cells).astype(v.dtype) / cells * v,
    )

    def slope(x: jax.Array) -> jax.Array:
        return x - v + t * derivative(x)

    def step(_: int, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, x = state
        s, curvature = jax.jvp(slope, (x,), (jnp.ones_like(x),))
        low, high = jnp.where(s < 0, x, low), jnp.where(s < 0, high, x)
        newton = x - s / jnp.where(curvature > 0, curvature, 1)
        inside = (curvature > 0) & (newton > low) & (newton < high)
        return low, high, jnp.where(inside, newton, (low + high) / 2)

    _, _, x = lax.fori_loop(0, 60, step, (low, high, (low + high) / 2))
    return _lowest(value, v, t, [jnp.zeros_like(v), x])


def _lowest(value: Scalar, v: jax.Array, t: jax.Array, candidates: list[jax.Array]) -> jax.Array:
    """The candidate with the least `(x - v)^2 / 2 + t q(x)`; ties go to the first."""
    unit = jnp.where(v > 0, v, 1)  # whose square may not be a number

    def height_of(x: jax.Array) -> jax.Array:
        return jnp.square((x - v) / unit) / 2 + t / unit * (value(x) / unit)

    best, height = candidates[0], height_of(candidates[0])
    for x in candidates[1:]:
        new = height_of(x)
        best, height = jnp.where(new < height, x, best), jnp.minimum(new, height)
    return best
