"""Solvers of `sa_plus_plus.convex`: against scikit-learn, CVXPY, SciPy, enumeration; lemmas and theorems."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn import linear_model

from sa_plus_plus.convex import (
    constants,
    greedy,
    group_lasso,
    groups,
    least_squares_path,
    masked,
    penalised,
    penalties,
    problems,
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


UNEQUAL = [[0, 3, 4], [1, 2], [5], [6, 7, 8, 9]]


def regression(seed=0, n=40, p=10):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x, x[:, :3] @ [1.0, -2.0, 1.0] + rng.standard_normal(n)


def made(kind, seed=0, ridge=0.0):
    x, y = regression(seed)
    if kind == "squares":
        return problems.least_squares(x, y, ridge)
    return problems.logistic(x, (y > 0) * 1.0, ridge)


def test_agrees_with_multi_task_lasso():
    """Its groups are a feature's coefficients over the tasks: rows of ours."""
    x, y = regression()
    y = np.stack([y, y**2, np.roll(y, 1)], 1)
    problem, g = problems.least_squares(x, y), groups.equal((10, 3), 1)
    for share in (0.5, 0.05):
        lam = share * float(group_lasso.critical_lambda(problem, g))
        ours = group_lasso.solve(problem, g, lam)
        theirs = linear_model.MultiTaskLasso(lam, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x, y)
        value = group_lasso.objective(problem, g, lam, jnp.asarray(theirs.coef_.T))
        assert ours.converged
        assert abs(ours.value - value) <= 1e-9 * value
        np.testing.assert_allclose(ours.coefficients, theirs.coef_.T, atol=1e-7)


@pytest.mark.parametrize("kind", ["squares", "logistic"])
def test_agrees_with_cvxpy(kind):
    cvxpy = pytest.importorskip("cvxpy", reason="an independent solver; no dependency of the project")
    x, y = regression()
    problem, g = made(kind), groups.partition(10, UNEQUAL)
    lam = 0.2 * float(group_lasso.critical_lambda(problem, g))
    b = cvxpy.Variable(10)
    signs = np.where(y > 0, 1, -1)
    losses = {
        "squares": lambda: cvxpy.sum_squares(x @ b - y) / (2 * len(y)),
        "logistic": lambda: cvxpy.sum(cvxpy.logistic(-cvxpy.multiply(signs, x @ b))) / len(y),
    }
    task = cvxpy.Problem(cvxpy.Minimize(losses[kind]() + lam * sum(cvxpy.norm(b[m]) for m in UNEQUAL)))
    value = task.solve(solver="CLARABEL")
    assert abs(group_lasso.solve(problem, g, lam).value - value) <= 1e-6 * value


def test_path_gap_and_maps():
    """The path, single solutions and a map over lambda are one; the duality gap bounds what is left."""
    problem, g = made("logistic"), groups.partition(10, UNEQUAL)
    lams = group_lasso.lambda_grid(problem, g, 6, 0.05)
    path = group_lasso.path(problem, g, lams)
    mapped = jax.vmap(lambda lam: group_lasso.solve(problem, g, lam))(lams)
    assert path.converged.all()
    assert (np.asarray(path.coefficients[0]) == 0).all()  # at the critical lambda
    np.testing.assert_allclose(mapped.coefficients, path.coefficients, atol=1e-7)
    for lam, solution in zip(lams, path.coefficients, strict=True):
        gap = group_lasso.duality_gap(problem, g, lam, solution)
        assert -1e-14 <= gap <= 1e-8
    rough = group_lasso.solve(problem, g, lams[-1], tol=1e-2)
    gap = group_lasso.duality_gap(problem, g, lams[-1], rough.coefficients)
    assert 0 <= rough.value - path.value[-1] <= gap


def test_ridge_blocks_of_classes_and_any_function():
    """Multinomial regression in blocks of the class x feature matrix, against the same loss written by hand."""
    x, y = regression()
    labels = np.digitize(y, [-1.5, 0, 1.5])
    problem, g = problems.multinomial(x, labels, 4, 0.05), groups.of_blocks((4, 10), (2, 3))
    lam = 0.5 * group_lasso.critical_lambda(problem, g)
    found = group_lasso.solve(problem, g, lam)

    def loss(x, labels, w):
        picked = jnp.take_along_axis(jax.nn.log_softmax(x @ w.T), labels[:, None], 1)
        return -jnp.mean(picked) + 0.025 * jnp.sum(w**2)

    own = problems.function(loss, (4, 10), jnp.asarray(x), jnp.asarray(labels))
    same = group_lasso.solve(own, g, lam)
    np.testing.assert_allclose(found.coefficients, same.coefficients, atol=1e-8)
    assert 0 < int((groups.norms(g, found.coefficients) == 0).sum()) < g.count
    assert abs(group_lasso.duality_gap(problem, g, lam, found.coefficients)) < 1e-9
    with pytest.raises(ValueError, match="dual is known"):
        group_lasso.duality_gap(own, g, lam, found.coefficients)


def test_float32_stays_float32():
    x, y = (a.astype(np.float32) for a in regression())
    problem, g = problems.least_squares(x, y), groups.equal(10, 2)
    lam = 0.1 * group_lasso.critical_lambda(problem, g)
    found = group_lasso.solve(problem, g, lam)
    assert found.coefficients.dtype == jnp.float32
    assert found.converged
    exact = group_lasso.solve(made("squares"), g, float(lam))
    np.testing.assert_allclose(found.coefficients, exact.coefficients, atol=1e-3)


@pytest.mark.parametrize("shape", ["equal", "partition", "responses"])
def test_fast_path_is_the_plain_one(shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 40))
    y = x[:, :9] @ rng.standard_normal(9) + rng.standard_normal(80)
    if shape == "responses":
        y, g = np.stack([y, y[::-1]], 1), groups.equal((40, 2), 5)
    elif shape == "equal":
        g = groups.equal(40, 5)
    else:
        g = groups.partition(40, [m.tolist() for m in np.split(rng.permutation(40), [3, 10, 11, 20, 30, 34])])
    fast = least_squares_path.solve(x, y, g, count=12, ratio=0.05, tol=1e-10)
    assert fast.converged.all()
    problem = problems.least_squares(x, y)
    plain = group_lasso.path(problem, g, jnp.asarray(fast.lams))
    np.testing.assert_allclose(fast.values, plain.value, rtol=1e-9)
    np.testing.assert_array_equal(fast.active, [(groups.norms(g, b) > 0).sum() for b in plain.coefficients])
    assert fast.screened[:3].sum() > 0  # and rightly: the values are those of the unscreened solver
    for i in (0, 6, 11):
        gap = group_lasso.duality_gap(problem, g, fast.lams[i], jnp.asarray(fast.coefficients[i]))
        np.testing.assert_allclose(fast.gaps[i], gap, atol=1e-12)


def test_fast_path_refuses():
    x, y = regression()
    with pytest.raises(ValueError, match="decreasing"):
        least_squares_path.solve(x, y, groups.equal(10, 2), np.array([0.1, 0.2]))
    with pytest.raises(ValueError, match="lambda must be positive"):
        least_squares_path.solve(x, y, groups.equal(10, 2), np.array([0.1, -0.2]))
    with pytest.raises(ValueError, match="the groups are of coefficients of shape"):
        least_squares_path.solve(x, y, groups.equal(12, 2))


@pytest.mark.parametrize("lam", [0.0, -1.0, float("nan"), float("inf")])
def test_lambda_must_be_positive(lam):
    with pytest.raises(ValueError, match="lambda must be positive"):
        group_lasso.solve(made("squares"), groups.equal(10, 2), lam)
    with pytest.raises(ValueError, match="lambda must be positive"):
        penalised.solve(made("squares"), groups.equal(10, 2), penalties.absolute(), lam)


def test_groups_must_fit():
    with pytest.raises(ValueError, match="make the groups for that shape"):
        group_lasso.solve(made("squares"), groups.equal(12, 2), 1.0)


MASKINGS = (masked.hoff(), masked.own_norm(), masked.exponential(), masked.l1())


@pytest.mark.parametrize("form", MASKINGS, ids=lambda form: form.name)
def test_lemmas(form):
    """Hoff, 2.1, 2.2, 2.3: both minima agree to 1e-8, and the minimisers map onto each other."""
    g = groups.partition(10, UNEQUAL)
    kinds = {
        "hoff": ("squares", "logistic"),
        "own_norm": ("logistic",),
        "exponential": ("squares",),
        "l1": ("squares",),
    }
    for problem in (made(kind, ridge=0.01) for kind in kinds[form.name]):  # experiments.theory has the others
        lam = 0.2 * float(group_lasso.critical_lambda(problem, g))
        starts = jax.random.normal(jax.random.key(1), (16, 10))
        supports = jnp.asarray(list(itertools.product([1.0, 0.0], repeat=4)))
        if form.name == "exponential":  # a mask that is never 0
            supports = jnp.ones_like(supports)
        starts = starts * jax.vmap(lambda s: groups.spread(g, s))(supports)

        def descend(w, b, problem=problem, lam=lam):
            return masked.solve(problem, g, form, lam, w, b)

        found = jax.vmap(descend)(supports, starts)
        found = jax.tree.map(lambda a: a[jnp.argmin(found.value)], found)  # noqa: B023
        if form.penalty.name == "absolute":
            plain = group_lasso.solve(problem, g, lam)
        else:

            def local(b, problem=problem, lam=lam):
                return penalised.solve(problem, g, form.penalty, lam * form.factor, "sum", b)

            ends = jax.vmap(local)(starts)
            plain = jax.tree.map(lambda a: a[jnp.argmin(ends.value)], ends)  # noqa: B023
        assert abs(found.value - plain.value) <= 1e-8 * plain.value
        np.testing.assert_allclose(found.coefficients, plain.coefficients, atol=1e-6)
        w, b = masked.split(form, g, plain.coefficients)  # there
        np.testing.assert_allclose(masked.effective(form, g, w, b), plain.coefficients, atol=1e-12)
        assert abs(masked.objective(problem, g, form, lam, w, b) - plain.value) <= 1e-8 * plain.value
        back = problem.value(found.coefficients) + lam * form.factor * jnp.sum(  # and back
            form.penalty.value(groups.norms(g, found.coefficients))
        )
        assert abs(back - plain.value) <= 1e-8 * plain.value


def test_scipy_finds_nothing_lower():
    """A composite objective, against Nelder and Mead's simplex on a small problem."""
    problem, g, q = made("squares"), groups.partition(10, UNEQUAL), penalties.log(0.5)
    lam = 0.3 * float(group_lasso.critical_lambda(problem, g))
    ends = jax.vmap(lambda b: penalised.solve(problem, g, q, lam, "composite", b, polished=False))(
        jax.random.normal(jax.random.key(0), (16, 10))
    )
    best = ends.coefficients[jnp.argmin(ends.value)]
    fn = jax.jit(lambda b: penalised.objective(problem, g, q, lam, b, "composite"))
    for start in (best, *ends.coefficients[:2]):
        simplex = scipy.optimize.minimize(
            lambda b: float(fn(jnp.asarray(b))), np.asarray(start), method="Nelder-Mead", options={"maxiter": 3000}
        )
        assert simplex.fun >= float(ends.value.min()) - 1e-10


def test_theorem_1_1():
    """Just under tau one group, that of the largest gradient, and nothing lower anywhere; from tau on, zero."""
    q = penalties.power(0.5)  # experiments.theory has the others
    g = groups.partition(10, UNEQUAL)
    keys = jax.random.split(jax.random.key(0), 12)
    starts = jax.vmap(lambda k: jax.random.normal(k, (10,)))(keys)
    only = jax.vmap(lambda s: groups.spread(g, s))(jnp.eye(4))
    starts = jnp.concatenate([starts, starts[:4] * only, 0.1 * starts])
    for seed in range(4):
        problem = made("squares", seed)
        tau = group_lasso.critical_lambda(problem, g)
        first = int(jnp.argmax(groups.norms(g, problems.gradient_at_zero(problem))))
        claim = penalised.one_group(problem, g, q, 0.97 * tau)
        assert claim.applies
        alive = np.asarray(groups.norms(g, claim.solution.coefficients) > 0)
        np.testing.assert_array_equal(alive, np.arange(4) == first)

        def local(b, problem=problem, lam=0.97 * tau):
            return penalised.solve(problem, g, q, lam, "composite", b, polished=False)

        ends = jax.vmap(local)(starts)
        assert ends.value.min() >= claim.solution.value - 1e-12
        same = np.asarray(ends.value <= claim.solution.value + 1e-10)
        assert same.any()
        np.testing.assert_allclose(
            ends.coefficients[same], claim.solution.coefficients[None].repeat(same.sum(), 0), atol=1e-4
        )
        above = penalised.one_group(problem, g, q, 1.0001 * tau)
        assert above.active == 0


def test_lambert_breaks_theorem_1_1():
    """It is not subadditive: objective (1) has a lower minimum than the group LASSO's, and the solver refuses it."""
    problem, g, q = made("squares"), groups.partition(10, UNEQUAL), penalties.lambert()
    lam = 0.95 * group_lasso.critical_lambda(problem, g)
    with pytest.raises(ValueError, match="lambert is not one"):
        penalised.one_group(problem, g, q, lam)
    lasso = group_lasso.solve(problem, g, lam)
    lower = penalised.solve(
        problem, g, q, lam, "composite", 0.1 * jax.random.normal(jax.random.key(0), (10,)), polished=False
    )
    assert lower.value < lasso.value - 1e-3


def best_in_numpy(x, y, members, k):
    """`min ||X b - y||^2 / (2 n)` over all supports of k groups, and that support."""
    found = []
    for chosen in itertools.combinations(range(len(members)), k):
        index = np.concatenate([members[i] for i in chosen])
        b = np.linalg.lstsq(x[:, index], y)[0]
        found.append((np.sum((x[:, index] @ b - y) ** 2) / (2 * len(y)), chosen))
    return min(found)


def test_greedy_against_enumeration():
    x, y = regression(n=60)
    problem, g = problems.least_squares(x, y), groups.partition(10, UNEQUAL)
    value, chosen = best_in_numpy(x, y, UNEQUAL, 2)
    support = np.isin(np.arange(4), chosen)
    exact = greedy.brute_force(problem, g, 2)
    assert exact.value == pytest.approx(value, rel=1e-10)
    found = {
        "brute force": exact,
        "omp": greedy.omp(problem, g, 2),
        "iht": greedy.iht(problem, g, 2, 100),
        "lasso": greedy.from_group_lasso(problem, g, 2),
        "magnitude": greedy.magnitude(problem, g, 2),
        "ompr": greedy.ompr(problem, g, jnp.asarray(~support), 6),
    }
    for name, selection in found.items():
        np.testing.assert_array_equal(selection.support, support, err_msg=name)
        assert selection.value == pytest.approx(value, rel=1e-9), name
        alive = np.asarray(groups.norms(g, selection.coefficients) > 0)
        np.testing.assert_array_equal(alive, support, err_msg=name)
    # each addition of OMP is what its rule says, by hand
    first = int(np.argmax([np.linalg.norm(x[:, m].T @ y) for m in UNEQUAL]))
    b = np.linalg.lstsq(x[:, UNEQUAL[first]], y)[0]
    loss = np.sum((x[:, UNEQUAL[first]] @ b - y) ** 2) / (2 * len(y))
    assert found["omp"].values[0] == pytest.approx(loss, rel=1e-9)


def test_replacement_as_written_is_its_limit():
    """Algorithm 2 with the penalised problem really solved, lambda just under the point where all vanishes."""
    problem, g = made("logistic", ridge=0.05), groups.equal(10, 1)
    start = greedy.as_support(g, [7, 8, 9])
    limit = greedy.ompr(problem, g, start, 5)
    solved = greedy.ompr(problem, g, start, 5, penalty=penalties.power(0.5), ratio=0.9999)
    np.testing.assert_allclose(solved.values, limit.values, rtol=1e-7)
    np.testing.assert_array_equal(solved.support, limit.support)


def test_seeds_map():
    """Problems made inside of a map, one a seed, solved side by side."""
    g = groups.equal(10, 2)

    def lengths(key):
        a, b = jax.random.split(key)
        x = jax.random.normal(a, (30, 10))
        problem = problems.least_squares(x, x[:, 4:6].sum(1) + 0.01 * jax.random.normal(b, (30,)))
        return groups.norms(
            g, group_lasso.solve(problem, g, 0.5 * group_lasso.critical_lambda(problem, g)).coefficients
        )

    found = jax.vmap(lengths)(jax.random.split(jax.random.key(0), 4))
    np.testing.assert_array_equal(found > 0, np.tile(np.arange(5) == 2, (4, 1)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, g: greedy.omp(p, g, 6), "between 1 and the number of groups, 5; got 6"),
        (lambda p, g: greedy.iht(p, g, 0), "between 1 and the number of groups"),
        (lambda p, g: greedy.brute_force(p, g, 9), "between 1 and the number of groups"),
        (lambda p, g: greedy.ompr(p, g, jnp.ones(5, bool), 3), "not all 5"),
        (lambda p, g: greedy.ompr(p, g, jnp.eye(5, dtype=bool)[0], 3, penalties.lambert()), "subadditive"),
        (lambda p, g: greedy.ompr(p, g, jnp.eye(5, dtype=bool)[0], 3, ratio=1.5), r"in \(0, 1\)"),
        (lambda p, g: greedy.as_support(g, [5]), "numbered 0 to 4"),
    ],
)
def test_selection_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(made("squares"), groups.equal(10, 2))


def test_constants_by_enumeration():
    x, _ = regression()
    g = groups.partition(10, UNEQUAL)
    below, above = constants.hessian_bounds(made("squares", ridge=0.3))
    hessian = x.T @ x / len(x) + 0.3 * np.eye(10)
    np.testing.assert_allclose(below, hessian, rtol=1e-12)
    np.testing.assert_allclose(above, hessian, rtol=1e-12)
    extremes = []
    for pair in itertools.combinations(UNEQUAL, 2):
        index = np.concatenate(pair)
        extremes.append(np.linalg.eigvalsh(hessian[np.ix_(index, index)])[[0, -1]])
    assert constants.restricted_smoothness(hessian, g, 2) == pytest.approx(np.max(extremes))
    assert constants.restricted_convexity(hessian, g, 2) == pytest.approx(np.min(extremes))
    below, above = constants.hessian_bounds(made("logistic", ridge=0.3))
    np.testing.assert_allclose(above, x.T @ x / (4 * len(x)) + 0.3 * np.eye(10), rtol=1e-12)
    np.testing.assert_allclose(below, 0.3 * np.eye(10))
    with pytest.raises(ValueError, match="least_squares and logistic"):
        constants.hessian_bounds(problems.function(lambda b: jnp.sum(b**2), 3))


def test_theorem_b_3():
    """From any support OMPR is below the best k groups' loss plus eps within the rounds promised."""
    rng = np.random.default_rng(0)
    x = np.linalg.qr(rng.standard_normal((400, 16)))[0] * 20 + 0.1 * rng.standard_normal((400, 16))
    y = x[:, [4, 5, 10, 11]].sum(1) + rng.standard_normal(400)
    problem, g = problems.least_squares(x, y), groups.equal(16, 2)
    promise = constants.guarantee(problem, g, 2)
    assert promise is not None
    best = greedy.brute_force(problem, g, 2).value
    eps = 1e-3 * float(best)
    supports = jax.vmap(lambda k: greedy.random_support(k, 8, promise.size))(jax.random.split(jax.random.key(0), 6))
    runs = jax.vmap(lambda s: greedy.ompr(problem, g, s, 40))(supports)
    for values in np.asarray(runs.values):
        rounds = promise.rounds(values[0] - float(best), eps)
        assert rounds <= 40
        assert values[: rounds + 1].min() <= best + eps


def at_scale(c, d):
    """Solvers on a problem in float32 whose design is multiplied by `c`, and its responses by `d`; and lambda."""
    x, y = (a.astype(np.float32) for a in (c * regression()[0], d * regression()[1]))
    problem, g = problems.least_squares(x, y), groups.equal(10, 2)
    lam = 0.2 * float(group_lasso.critical_lambda(problem, g))
    ones = jnp.full(10, d / c, jnp.float32)
    own = jnp.ones(5, jnp.float32), jnp.sqrt(ones)
    path = least_squares_path.solve(jnp.asarray(x), jnp.asarray(y), g, count=3, ratio=0.2, tol=1e-6)
    root = penalties.power(0.5)
    return lam, {
        "omp": greedy.omp(problem, g, 2),
        "magnitude": greedy.magnitude(problem, g, 2),
        "iht": greedy.iht(problem, g, 2, 100),
        "absolute": group_lasso.solve(problem, g, lam),
        "absolute, path": path._replace(coefficients=path.coefficients[-1], converged=path.converged.all()),
        "absolute, masked": masked.solve(problem, g, masked.own_norm(), lam, *own),
        "power": penalised.solve(problem, g, root, lam * np.sqrt(d / c), "sum", ones, polished=False),
    }


def test_the_scale_of_the_data_does_not_matter():
    """In float32, which ends at 1e-38 and 3e38: NumPy's least squares, and the conditions for a minimum."""
    x, y = regression()
    supports = {}
    for c, d in [(1, 1), (1e10, 1e10), (1e-10, 1e10), (1e10, 1e-10), (1e-10, 1e-10)]:
        lam, results = at_scale(c, d)
        for name, found in results.items():
            assert found.converged, (name, c, d)
            b = np.asarray(found.coefficients, np.float64) * c / d
            if hasattr(found, "support"):
                support = supports.setdefault(name, np.asarray(found.support))
                np.testing.assert_array_equal(found.support, support, err_msg=f"{name} {c} {d}")
                index = np.flatnonzero(np.repeat(support, 2))
                want = np.linalg.lstsq(x[:, index], y)[0]
                np.testing.assert_allclose(b[index], want, atol=2e-3, err_msg=f"{name} {c} {d}")
                continue
            gradient = (x.T @ (x @ b - y) / len(y)).reshape(5, 2) / (lam / (c * d))
            length = np.linalg.norm(b.reshape(5, 2), axis=1)
            alive = length > 1e-4 * length.max()
            slope = np.ones(5) if "absolute" in name else 0.5 / np.sqrt(np.where(alive, length, 1))
            outwards = slope[:, None] * b.reshape(5, 2) / np.where(alive, length, 1)[:, None]
            assert 0 < alive.sum() < 5
            np.testing.assert_allclose(gradient[alive], -outwards[alive], atol=5e-3, err_msg=f"{name} {c} {d}")
            if "absolute" in name:
                assert np.linalg.norm(gradient[~alive], axis=1).max() <= 1 + 1e-3


def test_columns_may_have_any_scales_and_a_descent_that_stops_early_says_so():
    x, y = (a.astype(np.float32) for a in regression())
    apart, g = x * np.geomspace(1e-10, 1e10, 10, dtype=np.float32), groups.equal(10, 2)
    found = greedy.refit(problems.least_squares(apart, y), g, jnp.ones(5, bool))
    assert found.converged
    want = np.linalg.lstsq(x.astype(float), y)[0]
    got = np.asarray(found.coefficients, float) * np.geomspace(1e-10, 1e10, 10)
    np.testing.assert_allclose(got, want, atol=2e-3)
    problem = problems.least_squares(x, y)
    assert not greedy.refit(problem, g, jnp.ones(5, bool), tol=0.0).converged
    start = jnp.ones(5, jnp.float32), jnp.ones(10, jnp.float32)
    assert not masked.solve(problem, g, masked.own_norm(), 0.1, *start, tol=0.0).converged
