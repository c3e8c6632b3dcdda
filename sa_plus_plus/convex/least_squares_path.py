"""A fast path of group LASSO solutions for least squares: working sets, safe screening, Gram matrices.

    minimise  ||X beta - Y||^2 / (2 n) + lambda sum_i ||beta_i||   for many lambdas

The design matrix is read once for each batch of groups that enters: their rows of the Gram matrix `X'X / n` are kept,
`ever active x p` numbers, and everything else (gradients, objectives, duality gaps) comes from those. The matrix is
never copied, scaled or transposed; values computed from it are divided by powers of two, so that the scale of the data
does not matter. The loop over lambdas and working sets is in Python; the pieces are compiled for
sizes that are powers of two, so a whole path compiles a handful of programs. To `jit` or `vmap` a path, use
`group_lasso.path`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import sa_plus_plus.convex.problems as problems
from sa_plus_plus import blocks
from sa_plus_plus.convex.group_lasso import check_grid, check_groups, check_lambda
from sa_plus_plus.convex.groups import Groups, members
from sa_plus_plus.convex.scaling import unit_of

_SWEEPS = 5_000  # limit on sweeps in one visit to a working set
_WRITTEN_OUT = 32  # limit on rows of a product that is written out
_ROUNDS = 60  # limit on visits for one lambda


class Path(NamedTuple):
    """Solutions along a path; NumPy arrays.

    Attributes:
      lams: `(k,)`.
      coefficients: `(k, *shape)`.
      values: objectives, `(k,)`.
      gaps: duality gaps: upper bounds of each value's distance from the minimum, `(k,)`.
      active: number of non-zero groups, `(k,)`.
      screened: groups that were proved to be zero before the solver began, `(k,)`.
      converged: whether the gap reached the tolerance, `(k,)`.
    """

    lams: np.ndarray
    coefficients: np.ndarray
    values: np.ndarray
    gaps: np.ndarray
    active: np.ndarray
    screened: np.ndarray
    converged: np.ndarray


class _State(NamedTuple):
    """Coefficients and gradient by group, `(groups, size, responses)`, and derived values at one lambda."""

    beta: jax.Array
    slope: jax.Array  # X'(Y - X beta) / n, minus the gradient
    value: jax.Array
    gap: jax.Array
    lengths: jax.Array  # norm of the slope, by group
    scale: jax.Array  # factor that scales the residual to a dual feasible point


class _Gram(NamedTuple):
    """Rows of the Gram matrix for the groups that have entered so far."""

    rows: jax.Array  # (capacity * size, groups * size)
    slot: np.ndarray  # (groups,): which rows are a group's, -1 for none
    used: int


_Sweep = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # coefficients, slope, largest move, sweeps


class _Small(NamedTuple):
    """The Gram matrix of one working set."""

    work: jax.Array  # its groups, padded with -1 to a power of two
    owner: jax.Array  # the group of each slot of the large matrix, -1 for none
    rows: jax.Array  # (work, size, work * size)
    curvature: jax.Array  # (work,): largest eigenvalue of each group's own


def solve(
    x: jax.Array,
    y: jax.Array,
    groups: Groups,
    lams: jax.Array | np.ndarray | None = None,
    count: int = 100,
    ratio: float = 1e-2,
    tol: float = 1e-6,
) -> Path:
    """The group LASSO path of a least-squares problem.

    Args:
      x: `(n, p)`, float64 for tolerances below 1e-5.
      y: `(n,)`, or `(n, m)`: then groups are of whole rows of the `(p, m)` coefficients.
      groups: `groups.equal` of either shape, or `groups.partition` or `of_blocks` of `(p,)`-like coefficients.
      lams: positive, in decreasing order; by default `count` of them from the critical one down to `ratio` of it.
      count: of the default grid.
      ratio: of the default grid.
      tol: on the duality gap, relative to `||Y||^2 / (2 n)`.

    Raises:
      ValueError: on data that is not finite, groups that do not fit, lambdas not positive or not decreasing.
    """
    problem = problems.least_squares(x, y)
    x, y = jnp.asarray(x), jnp.asarray(y)
    check_groups(problem, groups)
    if len(groups.shape) > 1 and groups.kind != "equal":
        raise ValueError("with several responses a group has whole rows of the coefficients: make it by groups.equal")
    responses = y.reshape(y.shape[0], -1)
    index, inside = _layout(groups)
    natural = groups.kind == "equal"
    unit = unit_of(x)  # divides the columns of X; its answer, `unit_y`, the responses
    unit_y = unit_of(y)
    of_lam, of_beta, of_value = _units(unit, unit_y)
    c, column_norms, square = _moments(x, responses, index, inside, unit, unit_y, natural)
    bound = np.asarray(column_norms)  # bounds the largest eigenvalue of each group's Gram matrix
    state = _start(c)
    top = float(jnp.max(state.lengths))
    if lams is None:
        check_grid(count, ratio)
        lams = top * of_lam * np.geomspace(1, ratio, count)
    lams = np.asarray(lams, float)
    check_lambda(lams)
    if lams.ndim != 1 or (lams <= 0).any() or (np.diff(lams) > 0).any():
        raise ValueError(f"lambdas must be positive and decreasing, in one axis; got {lams}")

    size, target = index.shape[1], tol * float(square) / 2
    gram = _Gram(jnp.zeros((0, index.size), x.dtype), np.full(groups.count, -1), 0)
    found: list[tuple[np.ndarray, float, float, int, int]] = []
    before = max(top, lams[0] / of_lam)
    eps, small = np.inf, _Small(*[jnp.zeros(0, int)] * 4)
    for lam in lams / of_lam:
        state = _certify(c, square, state, lam)
        lengths, scale = np.asarray(state.lengths), float(state.scale)
        alive = np.asarray(_alive(state.beta))
        radius = np.sqrt(2 * max(float(state.gap), 0) * bound)
        safe_zero = (scale * lengths + radius < lam * (1 - 1e-9)) & ~alive
        work = alive | ((lengths >= 2 * lam - before) & (lengths > 0) & ~safe_zero)
        eps = min(3 * eps, 0.3 * np.sqrt(target))  # the tolerance of the descent: about what was enough the last time
        for _ in range(_ROUNDS):
            if float(state.gap) <= target or not work.any():
                break
            gram = _with_rows(gram, x, work, lengths, index, inside, unit, natural)
            small = _restricted(gram, work, size, small)
            state = _visit(gram.rows, small, c, square, state, lam, eps)
            lengths = np.asarray(state.lengths)
            violated = (lengths > lam) & ~work & ~safe_zero
            if violated.any():
                work = work | _largest(lengths, violated, max(8, int(work.sum())))
            elif float(state.gap) > target:
                eps *= 0.2
        flat = np.zeros((x.shape[1], responses.shape[1]), x.dtype)
        flat[np.asarray(index)[np.asarray(inside)]] = np.asarray(state.beta)[np.asarray(inside)]
        count_alive = int(np.asarray(_alive(state.beta)).sum())
        found.append(
            (
                flat.reshape(groups.shape) * of_beta,
                float(state.value),
                float(state.gap),
                count_alive,
                int(safe_zero.sum()),
            )
        )
        before = lam
    coefficients, values, gaps, active, screened = (np.array(column) for column in zip(*found, strict=True))
    return Path(lams, coefficients, values * of_value, gaps * of_value, active, screened, gaps <= target)


def _units(unit: jax.Array, unit_y: jax.Array) -> tuple[float, float, float]:
    """Those of lambda, of coefficients and of values, for columns and responses in the given units."""
    a, b = float(unit), float(unit_y)
    return a * b, b / a, b * b


def _layout(groups: Groups) -> tuple[jax.Array, jax.Array]:
    """Columns of each group, `(groups, largest size)`, and which of those places are real."""
    if groups.kind == "equal":
        rows = groups.shape[0]
        index = np.arange(rows).reshape(groups.count, -1)
        return jnp.asarray(index), jnp.ones(index.shape, bool)
    lists = members(groups)
    size = max(len(m) for m in lists)
    index, inside = np.zeros((groups.count, size), int), np.zeros((groups.count, size), bool)
    for i, m in enumerate(lists):
        index[i, : len(m)], inside[i, : len(m)] = m, True
    return jnp.asarray(index), jnp.asarray(inside)


def _with_rows(
    gram: _Gram,
    x: jax.Array,
    work: np.ndarray,
    lengths: np.ndarray,
    index: jax.Array,
    inside: jax.Array,
    unit: jax.Array,
    natural: bool,
) -> _Gram:
    """The Gram matrix with rows for all groups of the working set, and for likely candidates to fill the batch."""
    missing = np.flatnonzero(work & (gram.slot < 0))
    if not missing.size:
        return gram
    batch = min(_power_of_two(missing.size), int((gram.slot < 0).sum()))
    others = np.flatnonzero((gram.slot < 0) & ~work)
    others = others[np.argsort(-lengths[others], kind="stable")][: batch - missing.size]
    new = np.concatenate([missing, others])
    size, count = index.shape[1], len(gram.slot)
    rows = gram.rows
    if (gram.used + len(new)) * size > rows.shape[0]:
        capacity = min(count, _power_of_two(gram.used + len(new), 64))
        rows = _grown(rows, capacity * size)
    rows = _add_rows(rows, x, jnp.asarray(new), gram.used * size, index, inside, unit, natural)
    slot = gram.slot.copy()
    slot[new] = gram.used + np.arange(len(new))
    return _Gram(rows, slot, gram.used + len(new))


def _restricted(gram: _Gram, work: np.ndarray, size: int, before: _Small) -> _Small:
    """The Gram matrix of a working set, gathered again only if the set has changed."""
    chosen = np.flatnonzero(work)
    padded = np.full(min(_power_of_two(chosen.size), len(work)), -1)
    padded[: chosen.size] = chosen
    if np.array_equal(padded, before.work) and before.owner.size == gram.rows.shape[0] // size:
        return before
    owner = np.full(gram.rows.shape[0] // size, -1)
    owner[gram.slot[gram.slot >= 0]] = np.flatnonzero(gram.slot >= 0)
    slots = np.where(padded >= 0, gram.slot[padded], 0)
    rows, curvature = _gathered(gram.rows, jnp.asarray(padded), jnp.asarray(slots), size)
    return _Small(jnp.asarray(padded), jnp.asarray(owner), rows, curvature)


def _largest(lengths: np.ndarray, among: np.ndarray, k: int) -> np.ndarray:
    index = np.flatnonzero(among)
    mask = np.zeros(len(lengths), bool)
    mask[index[np.argsort(-lengths[index], kind="stable")][:k]] = True
    return mask


def _power_of_two(n: int, least: int = 8) -> int:
    return max(least, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnames="natural")
def _moments(
    x: jax.Array,
    y: jax.Array,
    index: jax.Array,
    inside: jax.Array,
    unit: jax.Array,
    unit_y: jax.Array,
    natural: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`X'Y / n` by group, the sum over each group of its columns' mean squares, and `||Y||^2 / n`, of scaled data."""
    n, y = x.shape[0], y / unit_y
    c = jnp.tensordot(x, y, (0, 0)) / (n * unit)
    squares = jnp.sum(jnp.square(x / unit), axis=0) / n
    by_group = c.reshape(*index.shape, -1) if natural else jnp.where(inside[..., None], c[index], 0)
    return by_group, jnp.sum(jnp.where(inside, squares[index], 0), axis=1), jnp.sum(jnp.square(y)) / n


@jax.jit
def _start(c: jax.Array) -> _State:
    zero = jnp.zeros((), c.dtype)
    return _State(jnp.zeros_like(c), c, zero, zero, _lengths(c), zero)


@jax.jit
def _alive(beta: jax.Array) -> jax.Array:
    return jnp.any(beta != 0, axis=(1, 2))


def _lengths(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2)))


@jax.jit
def _certify(c: jax.Array, square: jax.Array, state: _State, lam: jax.Array | float) -> _State:
    """Objective and duality gap at a lambda."""
    lam = jnp.asarray(lam, c.dtype)
    along = jnp.sum(c * state.beta)
    residual = square - 2 * along + jnp.sum(state.beta * (c - state.slope))  # ||Y - X beta||^2 / n
    lengths = _lengths(state.slope)
    scale = jnp.minimum(1, lam / jnp.maximum(jnp.max(lengths), jnp.finfo(c.dtype).tiny))
    value = residual / 2 + lam * jnp.sum(_lengths(state.beta))
    gap = value - (scale * (square - along) - jnp.square(scale) * residual / 2)
    return _State(state.beta, state.slope, value, gap, lengths, scale)


@functools.partial(jax.jit, static_argnames="rows")
def _grown(gram: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(gram, ((0, rows - gram.shape[0]), (0, 0)))


@functools.partial(jax.jit, static_argnames="natural", donate_argnums=0)
def _add_rows(
    gram: jax.Array,
    x: jax.Array,
    new: jax.Array,
    at: jax.Array | int,
    index: jax.Array,
    inside: jax.Array,
    unit: jax.Array,
    natural: bool,
) -> jax.Array:
    columns = jnp.where(inside[new].ravel(), x[:, index[new].ravel()], 0) / (x.shape[0] * unit) / unit
    rows = jnp.tensordot(columns, x, (0, 0))
    if not natural:
        rows = jnp.where(inside.ravel(), rows[:, index.ravel()], 0)
    return lax.dynamic_update_slice(gram, rows, (at, 0))


@functools.partial(jax.jit, static_argnames="size")
def _gathered(gram: jax.Array, work: jax.Array, slots: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    at = jnp.where(work >= 0, work, 0)
    picked = gram.reshape(-1, size, gram.shape[1] // size, size)[slots][:, :, at]  # (work, size, work, size)
    number = jnp.arange(len(work))
    curvature = jnp.linalg.eigvalsh(picked[number, :, number])[:, -1]
    curvature = jnp.where(curvature > 0, curvature, 1) * (1 + 1e-9)
    return picked.reshape(len(work), size, len(work) * size), curvature


@jax.jit
def _visit(
    gram: jax.Array,
    small: _Small,
    c: jax.Array,
    square: jax.Array,
    state: _State,
    lam: jax.Array | float,
    eps: jax.Array | float,
) -> _State:
    """Block coordinate descent over a working set, then the gradient of all groups.

    Args:
      gram: rows of the Gram matrix.
      small: that of the working set.
      c: `X'Y / n`, `(groups, size, responses)`.
      square: `||Y||^2 / n`.
      state: where to start.
      lam: lambda.
      eps: stop when a sweep moves no group by more, in the metric of its own curvature.
    """
    groups, size, responses = c.shape
    lam, eps = jnp.asarray(lam, c.dtype), jnp.asarray(eps, c.dtype)
    real, curvature = small.work >= 0, small.curvature
    at = jnp.where(real, small.work, 0)
    beta = jnp.where(real[:, None, None], state.beta[at], 0)
    slope = state.slope[at].reshape(-1, responses)

    def one(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        beta, slope, most = carry
        old = beta[i]
        ahead = old + lax.dynamic_slice(slope, (i * size, 0), (size, responses)) / curvature[i]
        length = jnp.sqrt(jnp.sum(jnp.square(ahead)))
        new = ahead * blocks.soft_threshold(length, lam / curvature[i])
        move = new - old
        slope = slope - _product(small.rows[i], move)
        return beta.at[i].set(new), slope, jnp.maximum(most, curvature[i] * jnp.sum(jnp.square(move)))

    def sweep(carry: _Sweep) -> _Sweep:
        beta, slope, _, n = carry
        beta, slope, most = lax.fori_loop(0, jnp.sum(real), one, (beta, slope, jnp.zeros((), c.dtype)))
        return beta, slope, most, n + 1

    first = beta, slope, jnp.asarray(jnp.inf, c.dtype), jnp.zeros((), jnp.int32)
    beta, _, _, _ = lax.while_loop(lambda s: (s[2] > jnp.square(eps)) & (s[3] < _SWEEPS), sweep, first)
    beta = state.beta.at[jnp.where(real, small.work, groups)].set(beta, mode="drop")
    return _moved(gram, small.owner, c, square, state, beta, lam)


def _product(rows: jax.Array, move: jax.Array) -> jax.Array:
    """`rows' move` of `(size, wide)` and `(size, responses)`.

    Written out term by term if there are few: XLA fuses that into one pass, ten times as fast on a CPU as a dot or a
    sum over an axis this short.
    """
    if rows.shape[0] > _WRITTEN_OUT:
        return jnp.tensordot(rows, move, (0, 0))
    total = rows[0][:, None] * move[0][None, :]
    for row, step in zip(rows[1:], move[1:], strict=True):
        total = total + row[:, None] * step[None, :]
    return total


def _moved(
    gram: jax.Array, owner: jax.Array, c: jax.Array, square: jax.Array, state: _State, beta: jax.Array, lam: jax.Array
) -> _State:
    responses = c.shape[2]
    by_slot = jnp.where(owner[:, None, None] >= 0, beta[jnp.maximum(owner, 0)], 0).reshape(-1, responses)
    slope = c - jnp.tensordot(gram, by_slot, (0, 0)).reshape(c.shape)
    return _certify(c, square, state._replace(beta=beta, slope=slope), lam)
