"""Pruning without training, against least squares by NumPy, greedy and exhaustive search, and plain loops."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sa_plus_plus as sapp
from sa_plus_plus.oneshot import alps, layers, obs, prune

METHODS = ("magnitude", "wanda", "obs", "alps")


def inputs(rows, size, seed=0):
    """Correlated, so that adjusting weights pays."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, size)) @ (np.eye(size) + 0.5 * rng.normal(size=(size, size)))).astype(np.float32)


def weights(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def problem(rows, cols, block, seed=0, damping=0.0):
    x = inputs(3 * rows + 5, rows, seed).astype(np.float64)
    return layers.padded(x.T @ x, weights(rows, cols, seed=seed + 1).astype(np.float64), block, damping, "w")


def largest(task, kept):
    """The largest blocks, refitted."""
    return layers.refitted(task, layers.top(layers.magnitude(task), kept))


def least_squares(x, w, support):
    """The best weights on a support, column by column, by `np.linalg.lstsq`."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    v = np.zeros_like(w)
    for j in range(w.shape[1]):
        rows = support[:, j]
        v[rows, j] = np.linalg.lstsq(x[:, rows], x @ w[:, j], rcond=None)[0]
    return v


def spread(mask, block, shape):
    return np.kron(mask, np.ones(block, bool))[: shape[0], : shape[1]].astype(bool)


@pytest.fixture(scope="module")
def two_layers():
    """`relu(x @ first + b) @ second` of ragged sizes, and inputs in batches."""
    params = {
        "first": {"kernel": weights(10, 14), "bias": weights(14, seed=3)},
        "second": {"kernel": weights(14, 7, seed=2)},
    }

    def fn(params, x):
        hidden = jax.nn.relu(x @ params["first"]["kernel"] + params["first"]["bias"][None])
        return hidden @ params["second"]["kernel"]

    return fn, params, np.split(inputs(96, 10), 3)


def test_refit_is_least_squares_on_what_pruned_layers_before_give(two_layers):
    fn, params, batches = two_layers
    plan = sapp.plan(params, block=(4, 3), sparsity=0.5, min_blocks=1)
    masks = {p: np.random.default_rng(5).random(layer.grid) < 0.6 for p, layer in plan.pruned.items()}
    result = sapp.refit(fn, params, batches, masks, plan, damping=0)
    x = np.concatenate(batches)
    w1, w2 = params["first"]["kernel"], params["second"]["kernel"]
    first = least_squares(x, w1, spread(masks["first/kernel"], (4, 3), w1.shape))
    chex.assert_trees_all_close(np.asarray(result.params["first"]["kernel"]), first.astype(np.float32), atol=1e-4)
    hidden = np.maximum(x @ first + params["first"]["bias"], 0)
    second = least_squares(hidden, w2, spread(masks["second/kernel"], (4, 3), w2.shape))
    chex.assert_trees_all_close(np.asarray(result.params["second"]["kernel"]), second.astype(np.float32), atol=1e-3)
    np.testing.assert_array_equal(result.params["first"]["bias"], params["first"]["bias"])
    want = np.linalg.norm(hidden @ (second - w2)) / np.linalg.norm(hidden @ w2)
    assert result.layers[1].error == pytest.approx(want, rel=1e-3)
    assert (result.layers[1].rows, result.layers[1].kept) == (96, masks["second/kernel"].sum())


def test_a_convolution_sees_its_patches():
    x, w = inputs(4 * 36, 3).reshape(4, 6, 6, 3), weights(3, 3, 3, 8)
    plan = sapp.plan({"kernel": w}, block=(3, 4), sparsity=0.5, min_blocks=1)
    mask = np.random.default_rng(0).random(plan.pruned["kernel"].grid) < 0.5

    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (2, 1), [(1, 0), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    result = sapp.refit(fn, {"kernel": w}, [x[:2], x[2:]], {"kernel": mask}, plan, damping=0)
    padded = np.pad(x, ((0, 0), (1, 0), (1, 1), (0, 0)))
    taps = [padded[:, i : i + 5 : 2, j : j + 6] for i in range(3) for j in range(3)]
    rows = np.concatenate(taps, -1).reshape(-1, 27)
    matrix = w.reshape(27, 8)
    want = least_squares(rows, matrix, spread(mask, (3, 4), matrix.shape))
    np.testing.assert_allclose(np.asarray(result.params["kernel"]).reshape(27, 8), want, atol=2e-4)


def test_a_matrix_may_be_transposed_stacked_or_used_twice():
    x, out_first, shared, stacked = inputs(80, 8), weights(6, 8), weights(6, 6, seed=2), weights(2, 6, 6, seed=3)
    params = {"out_first": out_first, "shared": shared, "stacked": stacked}

    def fn(params, x):
        x = x @ params["out_first"].T
        x = jnp.sin(x @ params["shared"]) @ params["shared"]
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, params["stacked"])[0]

    views = {"stacked": "[layers] i o"}
    plan = sapp.plan(params, block=2, sparsity=0.5, min_blocks=1, views=views)
    rng = np.random.default_rng(1)
    masks = {p: rng.random(layer.full_grid) < 0.6 for p, layer in plan.pruned.items()}
    got = jax.tree.map(np.asarray, sapp.refit(fn, params, [x], masks, plan, damping=0).params)
    want = least_squares(x, out_first.T, spread(masks["out_first"], (2, 2), (6, 8)).T).T
    np.testing.assert_allclose(got["out_first"], want, atol=1e-3)
    first = x @ got["out_first"].T
    both = np.concatenate([first, np.sin(first @ shared)])  # both uses are one least-squares problem
    want = least_squares(both, shared, spread(masks["shared"], (2, 2), (6, 6)))
    np.testing.assert_allclose(got["shared"], want, atol=1e-3)
    h = np.sin(first @ got["shared"]) @ got["shared"]
    for i in range(2):
        want = least_squares(h, stacked[i], spread(masks["stacked"][i], (2, 2), (6, 6)))
        np.testing.assert_allclose(got["stacked"][i], want, atol=2e-3)
        h = np.sin(h @ got["stacked"][i])


def test_wanda_and_magnitude_score_as_numpy_does(two_layers):
    _, params, batches = two_layers
    w, x = params["first"]["kernel"][:, :12], np.concatenate(batches)[:, :8]
    tree, w = {"kernel": w[:8]}, w[:8]
    for method, scaled in (("magnitude", w), ("wanda", w * np.linalg.norm(x, axis=0)[:, None])):
        got = sapp.one_shot(lambda p, x: x @ p["kernel"], tree, [x], block=4, sparsity=0.5, method=method, min_blocks=1)
        scores = (scaled.reshape(2, 4, 3, 4) ** 2).sum((1, 3))
        keep = scores >= np.sort(scores.ravel())[-3]
        np.testing.assert_array_equal(got.masks["kernel"], keep)
        np.testing.assert_array_equal(got.params["kernel"], w * spread(keep, (4, 4), w.shape))


@jax.custom_vjp
def doubled(w):
    return 2 * w


doubled.defvjp(lambda w: (2 * w, None), lambda _, g: (2 * g,))


def tied(params, x, w="w", v="v"):
    """Looked up and multiplied with, transposed, by its path."""
    looked = params[v].T[jnp.argmax(jnp.abs(x), -1)]
    hidden = jnp.sin(looked @ params[w])
    return hidden @ params[v], {w: [looked], v: [hidden]}


def scaled(params, x):
    """A factor from all weights of a leaf, between its two uses."""
    hidden = jnp.sin(x @ params["w"]) * jax.jit(lambda w: jnp.sqrt(jnp.sum(jnp.square(w))))(params["w"]) / 8
    last = jnp.cos(hidden @ params["w"])
    return last @ params["v"], {"w": [x, hidden], "v": [last]}


def standardised(params, x):
    """Under `checkpoint` and `custom_vjp`, a product with what is computed from the kernel of another."""
    first = jnp.sin(x @ params["w"])
    other = jax.checkpoint(lambda w: doubled(w) / (1 + jnp.std(w, 0, keepdims=True)))(params["w"])
    hidden = jnp.cos(first @ other)
    return hidden @ params["v"], {"w": [x], "v": [hidden]}


def within(params, x):
    """A kernel that is also used where it cannot be seen, before and after."""
    first = jax.lax.cond(x[0, 0] > 9, lambda: x, lambda: jnp.sin(x @ params["w"].astype(jnp.float32)))
    hidden = jax.lax.fori_loop(
        0, 2, lambda _, h: jnp.sin(h @ jnp.where(h[0, 0] > 9, 0, params["w"])), first @ params["w"]
    )
    return hidden @ params["v"], {"w": [first], "v": [hidden]}


@pytest.mark.parametrize("case", [tied, scaled, standardised, within])
def test_every_use_of_a_leaf_sees_it_pruned(case):
    """Errors are those of the pruned network, whatever else is computed from a leaf."""
    x, params = inputs(40, 12), {"w": weights(12, 12), "v": weights(12, 20, seed=2)}
    common = {"block": (4, 2), "min_blocks": 1, "where": lambda path: True}

    def errors(pruned, path):
        xs = case(pruned, x)[1][path]
        pairs = [(x @ pruned[path], x @ params[path]) for x in xs]
        return np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs))

    got = sapp.one_shot(lambda p, x: case(p, x)[0], params, [x], sparsity=0.5, **common)
    sapp.check_pruned(got.params, got.plan)
    for layer in got.layers:
        assert layer.error == pytest.approx(float(errors(got.params, layer.plan.path)), rel=1e-3)
    data = x, case(params, x)[0]
    found = sapp.sensitivity(
        lambda p, x: case(p, x)[0], params, data, optax.squared_error, sparsities=(0.5,), method="magnitude", **common
    )
    for path in params:
        alone = sapp.one_shot(
            lambda p, x: case(p, x)[0],
            params,
            [x],
            sparsity=0,
            method="magnitude",
            overrides={path: {"sparsity": 0.5}},
            **common,
        ).params
        assert found.errors[path][1] == pytest.approx(float(errors(alone, path)), rel=1e-3)
        assert found.losses[path][1] == pytest.approx(float(np.mean((case(alone, x)[0] - data[1]) ** 2)), rel=1e-3)


def experts(params, x):
    """Each row goes to one of four experts, none to the last."""
    chosen = jax.nn.one_hot(jnp.argmax(x[:, :3], -1), 4, axis=0)[..., None]
    hidden = jax.nn.relu(jnp.einsum("ebi,eio->ebo", chosen * x[None], params["in"]))
    return jnp.einsum("ebi,eio->ebo", hidden, params["out"]).sum(0)


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_no_example_reaches_are_pruned_by_magnitude(method):
    x, params = inputs(60, 6), {"in": weights(4, 6, 6), "out": weights(4, 6, 6, seed=2), "dead": weights(6, 6, seed=3)}
    common = {"block": 2, "min_blocks": 1, "method": method, "where": lambda path: True}
    common["views"] = {"in": "[experts] i o", "out": "[experts] i o"}

    def fn(params, x):
        return experts(params, x) + (0 * x) @ params["dead"]

    named = r"reaches matrix 3 of in, .*dead"
    with pytest.warns(UserWarning, match=named) as warned:
        got = sapp.one_shot(fn, params, [x[:30], x[30:]], sparsity=0.5, **common)
    assert warned[0].filename == __file__
    assert "matrix 3 of out" in str(warned[0].message)
    assert "matrix 2" not in str(warned[0].message)
    sapp.check_pruned(got.params, got.plan)
    for path, matrix in (("in", 3), ("out", 3), ("dead", ...)):
        w = params[path][matrix]
        scores = np.square(w).reshape(w.shape[0] // 2, 2, -1, 2).sum((1, 3))
        keep = scores >= np.sort(scores.ravel())[-int(got.masks[path][matrix].sum())]
        np.testing.assert_array_equal(got.masks[path][matrix], keep)
        np.testing.assert_array_equal(got.params[path][matrix], w * spread(keep, (2, 2), w.shape))
    assert {layer.plan.path: layer.unreached for layer in got.layers} == {"in": 1, "out": 1, "dead": 1}
    assert [np.isnan(layer.error) for layer in got.layers] == [layer.plan.path == "dead" for layer in got.layers]
    assert "1 of 4 by magnitude" in str(got)
    with pytest.warns(UserWarning, match=named):
        found = sapp.sensitivity(fn, params, (x, fn(params, x)), optax.squared_error, sparsities=(0.5,), **common)
    assert found.losses["dead"][1] == found.loss == 0
    assert np.isnan(found.errors["dead"]).all()
    with pytest.warns(UserWarning, match=named):
        again = sapp.refit(fn, params, x, got.masks, got.plan)
    chex.assert_trees_all_close(again.params["dead"], got.params["dead"], rtol=1e-6)


def test_random_keys_are_inputs_and_leaves(two_layers):
    """They are no kernels, in stacks of any shape, and come back as they were."""
    _, params, batches = two_layers
    keys = jax.random.split(jax.random.key(0), (20, 20))
    params = {**params, "keys": keys, "key": keys[0, 0]}

    def fn(params, x, key):
        for k in (key, params["key"], params["keys"][3, 5]):
            x = jnp.where(jax.random.bernoulli(k, 0.9, x.shape), x, 0)
        hidden = jax.nn.relu(x @ params["first"]["kernel"])
        return hidden @ params["second"]["kernel"]

    data = [((x, jax.random.key(i)), np.zeros((32, 7), np.float32)) for i, x in enumerate(batches)]
    common = {"block": (4, 3), "min_blocks": 1, "where": lambda path: True}
    got = sapp.one_shot(fn, params, [x for x, _ in data], sparsity=0.5, **common)
    sapp.check_pruned(got.params, got.plan)
    assert {layer.path for layer in got.plan.leaves if layer.skip_reason == "not a kernel (key<fry>)"} == {"keys"}
    assert (got.params["keys"] == keys).all()
    found = sapp.sensitivity(fn, params, data, optax.squared_error, sparsities=(0.5,), method="wanda", **common)
    assert (found.losses["first/kernel"] != found.loss).sum() == 1


def test_what_is_one_batch(two_layers):
    """An array or a dictionary, alone; a pair of inputs and targets; for `specialize` also a tuple of its arguments."""
    fn, params, batches = two_layers
    common = {"block": (4, 3), "sparsity": 0.5, "min_blocks": 1}
    x, loss = np.concatenate(batches), optax.squared_error
    want = sapp.one_shot(fn, params, [x], **common)
    for one in (x, jnp.asarray(x)):
        chex.assert_trees_all_equal(sapp.one_shot(fn, params, one, **common).params, want.params)
    for one in ({"x": x}, [{"x": x}], iter([{"x": x}])):
        got = sapp.one_shot(lambda p, b: fn(p, b["x"]), params, one, **common)
        chex.assert_trees_all_equal(got.params, want.params)
    del common["sparsity"]
    y = fn(params, x) + 1
    want = sapp.sensitivity(fn, params, [(x, y)], loss, sparsities=(0.5,), **common)
    got = sapp.sensitivity(fn, params, (x, y), loss, sparsities=(0.5,), calibration=x, **common)
    chex.assert_trees_all_equal(got.losses, want.losses)
    for wrong, found in ((x, r"an array of shape \(96, 10\)"), ([x], r"an array of shape"), ({"x": x}, "dict")):
        with pytest.raises(ValueError, match=rf"batch 0 of data is {found}.*, not a pair"):
            sapp.sensitivity(fn, params, wrong, loss, **common)
    scale = np.ones((96, 1), np.float32)
    for calibration in (x, [x]):
        assert sapp.specialize(lambda x: fn(params, x), x, calibration=calibration, mode="never").choices[0].error == 0
    for calibration in ((x, scale), [(x, scale)]):
        network = sapp.specialize(lambda x, s: fn(params, x * s), x, scale, calibration=calibration, mode="never")
        assert network.choices[0].error == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_obs_removes_what_costs_least_and_refits(grid, side, columns, seed):
    task = problem(grid * side, columns, (side, columns), seed)
    inverse = np.linalg.inv(task.hessian)
    live, base = list(range(grid)), 0.0
    for gone in range(1, grid):
        order, costs, found = obs.removed(inverse, task.weights, side, gone)
        losses = {}  # of every choice for the next to go, by least squares
        for candidate in live:
            mask = np.isin(np.arange(grid), [b for b in live if b != candidate])[:, None]
            losses[candidate] = task.loss(layers.refitted(task, mask))
        best = min(losses, key=losses.get)
        assert losses[order[-1]] <= losses[best] * (1 + 1e-9)
        assert 2 * costs[-1] == pytest.approx(losses[best] - base, rel=1e-5, abs=1e-8)
        live.remove(order[-1])
        base = losses[order[-1]]
        mask = np.isin(np.arange(grid), live)[:, None]
        np.testing.assert_allclose(found, layers.refitted(task, mask), atol=1e-7 * np.abs(task.weights).max() * 100)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([(2, 3), (1, 4), (4, 1)]), st.floats(0.1, 1), st.data())
def test_alps_is_never_worse_than_the_largest_blocks_refitted(down, across, block, share, data):
    kept = max(1, int(share * down * across))
    task = problem(down * block[0], across * block[1], block, data.draw(st.integers(0, 99)), damping=0.01)
    mask, found = alps.alps(task, kept)
    assert mask.sum() == kept
    assert not found[~spread(mask, block, task.weights.shape)].any()
    scale = task.loss(np.zeros_like(task.weights))
    assert task.loss(found) <= task.loss(largest(task, kept)) + 1e-6 * scale


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_of_inputs_and_weights_does_not_matter(method):
    x, w = inputs(40, 8).astype(np.float64), weights(8, 4).astype(np.float64)

    def solved(c, d):
        task = layers.padded((c * x).T @ (c * x), d * w, (2, 2), 0.01, "w")
        return prune.solver(method, refit=True)(task)(4)

    mask, want = solved(1, 1)
    assert not np.allclose(want, w * spread(mask, (2, 2), w.shape), rtol=0.1)
    for c, d in itertools.product((1e-15, 1e9, 1e15), (1e-20, 1, 1e20)):
        same, got = solved(c, d)
        np.testing.assert_array_equal(same, mask)
        np.testing.assert_allclose(got / d, want, rtol=1e-3, atol=1e-4)


def test_alps_solves_exactly_where_its_descent_does_not_converge(monkeypatch):
    monkeypatch.setattr(alps, "TOLERANCE", 0.0)
    task = problem(14, 6, (2, 2), damping=0.01)  # a shape of its own: the descent is compiled for each
    mask, found = alps.alps(task, 9)
    np.testing.assert_array_equal(found, layers.refitted(task, mask))


def test_methods_that_adjust_come_near_the_best_of_all_choices():
    """Of the 70 choices of 4 blocks out of 8."""
    ratios = {name: [] for name in ("magnitude", "obs", "alps")}
    for seed in range(20):
        task = problem(8, 4, (2, 2), seed, damping=0.01)
        choices = [np.isin(np.arange(8), c).reshape(4, 2) for c in itertools.combinations(range(8), 4)]
        best = min(task.loss(layers.refitted(task, mask)) for mask in choices)
        losses = {
            "magnitude": task.loss(largest(task, 4)),
            "obs": task.loss(obs.obs(task)(4)[1]),
            "alps": task.loss(alps.alps(task, 4)[1]),
        }
        for name, loss in losses.items():
            assert loss >= best * (1 - 1e-4)
            ratios[name].append(loss / best)
    means = {name: np.mean(each) for name, each in ratios.items()}
    assert means["obs"] < 1.1 < 1.3 < means["magnitude"], means
    assert means["alps"] < means["magnitude"] - 0.1, means


@pytest.mark.parametrize("grid", [5, 150])  # below and above what has a ranking for each row
def test_one_pass_of_obs_against_explicit_inverses(grid):
    task = problem(grid, 6, (1, 2), damping=0.01)
    h, w = task.hessian, task.weights.copy()
    each, left, going = max(1, -(-grid // obs.MOST_ROUNDS)), 3 * grid - grid, None
    want = np.ones((grid, 3), bool)
    for row in range(grid):
        inverse = np.linalg.inv(h[row:, row:])  # of the rows that can still change
        if row % each == 0:
            costs = (w[row:] ** 2 / np.diag(inverse)[:, None]).reshape(-1, 3, 2).sum(-1)
            going = np.zeros(costs.shape, bool)
            going.ravel()[np.argsort(costs.ravel(), kind="stable")[:left]] = True
            going = going[: min(each, grid - row)]
            left -= going.sum()
        want[row] = ~going[row % each]
        gone = ~want[row].repeat(2)
        w[row:] -= inverse[:, :1] / inverse[0, 0] * (w[row] * gone)
    np.testing.assert_array_equal(obs.by_rows(task, np.linalg.inv(h), grid), want)
    assert want.sum() == grid


def test_large_layers_take_one_pass(monkeypatch):
    task = problem(12, 6, (3, 2), damping=0.01)
    monkeypatch.setattr(obs, "MOST_OPERATIONS", 0)
    mask, found = obs.obs(task)(5)
    np.testing.assert_array_equal(mask, obs.by_rows(task, np.linalg.inv(task.hessian), 5))
    np.testing.assert_allclose(found, layers.refitted(task, mask))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_method_prunes_as_planned(two_layers, method, dtype):
    fn, params, batches = two_layers
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
    batches = [jnp.asarray(b, dtype) for b in batches]
    own = {"second/*": {"sparsity": 0.25, "block": (7, 1)}}
    result = sapp.one_shot(fn, params, batches, block=(4, 3), sparsity=0.6, method=method, min_blocks=1, overrides=own)
    sapp.check_pruned(result.params, result.plan)
    chex.assert_trees_all_equal_shapes_and_dtypes(result.params, params)
    for path, layer in result.plan.pruned.items():
        assert int(result.masks[path].sum()) == layer.kept
        kernel = np.asarray(result.params[path.split("/")[0]]["kernel"], np.float32)
        assert not kernel[~spread(np.asarray(result.masks[path]), layer.block, layer.shape)].any()
    assert "second/kernel" in str(result)
    exported = sapp.export(result.params, result.plan)
    chex.assert_trees_all_equal(sapp.todense(exported), result.params)


def test_sensitivity_is_the_loss_with_one_layer_pruned(two_layers):
    fn, params, batches = two_layers
    labels = [np.argmax(fn(params, b), -1) for b in batches]
    loss = optax.softmax_cross_entropy_with_integer_labels
    data = list(zip(batches, labels, strict=True))
    options = {"block": (4, 3), "method": "wanda", "min_blocks": 1}
    found = sapp.sensitivity(fn, params, data, loss, sparsities=(0.9, 0.5, 0.95), **options)
    assert found.sparsities == (0.0, 0.5, 0.9, 0.95)
    for path in ("first/kernel", "second/kernel"):
        for sparsity, got in zip(found.sparsities, found.losses[path], strict=True):
            if found.plan.pruned[path].kept_each_at(sparsity) == 0:
                assert np.isnan(got)
                assert path == "first/kernel"  # the last layer keeps a block for each output
                continue
            own = {"*": {"sparsity": 0.0}, path: {"sparsity": sparsity}}
            # The first pattern that matches decides.
            alone = sapp.one_shot(fn, params, batches, sparsity=0.0, overrides=dict(reversed(own.items())), **options)
            want = np.mean([loss(fn(alone.params, x), y).mean() for x, y in data])
            assert got == pytest.approx(want, rel=1e-5)
    table = str(found).splitlines()
    assert table[0].split()[2:] == ["0%", "50%", "90%", "95%"]
    assert found.weights()["first/kernel"][1] == pytest.approx(140 * 7 / 15)
    assert found.multiply_adds()["first/kernel"][0] == 140 * 32
    ax = found.plot()
    assert len(ax.get_lines()) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_last_layer_keeps_a_block_for_each_output(method):
    """Whatever its size; by its transpose too, where the columns of the leaf are what the product sums over."""
    params = {"first": weights(24, 20), "last": weights(20, 12, seed=2) * np.repeat([1, 1e-3, 1e-3], 4)}

    def fn(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["last"]

    def transposed(params, x):
        return jnp.maximum(x @ params["first"], 0) @ params["last"].T

    options = {"block": 4, "sparsity": 0.8, "min_blocks": 1, "method": method}
    data = inputs(64, 24)
    mask = np.asarray(sapp.one_shot(fn, params, data, **options).masks["last"])
    assert mask.sum() == 3
    assert mask.any(0).all()
    assert not np.asarray(sapp.one_shot(fn, params, data, min_kept=0, **options).masks["last"])[:, 1:].any()
    turned, views = params | {"last": params["last"].T}, {"last": "i o"}
    options |= {"overrides": {"last": {"min_kept": "outputs"}}}
    mask = np.asarray(sapp.one_shot(transposed, turned, data, views=views, **options).masks["last"])
    assert mask.sum() == 5
    assert mask.any(0).all()


def test_a_mask_is_mended_by_its_best_and_worst_blocks():
    """As by choosing the best of each column first, and then the best of all."""
    rng = np.random.default_rng(0)
    task = problem(20, 16, (4, 4))._replace(covered=1)
    for kept in range(4, 21):
        scores = rng.random((5, 4))
        first = scores == scores.max(0)
        want = layers.top(scores + 2 * first, kept)
        np.testing.assert_array_equal(task.covering(layers.top(scores, kept), scores), want)


def test_a_budget_counts_the_blocks_that_stay_whatever_the_sparsity(two_layers):
    fn, params, batches = two_layers
    loss = optax.softmax_cross_entropy_with_integer_labels
    data = [(b, np.argmax(fn(params, b), -1)) for b in batches]
    options = {"block": (4, 3), "min_blocks": 1, "overrides": {"second/kernel": {"min_kept": "outputs"}}}
    found = sapp.sensitivity(fn, params, data, loss, sparsities=(0.5, 0.9), method="magnitude", **options)
    np.testing.assert_allclose(found.weights()["second/kernel"], 98 * np.array([12, 6, 3]) / 12)
    split = sapp.budget(found, share=0.2)
    assert split.overrides["second/kernel"]["min_kept"] == "outputs"
    plan = sapp.plan(params, block=(4, 3), sparsity=0.5, min_blocks=1, overrides=split.overrides)
    assert plan.pruned["second/kernel"].kept >= 3
    real = sum(layer.weights * layer.kept / layer.blocks for layer in plan.pruned.values())
    assert real <= split.limit + 1e-6


def measured(losses):
    """A sensitivity of such losses by layer, whose layers have 100, 200, ... weights."""
    tree = {f"w{i}": np.zeros((10, 10 * (i + 1))) for i in range(len(losses))}
    plan = sapp.plan(tree, block=1, sparsity=0.0)
    steps = tuple(np.linspace(0, 0.9, len(losses[0])).tolist())
    by_path = {f"w{i}": np.asarray(row, float) for i, row in enumerate(losses)}
    return sapp.Sensitivity(plan, steps, float(losses[0][0]), by_path, by_path, dict.fromkeys(by_path, 1.0))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 3), st.sampled_from([0, 1]), st.floats(0.15, 1), st.integers(0, 999))
def test_budget_is_the_best_of_all_combinations(count, options, between, share, seed):
    rng = np.random.default_rng(seed)
    losses = 1 + np.cumsum(rng.normal(0.1, 0.2, (count, options)), 1)
    losses[:, 0] = 1
    found = measured(losses.tolist())
    costs = np.stack([found.weights()[f"w{i}"] for i in range(count)])
    if between:
        costs, losses = ((np.insert(a, range(1, options), (a[:, 1:] + a[:, :-1]) / 2, 1)) for a in (costs, losses))
    best, limit = np.inf, share * costs[:, 0].sum()
    for picks in itertools.product(range(losses.shape[1]), repeat=count):
        if costs[range(count), picks].sum() <= limit * (1 + 1e-9):
            best = min(best, 1 + (losses[range(count), picks] - 1).sum())
    got = sapp.budget(found, share=share, between=between)
    assert got.cost <= limit * (1 + 1e-6)
    assert got.loss == pytest.approx(best, abs=1e-6)
    assert not got.uniform.loss < got.loss - 1e-6
    plan = sapp.plan(
        {f"w{i}": np.zeros((10, 10 * (i + 1))) for i in range(count)},
        block=1,
        sparsity=0.5,
        overrides=got.overrides,
    )
    assert {path: layer.sparsity for path, layer in plan.pruned.items()} == got.sparsities


def test_milliseconds_are_of_each_layer_at_each_sparsity():
    params = {"first": weights(64, 96), "second": weights(96, 64, seed=2), "unused by name": weights(64, 5, seed=3)}

    def fn(params, x):
        for _ in range(2):
            x = jax.nn.relu(x @ params["first"]) @ params["second"]
        return x @ params["unused by name"]

    data = [(inputs(64, 64), np.zeros((64, 5), np.float32))]
    found = sapp.sensitivity(
        fn, params, data, lambda y, t: (y - t) ** 2, sparsities=(0.5, 0.9), block=8, min_blocks=20, method="magnitude"
    )
    costs = sapp.milliseconds(fn, params, found, data[0][0])
    assert set(costs) == {"first", "second"}
    assert all(row.shape == (3,) and (row > 0).all() for row in costs.values())
    assert sapp.budget(found, costs, limit=1e9).uniform.sparsity == 0


def _tied_autoencoder(params, x):
    return jax.nn.relu(x @ params["tied"]["kernel"]) @ params["tied"]["kernel"].T


def test_what_is_wrong_is_said(two_layers):
    fn, params, batches = two_layers
    common = {"block": (4, 3), "sparsity": 0.5, "min_blocks": 1}

    def refused(match, fn=fn, params=params, calibration=batches, error=ValueError, **options):
        with pytest.raises(error, match=match):
            sapp.one_shot(fn, params, calibration, **{**common, **options})

    refused("method must be one of magnitude, wanda, obs, alps, got 'sparsegpt'", method="sparsegpt")
    refused("damping .* got -1", damping=-1)
    refused("no batches", calibration=[])
    refused(r"batch 1 is float32\[5, 10\]", calibration=[batches[0], batches[1][:5]])
    refused("batch 0 has values that are not finite", calibration=[np.full((3, 10), np.nan, np.float32)])
    refused("first/kernel .*linearly dependent.*damping=0: give more", calibration=[batches[0][:4]], damping=0)
    zeros = jax.tree.map(lambda a: 0 * a, params)["first"]["bias"]
    unbiased = {**params, "first": {**params["first"], "bias": zeros}}
    refused("no calibration input reaches any layer", params=unbiased, calibration=[0 * batches[0]])
    refused("calibration is a tuple, which may be several batches", calibration=tuple(batches))
    refused("calibration must be a batch of inputs or a list of batches, got 3", calibration=3)
    refused("calibration must be a batch of inputs or a list of batches, got None", calibration=None)
    bad = jax.tree.map(np.copy, params)
    bad["second"]["kernel"][2, 3] = np.inf
    refused("second/kernel holds 1 NaN or infinite values of 98", params=bad)
    refused("no product or convolution with second/kernel", fn=lambda p, x: x @ p["first"]["kernel"])
    refused(r"with first/kernel .*second/kernel .*Leave these 2 leaves out by `where`", fn=lambda p, x: x)
    refused("the first argument is the function, .* got dict", fn=params, error=TypeError)
    refused("an input is 'train', of type str", calibration=[(batches[0], "train")], reorder=True, error=TypeError)
    square = {"tied": {"kernel": np.eye(10, dtype=np.float32)}}
    refused("tied/kernel is multiplied both as it is and transposed", params=square, fn=_tied_autoencoder)
    refused("second/kernel.*finite", fn=lambda p, x: jnp.log(x @ p["first"]["kernel"] - 1e9) @ p["second"]["kernel"])
    plan = sapp.plan(params, **common)
    with pytest.raises(ValueError, match=r"mask of second/kernel is missing: give a boolean array of shape \(4, 3\)"):
        sapp.refit(fn, params, batches, {"first/kernel": np.ones((3, 5), bool)}, plan)
    with pytest.raises(ValueError, match=r"mask of first/kernel is int64 \(3, 5\)"):
        sapp.refit(fn, params, batches, {"first/kernel": np.ones((3, 5), np.int64)}, plan)


def test_what_is_wrong_with_a_budget_is_said(two_layers):
    fn, params, batches = two_layers
    data, loss = [(b, np.zeros(32, np.int32)) for b in batches], optax.softmax_cross_entropy_with_integer_labels
    with pytest.raises(ValueError, match=r"sparsities must be in \(0, 1\), some of them, got \(\)"):
        sapp.sensitivity(fn, params, data, loss, block=2, sparsities=())
    with pytest.raises(ValueError, match="data has no batches"):
        sapp.sensitivity(fn, params, [], loss, block=2)
    with pytest.raises(ValueError, match="the loss of the network as it was trained is nan"):
        sapp.sensitivity(fn, params, data, lambda y, t: y * jnp.nan, block=2, min_blocks=1)
    found = measured([[1, 1.5, 2], [1, 1.2, 3]])
    for match, options in (
        ("either share or limit; got share=None", {}),
        ("either share or limit; got share=0.5, limit=3", {"share": 0.5, "limit": 3}),
        (r"share .* in \(0, 1\], got 1.5", {"share": 1.5}),
        ("limit of 3 is below 30, the least", {"limit": 3}),
        ("between must be at least 0, got -1", {"share": 0.5, "between": -1}),
        ("costs of w1 are missing", {"share": 0.5, "costs": {"w0": [1, 2, 3]}}),
        (r"costs of w0 are of shape \(2,\): give one for each of the 3", {"share": 0.5, "costs": {"w0": [1, 2]}}),
        ("costs of w0 must be finite", {"share": 0.5, "costs": {"w0": [1, 2, np.nan], "w1": [1, 2, 3]}}),
    ):
        with pytest.raises(ValueError, match=match):
            sapp.budget(found, **options)
