"""Reordering while training: the function stays the same, and so does what is learned, whatever the order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sa_plus_plus as sapp
from sa_plus_plus.reordering import axes, orders, states

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax's Adam mixes integers and floats

SIZES, STEPS = (12, 32, 24, 6), 12
OPTIONS = {"block": 4, "sparsity": 0.75, "min_blocks": 12}
DENSE_FIRST = sapp.phases.custom(STEPS, [("dense", 4), ("sparsification", 4), ("sparse", 4)])
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, SIZES[0])).astype(np.float32)
Y = RNG.normal(size=(64, SIZES[-1])).astype(np.float32)
CHOOSING_BY_WEIGHTS = {
    "attention": functools.partial(sapp.sequential_attention, score="effective", phases=DENSE_FIRST),
    "gradual": functools.partial(sapp.gradual_magnitude, phases=DENSE_FIRST),
    "powerpropagation": functools.partial(sapp.powerpropagation, phases=DENSE_FIRST),
    "gates": functools.partial(sapp.d_gating, phases=DENSE_FIRST),
}
OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "momentum": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    "by kind": optax.multi_transform(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(0.1, momentum=0.9)},
        lambda tree: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", tree),
    ),
}


def start(seed=0):
    rng = np.random.default_rng(seed)
    layers = {
        name: {"kernel": rng.normal(size=(m, n)) / np.sqrt(m), "bias": rng.normal(size=n) * 0.1}
        for name, m, n in zip("abc", SIZES, SIZES[1:], strict=False)
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), layers)


def network(params, x):
    for name in "ab":
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["c"]["kernel"] + params["c"]["bias"][None]


def loss(params):
    return jnp.mean((network(params, X) - Y) ** 2)


def stepper(tx):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def trained(step, params, state, steps):
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def random_order(params, side=1, seed=3):
    """Of both hidden layers, in pieces of `side` neighbours that stay neighbours."""
    found = axes.find(network, params, X)
    rng = np.random.default_rng(seed)

    def one(size):
        return np.add.outer(side * rng.permutation(size // side), np.arange(side)).ravel()

    return orders.order_of(found, {group.name: one(group.size) for group in found.groups.values()})


def moved(tx, order, params, state):
    """The loop's state in a given order."""
    new = states.permuted(tx.sparsifier, order, states.Training(*state))
    return tx.sparsifier.apply(new.trainable, new.prune), sapp.SparsifyState(*new)


def assert_close(tree, want, **tolerances):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerances), tree, want)


@pytest.mark.parametrize("name", CHOOSING_BY_WEIGHTS)
@pytest.mark.parametrize("steps", [0, 3, 6])
def test_the_function_stays_the_same(name, steps):
    """At the start, in the dense phase, and with some blocks masked."""
    tx = sapp.sparsify(OPTIMIZERS["adamw"], CHOOSING_BY_WEIGHTS[name](**OPTIONS))
    step, params = stepper(tx), start()
    params, state = trained(step, params, tx.init(params), steps)
    found = sapp.reorder_training(network, params, state, tx, X)
    if steps < 6:  # with masks, the order that there is may be the best
        assert any((found.order.permutations[g.name] != np.arange(g.size)).any() for g in found.order.groups)
    np.testing.assert_allclose(loss(found.params), loss(params), rtol=1e-5)
    np.testing.assert_allclose(network(found.params, X), network(params, X), rtol=1e-4, atol=1e-5)
    assert all(share.after >= share.before for share in found.shares.values())
    assert int(found.opt_state.prune.step) == steps
    params, state = trained(step, found.params, found.opt_state, STEPS - steps)
    sapp.check_pruned(params, tx.plan(params))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_are_trained_alike_in_any_order(optimizer):
    """Moments move with the weights: of a random order of units, before or during a dense phase, nothing is left."""
    tx = sapp.sparsify(OPTIMIZERS[optimizer], CHOOSING_BY_WEIGHTS["gradual"](**OPTIONS))
    step, params = stepper(tx), start()
    order = random_order(params)
    want, _ = trained(step, params, tx.init(params), 4)
    for before in (0, 2):
        state = trained(step, params, tx.init(params), before)
        got, _ = trained(step, *moved(tx, order, *state), 4 - before)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), order.inverse.apply(got), want
        )


@pytest.mark.parametrize("name", CHOOSING_BY_WEIGHTS)
def test_whole_blocks_may_change_places_without_any_effect(name):
    """Logits and masks move with the blocks: the pruned network is the same."""
    tx = sapp.sparsify(OPTIMIZERS["momentum"], CHOOSING_BY_WEIGHTS[name](**OPTIONS))
    step, params = stepper(tx), start()
    order = random_order(params, side=4)
    want, _ = trained(step, params, tx.init(params), STEPS)
    for before in (0, 4):
        state = trained(step, params, tx.init(params), before)
        got, _ = trained(step, *moved(tx, order, *state), STEPS - before)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), order.inverse.apply(got), want
        )


def test_a_block_gets_the_mean_of_its_weights_logits():
    sp = CHOOSING_BY_WEIGHTS["attention"](**OPTIONS)
    params = start()
    order = random_order(params)
    trainable, prune = sp.init(params)
    logits = {path: jnp.asarray(RNG.normal(size=x.shape), jnp.float32) for path, x in trainable.logits.items()}
    found = states.permuted(sp, order, states.Training(trainable._replace(logits=logits), prune, ()))
    rows, cols = (order.permutations[f"{name}/kernel axis 1"] for name in "ab")
    wide = np.kron(logits["b/kernel"], np.ones((4, 4)))[np.ix_(rows, cols)]
    np.testing.assert_allclose(
        found.trainable.logits["b/kernel"], wide.reshape(8, 4, 6, 4).mean((1, 3)), rtol=1e-5, atol=1e-6
    )


def test_gradients_that_are_accumulated_outside_and_running_averages_move_too():
    inner = sapp.sparsify(OPTIMIZERS["momentum"], CHOOSING_BY_WEIGHTS["gradual"](**OPTIONS))
    tx = optax.MultiSteps(inner, 3)
    params, scale = start(), jnp.asarray(RNG.random(SIZES[1]), jnp.float32)

    def fn(params, scale, x):
        hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None]) * scale[None]
        hidden = jax.nn.relu(hidden @ params["b"]["kernel"] + params["b"]["bias"][None])
        return hidden @ params["c"]["kernel"] + params["c"]["bias"][None]

    grads = jax.grad(loss)(params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    found = sapp.reorder_training(fn, params, state, inner, X, model_state=scale)
    np.testing.assert_allclose(fn(found.params, found.model_state, X), fn(params, scale, X), rtol=1e-4, atol=1e-5)
    order = found.order.permutations["params/a/kernel axis 1"]
    assert (order != np.arange(SIZES[1])).any()
    np.testing.assert_array_equal(found.model_state, scale[order])
    np.testing.assert_array_equal(found.opt_state.acc_grads["a"]["bias"], state.acc_grads["a"]["bias"][order])


def test_what_cannot_be_reordered_is_said():
    tx = sapp.sparsify(OPTIMIZERS["momentum"], CHOOSING_BY_WEIGHTS["gradual"](**OPTIONS))
    params = start()
    params, state = trained(stepper(tx), params, tx.init(params), 8)
    with pytest.raises(ValueError, match=r"after step 8 .* sparse \[8, 12\), whose blocks are chosen"):
        sapp.reorder_training(network, params, state, tx, X)
    with pytest.raises(TypeError, match="takes what sparsify returned"):
        sapp.reorder_training(network, params, state, optax.adam(1e-3), X)
    with pytest.raises(ValueError, match="scores must be one of"):
        sapp.reorder_training(network, params, state, tx, X, scores="luck")
    with pytest.raises(ValueError, match="have another structure"):
        sapp.reorder_training(network, {"a": params["a"]}, state, tx, X)
    factored = sapp.sparsify(optax.adafactor(1e-2, min_dim_size_to_factor=4), CHOOSING_BY_WEIGHTS["gradual"](**OPTIONS))
    with pytest.raises(ValueError, match=r"cannot permute .*v_row.* its shape \(12,\) is not \(12, 32\)"):
        sapp.reorder_training(network, start(), factored.init(start()), factored, X)
    by_axes = sapp.sparsify(optax.sm3(1e-2), CHOOSING_BY_WEIGHTS["gradual"](**OPTIONS))
    with pytest.raises(ValueError, match=r"cannot permute .*mu.*a/bias/0 .* one of several arrays for a/bias"):
        sapp.reorder_training(network, start(), by_axes.init(start()), by_axes, X)


def test_logits_are_told_from_parameters_of_the_same_name():
    """By their shapes: in a flat tree both are called by the layer's path."""
    params = {name: layer["kernel"] for name, layer in start().items()}

    def fn(params, x):
        return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["b"]) @ params["c"]

    tx = sapp.sparsify(OPTIMIZERS["adamw"], CHOOSING_BY_WEIGHTS["attention"](**OPTIONS))
    state = tx.init(params)
    moments = state.inner[0].mu
    moments = moments._replace(
        logits=jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape) * 1.0, moments.logits)
    )
    state = state._replace(inner=(state.inner[0]._replace(mu=moments), *state.inner[1:]))
    found = sapp.reorder_training(fn, params, state, tx, X)
    after = found.opt_state.inner[0].mu.logits["b"]
    assert after.shape == moments.logits["b"].shape
    np.testing.assert_allclose(after.mean(), moments.logits["b"].mean(), rtol=1e-5)
    assert not np.array_equal(after, moments.logits["b"])
