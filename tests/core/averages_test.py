"""Averages of the weights of networks that are pruned meanwhile, against sums in NumPy."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sa_plus_plus as sapp

RNG = np.random.default_rng(0)
STEPS = 30


def weighted_mean(history, decay):
    """By its definition, in float64: the mean of each entry over the steps since it was last zero."""
    history = np.asarray(history, np.float64)
    average = np.zeros(history.shape[1:])
    for where in np.ndindex(average.shape):
        values = history[(slice(None), *where)]
        since = np.flatnonzero(values == 0).max(initial=-1) + 1
        weights = float(decay) ** np.arange(len(values) - since)[::-1]
        if weights.size:
            average[where] = weights @ values[since:] / weights.sum()
    return average


@pytest.mark.parametrize("decay", [0, 0.5, 0.9, 0.99999, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_weight_is_averaged_since_it_was_last_zero(decay, dtype):
    alive = RNG.random((STEPS, 3, 4)) < np.linspace(0.2, 1, 12).reshape(3, 4)
    history = jnp.asarray(RNG.standard_normal((STEPS, 3, 4)) * alive, dtype)
    ema = sapp.ema(decay)
    average = ema.init({"w": history[0], "n": jnp.int32(7)})  # does not count
    np.testing.assert_array_equal(ema.params(average, {"w": history[0], "n": jnp.int32(7)})["w"], history[0])
    update = jax.jit(ema.update, donate_argnums=0)
    for i, w in enumerate(history):
        average = update(average, {"w": w, "n": jnp.int32(i)})
    params = ema.params(average, {"w": history[-1], "n": jnp.int32(STEPS)})
    want = weighted_mean(history, decay)
    assert 0 < np.count_nonzero(want) < want.size
    assert params["w"].dtype == dtype
    assert params["n"] == STEPS
    np.testing.assert_allclose(average.average["w"], want, rtol=2e-5, atol=1e-6)  # float32 inside
    np.testing.assert_array_equal(np.asarray(params["w"]) == 0, want == 0)
    np.testing.assert_allclose(np.asarray(params["w"], np.float64), want, rtol=1e-6 if dtype == "float32" else 4e-3)


def problem():
    x = jnp.asarray(RNG.standard_normal((32, 16), np.float32))
    params = {"in": jax.random.normal(jax.random.key(1), (16, 16)) / 4, "out": jnp.ones((16, 1)) / 4}
    return params, lambda p: jnp.mean((jnp.tanh(x @ p["in"]) @ p["out"] - x[:, :1] ** 2) ** 2)


@pytest.mark.parametrize("algorithm", ["sequential_attention", "acdc"])
def test_the_average_is_pruned_whenever_the_network_is(algorithm):
    params, loss = problem()
    make = getattr(sapp, algorithm)
    phases = getattr(sapp.phases, algorithm)(STEPS)
    sp = make(block=4, sparsity=0.75, phases=phases, min_blocks=2)
    tx = sapp.sparsify(optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale(-0.05)), sp)
    ema = sapp.ema(0.9)

    @jax.jit
    def step(params, state, average, plain):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return params, state, ema.update(average, params), jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, plain, params)

    state = tx.init(params)
    average, plain, history = ema.init(params), params, []
    for _ in range(STEPS):
        params, state, average, plain = step(params, state, average, plain)
        history.append(params)
    averaged, plan = ema.params(average, params), sp.plan(params)
    sapp.check_pruned(averaged, plan)
    with pytest.raises(ValueError, match="an average of weights"):
        sapp.check_pruned(plain, plan)
    for name in params:
        np.testing.assert_array_equal(averaged[name] == 0, params[name] == 0)
        np.testing.assert_allclose(averaged[name], weighted_mean([p[name] for p in history], 0.9), rtol=1e-5, atol=1e-6)


def test_the_explicit_form_is_averaged_as_the_loss_sees_it():
    params, loss = problem()
    phases = sapp.phases.sequential_attention(STEPS)
    sp = sapp.sequential_attention(block=4, sparsity=0.75, phases=phases, min_blocks=2)
    ema = sapp.ema(0.8)
    trainable, prune = sp.init(params)
    average, history = ema.init(params), []

    @jax.jit
    def step(trainable, prune, average):
        grads = jax.grad(lambda t: loss(sp.apply(t, prune)))(trainable)
        trainable, prune = sp.update(jax.tree.map(lambda t, g: t - 0.1 * g, trainable, grads), prune)
        effective = sp.apply(trainable, prune)
        return trainable, prune, ema.update(average, effective), effective

    for _ in range(STEPS):
        trainable, prune, average, effective = step(trainable, prune, average)
        history.append(effective["in"])
    final = sp.finalize(trainable, prune)
    averaged = ema.params(average, final)
    sapp.check_pruned(averaged, sp.plan(params))
    np.testing.assert_allclose(averaged["in"], weighted_mean(history, 0.8), rtol=1e-5, atol=1e-6)


def test_with_a_decay_of_zero_the_average_is_the_network():
    average = sapp.ema(0)
    params = {"w": jnp.float32([1e4, np.inf, 3.0])}
    state = average.update(average.init(params), params)
    params = {"w": jnp.float32([1e-5, 2.0, -3.0])}
    state = average.update(state, params)
    np.testing.assert_array_equal(average.params(state, params)["w"], params["w"])


def test_counts_stop_where_they_no_longer_matter():
    for decay, kind in ((0.999, "uint16"), (0.9999, "uint32")):
        ema = sapp.ema(decay)
        state = ema.init(jnp.ones(2))
        assert state.count.dtype == kind
        full = state._replace(count=jnp.full(2, jnp.iinfo(kind).max, kind), average=jnp.zeros(2))
        after = ema.update(full, jnp.array([1.0, 0.0]))
        np.testing.assert_array_equal(after.count, [jnp.iinfo(kind).max, 0])
        np.testing.assert_allclose(after.average, [1 - decay, 0], rtol=1e-3)


def test_trees_as_loops_have_them():
    ema = sapp.ema(0.5)
    model = {"w": jnp.ones(2), "none": None, "key": jax.random.key(3), "activation": jax.nn.relu}
    average = ema.init({**model, "activation": None})
    average = ema.update(ema.update(average, model), model | {"w": 4 * jnp.ones(2)})
    averaged = ema.params(average, model)
    assert averaged["activation"] is jax.nn.relu
    assert averaged["none"] is None
    np.testing.assert_allclose(averaged["w"], 3)  # (0.5 * 1 + 4) / 1.5
    assert jnp.array_equal(jax.random.key_data(averaged["key"]), jax.random.key_data(model["key"]))
    with pytest.raises(ValueError, match=r"the parameters hold w with the shape \(3,\)"):
        ema.update(average, model | {"w": jnp.ones(3)})
    with pytest.raises(TypeError, match="activation is not an array"):
        ema.init(model)


def test_no_result_shares_a_buffer_with_an_argument():
    ema, params = sapp.ema(0.9), {"w": jnp.ones(4), "n": jnp.arange(3)}
    average = ema.init(params)
    after = ema.update(average, params)
    averaged = ema.params(after, params)
    jax.tree.map(lambda x: x.delete(), (average, params))
    assert jax.tree.map(np.sum, (after.average, averaged))[1] == {"w": 4, "n": 3}


@pytest.mark.parametrize("decay", [-0.1, 1.5, "0.9", True, None, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"decay=.* is not a number from 0"):
        sapp.ema(decay)


@pytest.mark.usefixtures("standard_promotion")
def test_a_keras_model_has_the_average_at_the_end_of_fit():
    keras = pytest.importorskip("keras", reason="keras is not installed")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend than JAX")
    from sa_plus_plus.contrib.keras import optax_optimizer  # noqa: PLC0415 - optional

    history = []

    class Weights(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            history.append({v.path: np.array(v.value) for v in self.model.trainable_variables})

    x = RNG.standard_normal((8, 12)).astype(np.float32)
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    sp = sapp.magnitude(block=4, sparsity=0.75, phases=sapp.phases.magnitude(12), min_blocks=6)
    tx = sapp.sparsify(optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale(-0.01)), sp)
    model.compile(optimizer=optax_optimizer(tx, ema=sapp.ema(0.8)), loss="mse")
    model.fit(x, x[:, :1], batch_size=4, epochs=6, verbose=0, callbacks=[Weights()])
    params = {v.path: v.value for v in model.trainable_variables}
    sapp.check_pruned(params, sp.plan(params))
    assert len(history) == 12
    for path, w in params.items():
        want = weighted_mean([weights[path] for weights in history], 0.8)
        np.testing.assert_allclose(w, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match=r"takes ema=sapp\.ema\(0\.999\) or None, got ema=0\.9"):
        optax_optimizer(tx, ema=0.9)
