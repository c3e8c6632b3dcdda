"""The same calls prune networks of flax linen, flax nnx and plain arrays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sa_plus_plus as sapp

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS = 40


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (3, 3))(x)).mean((1, 2))
        return nn.Dense(3)(nn.relu(nn.Dense(50)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 12, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(12, 50, rngs=rngs)])
        self.head = nnx.Linear(50, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.head(nnx.relu(self.hidden[0](x)))


def plain(params, x):
    return jnp.tanh(x.reshape(len(x), -1) @ params["w"][0] + params["b"][0]) @ params["w"][1] + params["b"][1]


def data():
    x = jax.random.normal(jax.random.key(0), (64, 5, 5, 2))
    return x, jnp.argmax(x[:, :3, 0, 0], -1)


def algorithm():
    phases = sapp.phases.sequential_attention(STEPS)
    return sapp.sequential_attention(block=(2, 2), sparsity=0.8, phases=phases, min_blocks=50)


def trained(params, predict):
    """Prune by the one line; returns parameters, state and losses."""
    tx = sapp.sparsify(optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale(-0.1)), algorithm())
    state, (x, y), losses = tx.init(params), data(), []

    @jax.jit
    def step(params, state):
        def loss(p):
            return optax.softmax_cross_entropy_with_integer_labels(predict(p, x), y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    return params, state, losses


def check(params, state, losses, paths):
    plan = algorithm().plan(params)
    assert set(plan.pruned) == set(paths)
    assert losses[-1] < losses[0]
    leaves = {sapp.path_string(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, layer in plan.pruned.items():
        alive = np.asarray(sapp.blocks.frobenius(leaves[path], layer.block)) > 0
        assert alive.sum() == layer.kept
        np.testing.assert_array_equal(alive, state.prune.masks[path])


def test_flax_linen():
    model = Linen()
    params = model.init(jax.random.key(1), data()[0])
    paths = {"params/Conv_0/kernel", "params/Dense_0/kernel", "params/Dense_1/kernel"}
    check(*trained(params, model.apply), paths)


def test_flax_nnx_state():
    graph, params, rest = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param, ...)

    def predict(params, x):
        return nnx.merge(graph, params, rest, copy=True)(x)

    params, state, losses = trained(params, predict)
    check(params, state, losses, {"conv/kernel", "hidden/0/kernel", "head/kernel"})
    assert nnx.merge(graph, params, rest)(data()[0]).shape == (64, 3)


def test_flax_nnx_optimizer():
    model = Nnx(nnx.Rngs(0))
    tx = sapp.sparsify(optax.chain(sapp.reset_on(optax.scale_by_adam()), optax.scale(-0.01)), algorithm())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x, y = data()

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    params = nnx.state(model, nnx.Param)
    check(params, optimizer.opt_state, losses, {"conv/kernel", "hidden/0/kernel", "head/kernel"})


def test_plain_arrays():
    keys = jax.random.split(jax.random.key(2))
    kernels = (jax.random.normal(keys[0], (50, 21)) / 7, jax.random.normal(keys[1], (21, 3)) / 5)
    params = {"w": kernels, "b": [jnp.zeros(21), jnp.zeros(3)]}
    check(*trained(params, plain), {"w/0"})
