"""The one line in a loop of each framework: which matrices are pruned, files, and specialised networks.

The network is the same in all of them: a convolution, layers of attention (stacked where the framework stacks them),
and two dense layers. All sides are multiples of a block's and no matrix is square, so that reading one the wrong way
round shows.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sa_plus_plus as sapp

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS, BLOCK, LAYERS = 40, 4, 3
IMAGES = np.random.default_rng(0).standard_normal((16, 4, 4, 8), np.float32)
TARGETS = np.sin(IMAGES[:, 0, :, :2].reshape(16, 8) @ np.random.default_rng(1).standard_normal((8, 8), np.float32))
SP = sapp.sequential_attention(
    block=BLOCK, sparsity=0.75, phases=sapp.phases.sequential_attention(STEPS), min_blocks=16
)


def optimizer():
    tx = optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale(-0.02))
    return sapp.sparsify(tx, SP)  # the one line


def error(y):
    return jnp.mean((y - TARGETS) ** 2)


def trained(params, predict):
    """A loop as for plain arrays."""
    tx = optimizer()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: error(predict(p, IMAGES)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        values.append(value)
    assert values[-1] < values[0]
    return params


def check(params, matrices, predict, file):
    """Holds pruned parameters to what a human reads them as.

    Args:
      params: that training ended with.
      matrices: for each leaf to be pruned, by path, a function that writes it as `(stack, rows, cols)`.
      predict: `predict(params, x)`.
      file: where to save them.
    """
    plan = SP.plan(params)
    assert set(plan.pruned) == set(matrices), plan
    sapp.check_pruned(params, plan)
    leaves = {sapp.path_string(keys): np.asarray(leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    zero = 0
    for path, written in matrices.items():
        stacked, layer = written(leaves[path]), plan.pruned[path]
        stack, rows, cols = stacked.shape
        tiles = stacked.reshape(stack, rows // BLOCK, BLOCK, cols // BLOCK, BLOCK) != 0
        alive = tiles.any((2, 4))
        assert layer.grid == alive.shape[1:], f"{path}: {layer}"
        np.testing.assert_array_equal(alive, tiles.all((2, 4)), path)  # blocks are whole
        np.testing.assert_array_equal(alive.sum((1, 2)), layer.grid[0] * layer.grid[1] // 4, path)
        assert not layer.assumed, path
        zero += stacked.size - np.count_nonzero(stacked)
    assert plan.sparsity == pytest.approx(zero / plan.kernel_weights)

    exported = sapp.export(params, plan)
    sapp.save(file, exported)
    loaded = sapp.todense(sapp.load(file, like=exported))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

    network = jax.jit(lambda x: predict(loaded, x))
    fast = sapp.specialize(network, IMAGES, plan=plan, mode="always")
    np.testing.assert_allclose(fast(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)
    by_blocks = sum(choice.sparse for choice in fast.choices)
    assert by_blocks == sum(len(written(leaves[path])) for path, written in matrices.items())


def last(w):
    """One matrix, of all axes but the last and the last."""
    return w.reshape(1, -1, w.shape[-1])


# Flax kernels of attention: inputs, heads, their width; and the other way round.
FLAX_STACK = {
    **{f"attention/{name}/kernel": lambda w: w.reshape(LAYERS, 16, 24) for name in ("query", "key", "value")},
    "attention/out/kernel": lambda w: w.reshape(LAYERS, 24, 16),
}
FLAX = {
    "conv/kernel": last,
    **{f"layers/{path}": written for path, written in FLAX_STACK.items()},
    "wide/kernel": last,
    "head/kernel": last,
}


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        return x + nn.MultiHeadDotProductAttention(2, qkv_features=24, name="attention")(y), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="conv")(x)).reshape(len(x), 16, 16)
        stack = nn.scan(LinenLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(8, name="head")(nn.relu(nn.Dense(32, name="wide")(x.mean(1))))


def test_flax_linen(tmp_path):
    model = Linen()
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]

    def predict(params, x):
        return model.apply({"params": params}, x)

    check(trained(params, predict), FLAX, predict, tmp_path / "file")


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, qkv_features=24, decode=False, rngs=rngs)

    def __call__(self, x):
        return x + self.attention(self.norm(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(NnxLayer))(rngs)
        self.wide = nnx.Linear(16, 32, rngs=rngs)
        self.head = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x)).reshape(len(x), 16, 16)
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        return self.head(nnx.relu(self.wide(x.mean(1))))


def test_flax_nnx(tmp_path):
    model = nnx.jit(Nnx)(nnx.Rngs(0))
    optim = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optim):
        value, grads = nnx.value_and_grad(lambda model: error(model(IMAGES)))(model)
        optim.update(model, grads)
        return value

    values = [step(model, optim) for _ in range(STEPS)]
    assert values[-1] < values[0]
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    check(params, FLAX, lambda params, x: nnx.merge(graph, params, rest, copy=True)(x), tmp_path / "file")


def test_equinox(tmp_path):
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")

    class Layer(eqx.Module):
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention

        def __init__(self, key):
            self.norm = eqx.nn.LayerNorm(16)
            self.attention = eqx.nn.MultiheadAttention(2, 16, qk_size=12, vo_size=12, key=key)

        def __call__(self, x):
            y = jax.vmap(self.norm)(x)
            return x + self.attention(y, y, y)

    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        layers: Layer
        wide: eqx.nn.Linear
        head: eqx.nn.Linear
        activation: object  # a leaf, but no array
        size: int = eqx.field(static=True)

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.conv = eqx.nn.Conv2d(8, 16, 3, padding=1, key=keys[0])
            self.layers = eqx.filter_vmap(Layer)(jax.random.split(keys[1], LAYERS))
            self.wide, self.head = eqx.nn.Linear(16, 32, key=keys[2]), eqx.nn.Linear(32, 8, key=keys[3])
            self.activation, self.size = jax.nn.relu, 16

        def __call__(self, x):
            x = self.activation(self.conv(x.transpose(2, 0, 1))).reshape(self.size, -1).T
            arrays, rest = eqx.partition(self.layers, eqx.is_array)
            x, _ = jax.lax.scan(lambda x, layer: (eqx.combine(layer, rest)(x), None), x, arrays)
            return self.head(self.activation(self.wide(x.mean(0))))

    model, tx = eqx.filter_jit(Model)(jax.random.key(0)), optimizer()
    state = tx.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state):
        value, grads = eqx.filter_value_and_grad(lambda model: error(jax.vmap(model)(IMAGES)))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, value

    values = []
    for _ in range(STEPS):
        model, state, value = step(model, state)
        values.append(value)
    assert values[-1] < values[0]
    params, static = eqx.partition(model, eqx.is_array)
    matrices = {
        "conv/weight": lambda w: w.transpose(2, 3, 1, 0).reshape(1, 72, 16),
        **{
            f"layers/attention/{name}_proj/weight": lambda w: w.transpose(0, 2, 1)
            for name in ("query", "key", "value", "output")
        },
        "wide/weight": lambda w: w.T[None],
        "head/weight": lambda w: w.T[None],
    }
    check(params, matrices, lambda params, x: jax.vmap(eqx.combine(params, static))(x), tmp_path / "file")


def test_equinox_may_pass_the_whole_model_where_a_part_is_trained():
    """As its documentation does; integers, booleans and random keys in the model stay as they are."""
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")

    class Model(eqx.Module):
        linear: eqx.nn.Linear
        activation: object
        table: jax.Array
        switch: jax.Array
        key: jax.Array
        rate: float

    linear = eqx.nn.Linear(16, 32, key=jax.random.key(0))
    model = Model(linear, jax.nn.relu, jnp.arange(3), jnp.asarray([True, False]), jax.random.key(1), 0.5)
    sp = sapp.magnitude(block=BLOCK, sparsity=0.75, phases=sapp.phases.custom(1, [("sparse", 1)]), min_blocks=16)
    tx = sapp.sparsify(sapp.reset_on(optax.adamw(0.1, weight_decay=0.1)), sp)
    x = IMAGES[:, 0, 0].repeat(2, axis=1)
    grads = eqx.filter_grad(lambda model: jnp.mean(model.activation(jax.vmap(model.linear)(x)) ** 2))(model)

    def trained(first, then):
        updates, _ = tx.update(grads, tx.init(eqx.filter(model, first)), eqx.filter(model, then))
        own = eqx.apply_updates(model, updates)
        sapp.check_pruned(own, sp.plan(own))
        return own

    expected = trained(eqx.is_inexact_array, eqx.is_inexact_array)
    assert not np.array_equal(expected.linear.weight, model.linear.weight)
    for first in (eqx.is_inexact_array, eqx.is_array):
        for then in (eqx.is_inexact_array, eqx.is_array, lambda leaf: True):
            own = trained(first, then)
            for leaf in ("table", "switch", "rate"):
                np.testing.assert_array_equal(getattr(own, leaf), getattr(model, leaf))
            assert own.activation is jax.nn.relu
            np.testing.assert_array_equal(*(jax.random.key_data(m.key) for m in (own, model)))
            np.testing.assert_array_equal(own.linear.weight, expected.linear.weight)
            np.testing.assert_array_equal(own.linear.bias, expected.linear.bias)
    with pytest.raises(TypeError, match=r"activation is not an array of .*eqx\.filter\(model, eqx\.is_inexact"):
        tx.init(model)


def test_haiku(tmp_path):
    hk = pytest.importorskip("haiku", reason="Haiku is not installed")

    def layer(x):
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        init = hk.initializers.VarianceScaling()
        attention = hk.MultiHeadAttention(2, 12, model_size=16, w_init=init, name="attention")
        return x + attention(y, y, y)

    def forward(x):
        x = jax.nn.relu(hk.Conv2D(16, 3, name="conv")(x)).reshape(len(x), 16, 16)
        x = hk.experimental.layer_stack(LAYERS, name="layers")(layer)(x)
        return hk.nets.MLP([32, 8], name="mlp")(x.mean(1))

    model = hk.without_apply_rng(hk.transform(forward))
    matrices = {
        "conv/w": last,
        **{f"layers/attention/{name}/w": lambda w: w for name in ("query", "key", "value", "linear")},
        "mlp/~/linear_0/w": last,
        "mlp/~/linear_1/w": last,
    }
    params = trained(jax.jit(model.init)(jax.random.key(0), IMAGES), model.apply)
    check(params, matrices, model.apply, tmp_path / "file")
    assert sapp.load(tmp_path / "file").keys() == params.keys()  # slashes in keys come back


def keras_on_jax():
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras runs on {keras.backend.backend()}, not on JAX")
    return keras


@pytest.fixture
def keras_model():
    keras = keras_on_jax()
    keras.utils.set_random_seed(0)
    inputs = keras.Input(IMAGES.shape[1:])
    x = keras.layers.Conv2D(16, 3, padding="same", activation="relu", name="conv")(inputs)
    x = keras.layers.Reshape((16, 16))(x)
    y = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(2, 12, name="attention")(y, y)])
    x = keras.layers.GlobalAveragePooling1D()(x)
    x = keras.layers.Dense(32, activation="relu", name="wide")(x)
    return keras.Model(inputs, keras.layers.Dense(8, name="head")(x))


def by_path(model):
    return {v.path: jnp.copy(v.value) for v in model.trainable_variables}


def keras_predict(model):
    rest = [v.value for v in model.non_trainable_variables]

    def predict(params, x):
        return model.stateless_call([params[v.path] for v in model.trainable_variables], rest, x)[0]

    return predict


KERAS = {
    "conv/kernel": last,
    **{f"attention/{name}/kernel": lambda w: w.reshape(1, 16, 24) for name in ("query", "key", "value")},
    "attention/attention_output/kernel": lambda w: w.reshape(1, 24, 16),
    "wide/kernel": last,
    "head/kernel": last,
}


def test_keras(keras_model, tmp_path):
    from sa_plus_plus.contrib.keras import optax_optimizer  # noqa: PLC0415 - optional

    predict = keras_predict(keras_model)
    params = trained(by_path(keras_model), predict)
    check(params, KERAS, predict, tmp_path / "file")

    keras_model.compile(optimizer=optax_optimizer(optimizer()), loss="mse")
    keras_model.fit(IMAGES, TARGETS, batch_size=len(IMAGES), epochs=STEPS, shuffle=False, verbose=0)
    fitted = by_path(keras_model)
    sapp.check_pruned(fitted, SP.plan(fitted))
    for path in params:
        np.testing.assert_array_equal(fitted[path] == 0, params[path] == 0)
        np.testing.assert_allclose(fitted[path], params[path], rtol=1e-3, atol=1e-5)


def test_keras_optimizer():
    keras = keras_on_jax()
    from sa_plus_plus.contrib.keras import optax_optimizer  # noqa: PLC0415 - optional

    with pytest.raises(TypeError, match=r"takes an optax transformation such as .*, got 'adam'"):
        optax_optimizer("adam")

    def run(names, state=None):
        optim = optax_optimizer(optax.sgd(0.5, momentum=0.9))
        weights = [keras.Variable(np.ones(2, np.float32), name=name) for name in names]
        pairs = [(jnp.full(2, i + 1.0), v) for i, v in enumerate(weights)]
        optim.build(weights)
        if state:
            optim.set_weights(state)
        optim.apply_gradients(pairs[::-1])  # in another order than it was built with
        return optim, [float(v.value[0]) for v in weights]

    optim, values = run(["dense_8", "dense_9", "dense_10"])
    assert values == [1 - 0.5, 1 - 1, 1 - 1.5]
    again, values = run(["dense_11", "dense_12", "dense_13"], [v.value for v in optim.variables])
    np.testing.assert_allclose(values, [1 - 0.5 * 1.9, 1 - 1.9, 1 - 1.5 * 1.9], rtol=1e-6)
    assert int(again.iterations) == 2
    with pytest.raises(ValueError, match="built without 'other'"):
        again.apply_gradients([(jnp.ones(2), keras.Variable(np.ones(2, np.float32), name="other"))])
    weights = [keras.Variable(np.ones(2, np.float32), name="a")] * 2
    with pytest.raises(ValueError, match=r"the learning rate cannot be set to 0\.1: it is inside"):
        optim.learning_rate = 0.1
    with pytest.raises(ValueError, match="two variables of the model have the path 'a'"):
        optax_optimizer(optax.sgd(0.1)).build(weights)
