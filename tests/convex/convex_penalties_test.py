"""Lambert's function, penalties, groups and problems of `sa_plus_plus.convex`, against SciPy, grids and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from sa_plus_plus.convex import groups, lambert_w, penalties, problems

PENALTIES = (
    penalties.absolute(),
    penalties.power(0.5),
    penalties.power(2 / 3),
    penalties.log(0.3),
    penalties.lambert(),
    penalties.mcp(3.0),
    penalties.scad(3.7),
)
every_penalty = pytest.mark.parametrize("q", PENALTIES, ids=lambda q: q.name)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_lambert_is_scipys():
    x = np.concatenate([[0, 1e-300, 3, 3 - 1e-12], np.geomspace(1e-12, 1e300, 3000), -np.geomspace(1e-12, 0.36, 500)])
    want = scipy.special.lambertw(x).real
    np.testing.assert_allclose(jax.jit(lambert_w)(jnp.asarray(x)), want, rtol=1e-12, atol=0)
    single = x[(np.abs(x) < 1e38) & (x != 1e-300)].astype(np.float32)
    low = lambert_w(jnp.asarray(single))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, scipy.special.lambertw(single.astype(float)).real, rtol=3e-6, atol=1e-30)


def test_lambert_at_its_ends():
    assert np.isnan(lambert_w(jnp.asarray(-0.4)))
    assert lambert_w(jnp.asarray(-np.exp(-1))) == pytest.approx(-1, abs=1e-7)
    assert lambert_w(jnp.asarray(jnp.inf)) == np.inf
    assert lambert_w(jnp.asarray(0.0)) == 0


def test_lambert_derivatives():
    x = jnp.asarray([0.0, 0.1, 1.0, 20.0])
    w = scipy.special.lambertw(np.asarray(x)).real
    np.testing.assert_allclose(jax.vmap(jax.grad(lambert_w))(x), np.exp(-w) / (1 + w), rtol=1e-12)
    second = jax.vmap(jax.grad(jax.grad(lambert_w)))(x)
    np.testing.assert_allclose(second, -np.exp(-2 * w) * (w + 2) / (1 + w) ** 3, rtol=1e-11)


@every_penalty
def test_stated_properties_hold_on_a_grid(q):
    x = jnp.asarray(np.concatenate([[0], np.geomspace(1e-6, 20, 400)]))
    y = np.asarray(q.value(x))
    assert y[0] == 0
    within = np.asarray(x) <= q.increasing_to
    assert (np.diff(y[within]) > 0).all()
    assert (np.diff(y) >= 0).all()
    assert y.max() <= q.ceiling + 1e-15
    together = np.asarray(q.value(x[:, None] + x[None, :]))
    assert (together <= y[:, None] + y[None, :] + 1e-12).all() == q.subadditive
    middle = np.asarray(q.value((x[:, None] + x[None, :]) / 2))
    assert (middle >= (y[:, None] + y[None, :]) / 2 - 1e-12).all() == q.concave


@every_penalty
def test_inverse_and_derivative(q):
    x = jnp.linspace(0.0, 5.0, 101)
    within = np.asarray(x) < q.increasing_to
    np.testing.assert_allclose(q.inverse(q.value(x))[within], x[within], rtol=1e-11, atol=1e-14)
    if np.isfinite(q.ceiling):
        assert np.isinf(q.inverse(jnp.asarray([q.ceiling, 2 * q.ceiling]))).all()
    np.testing.assert_allclose(jax.vmap(jax.grad(q.value))(x[1:]), q.derivative(x[1:]), rtol=1e-9, atol=1e-12)


@every_penalty
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shrink_is_the_minimum_over_a_fine_grid(q, dtype):
    v, t = np.meshgrid([0, 0.1, 0.5, 1, 1.7, 2.5, 4, 7], [0.01, 0.3, 1, 2, 5, 20])
    v, t = jnp.asarray(v.ravel(), dtype), jnp.asarray(t.ravel(), dtype)
    found = jax.jit(q.shrink)(v, t)
    assert found.dtype == v.dtype
    fine = jnp.linspace(0.0, 7.0, 7001)[:, None]
    v, t, found = (a.astype(float)[None] for a in (v, t, found))
    height = np.asarray((found - v) ** 2 / 2 + t * q.value(found))[0]
    want = np.asarray((fine - v) ** 2 / 2 + t * q.value(fine)).min(0)
    assert (height <= want + (1e-14 if dtype == "float64" else 1e-5)).all()


def test_lambert_penalty_is_the_masks_cost():
    a = np.array([0.1, 0.7, 1.2, 3.0, 30.0])
    w = np.linspace(-1, 5, 600_001)
    costs = [np.min(w**2 + np.exp(-2 * w) * x**2) for x in a]
    np.testing.assert_allclose(penalties.lambert().value(jnp.asarray(a)), costs, rtol=1e-8)


def test_prox_keeps_directions():
    g = groups.partition(5, [[0, 3], [1], [2, 4]])
    x = jnp.asarray([3.0, 0.2, 0.0, 4.0, 0.0])
    np.testing.assert_allclose(penalties.prox(penalties.absolute(), g, x, 1.0), [2.4, 0, 0, 3.2, 0])


@pytest.mark.parametrize(("rows", "cols", "b_r", "b_c"), [(4, 6, 2, 3), (5, 7, 2, 3), (3, 1, 3, 4)])
def test_groups_of_every_kind_agree(rows, cols, b_r, b_c):
    shape = (rows, cols)
    made = [groups.of_blocks(shape, (b_r, b_c))]
    if rows % b_r == 0:
        made.append(groups.equal(shape, b_r))
    x = np.random.default_rng(rows + 10 * cols).standard_normal(shape)
    for g in made:
        same = groups.partition(shape, [m.tolist() for m in groups.members(g)])
        np.testing.assert_array_equal(groups.sizes(g), groups.sizes(same))
        want = [np.linalg.norm(x.ravel()[m]) for m in groups.members(g)]
        np.testing.assert_allclose(groups.norms(g, jnp.asarray(x)), want, rtol=1e-12)
        np.testing.assert_allclose(groups.norms(same, jnp.asarray(x)), want, rtol=1e-12)
        s = jnp.arange(1.0, g.count + 1)
        np.testing.assert_array_equal(groups.spread(g, s), groups.spread(same, s))


def test_norms_of_zero_groups_have_gradient_zero():
    g = groups.equal(4, 2)
    gradient = jax.grad(lambda x: jnp.sum(groups.norms(g, x)))(jnp.asarray([0.0, 0.0, 3.0, 4.0]))
    np.testing.assert_allclose(gradient, [0, 0, 0.6, 0.8])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([[0, 1], [1, 2]], "overlap: coordinate 1 of group 1 is in group 0 too"),
        ([[0, 0], [1, 2]], "overlap: coordinate 0 of group 0 is there twice"),
        ([[0], [1]], "miss 1 of 3 coordinates, the first is 2"),
        ([[0, 1, 2], [3]], "coordinate 3, outside of 0 to 2"),
        ([[0, 1, 2], []], "group 1 must be a non-empty list"),
    ],
)
def test_partitions_that_are_none(members, message):
    with pytest.raises(ValueError, match=message):
        groups.partition(3, members)


def test_equal_groups_must_divide():
    with pytest.raises(ValueError, match="do not divide into groups of 3 rows"):
        groups.equal(10, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: penalties.power(1.5), "at most 1"),
        (lambda: penalties.log(0.0), "eps must be positive"),
        (lambda: penalties.mcp(-1.0), "gamma must be positive"),
        (lambda: penalties.scad(1.0), "a > 1"),
    ],
)
def test_penalties_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def data(n=12, p=5):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, p)), rng.standard_normal(n), rng.integers(0, 3, n)


def test_losses_are_numpys():
    x, y, labels = data()
    rng = np.random.default_rng(1)
    b, b2, w = rng.standard_normal(5), rng.standard_normal((5, 2)), rng.standard_normal((3, 5))
    y2 = np.stack([y, y**2], 1)
    ridge = 0.1 / 2
    want = np.sum((x @ b - y) ** 2) / 24 + ridge * b @ b
    assert problems.least_squares(x, y, 0.1).value(b) == pytest.approx(want)
    want = np.sum((x @ b2 - y2) ** 2) / 24
    assert problems.least_squares(x, y2).value(b2) == pytest.approx(want)
    s = np.where(y > 0, 1, -1)
    want = np.mean(np.log1p(np.exp(-s * (x @ b)))) + ridge * b @ b
    assert problems.logistic(x, (y > 0) * 1.0, 0.1).value(b) == pytest.approx(want)
    z = x @ w.T
    want = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(12), labels])
    assert problems.multinomial(x, labels, 3).value(w) == pytest.approx(want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y: problems.least_squares(x, y * np.nan), "y is not finite: nan at"),
        (
            lambda x, y: problems.least_squares(np.where(x == x[2, 1], np.inf, x), y),
            r"X is not finite: inf at \(2, 1\)",
        ),
        (lambda x, y: problems.least_squares(x, y[:-1]), "y have n rows"),
        (lambda x, y: problems.least_squares(x, y, -1.0), "ridge must be finite and not negative"),
        (lambda x, y: problems.least_squares(x, y.astype(np.float32)), "one floating type"),
        (lambda x, y: problems.logistic(x, y), "labels must be 0 or 1"),
        (lambda x, y: problems.multinomial(x, np.full(12, 3), 3), "label 3 is none of the 3 classes"),
        (lambda x, y: problems.function(lambda b: jnp.log(b[0]), 3), "the loss at 0 is -inf"),
        (lambda x, y: problems.function(lambda b: b, 3), "floating scalar"),
    ],
)
def test_problems_refuse(make, message):
    x, y, _ = data()
    with pytest.raises(ValueError, match=message):
        make(x, y)
