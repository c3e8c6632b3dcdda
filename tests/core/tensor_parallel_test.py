"""Kernels split over a `model` axis: masks and logits follow them, results are one device's, no kernel is gathered."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sa_plus_plus as sapp

P = PartitionSpec
STEPS = 30
SPLIT = {
    "up": P(None, "model"),
    "down": P("model", None),
    "query": P(None, "model", None),
    "layers": P(None, None, "model"),
}
VIEWS = {"query": "d (h k)", "layers": "[l] i o"}


def params():
    shapes = {"up": (64, 128), "down": (128, 64), "query": (64, 4, 32), "layers": (2, 64, 64)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: jax.random.normal(key, shape) / 8 for (name, shape), key in zip(shapes.items(), keys, strict=True)}


def loss(params, x):
    y = jnp.tanh(x @ params["up"]) @ params["down"]
    for layer in range(2):
        y = y + jnp.tanh(y @ params["layers"][layer])
    scores = jnp.einsum("bd,dhk->bhk", y, params["query"])
    return jnp.mean(scores**2) + jnp.mean((y - x) ** 2)


def sparsifier(name):
    return problems.sparsifier(name, STEPS, block=(8, 8), sparsity=0.75, min_blocks=16, views=VIEWS)


TX = optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale(-0.5))


def start(sp, params):
    trainable, prune = sp.init(params)
    return trainable, prune, TX.init(trainable)


def step_of(sp):
    def step(state, x):
        trainable, prune, opt_state = state
        grads = jax.grad(lambda t: loss(sp.apply(t, prune), x))(trainable)
        updates, opt_state = TX.update(grads, opt_state, trainable, phase=prune.phase)
        return (*sp.update(trainable, prune, updates), opt_state)

    return step


def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("name", ["sequential_attention", "acdc", "powerpropagation"])
def test_kernels_split_over_devices(name):
    sp, devices = sparsifier(name), mesh()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)), jnp.float32)
    split = {path: jax.device_put(w, NamedSharding(devices, SPLIT[path])) for path, w in params().items()}
    state = start(sp, split)
    grids = [state[1].masks] + ([state[0].logits] if state[0].logits else [])
    for grid in grids:
        assert {path: g.sharding.spec for path, g in grid.items()} == {
            "up": P(None, "model"),
            "down": P("model", None),
            "query": P(None, "model"),
            "layers": P(None, None, "model"),
        }
    everywhere = NamedSharding(devices, P())
    state = jax.tree.map(lambda a: a if isinstance(a.sharding, NamedSharding) else jax.device_put(a, everywhere), state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    batch = jax.device_put(x, NamedSharding(devices, P("data")))
    program = jax.jit(step_of(sp), out_shardings=shardings).lower(state, batch).compile()
    gathered = [int(np.prod(list(map(int, sizes.split(","))))) for sizes in gathers(program.as_text())]
    smallest = min(w.size for w in params().values())
    assert max(gathered, default=0) < smallest / 4, "a kernel is gathered"
    one, single = jax.jit(step_of(sp)), start(sp, params())
    for _ in range(STEPS):
        state, single = program(state, batch), one(single, x)
    chex.assert_trees_all_equal(jax.device_get(state[1].masks), jax.device_get(single[1].masks))
    chex.assert_trees_all_close(jax.device_get(state[0]), jax.device_get(single[0]), rtol=2e-4, atol=2e-4)


def gathers(program):
    """Shapes of the results of all gathers of a compiled program's text."""
    return re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:all-gather|all-gather-start|all-to-all)\(", program)


def test_a_gather_would_be_seen():
    devices = mesh()
    w = jax.device_put(jnp.ones((64, 128)), NamedSharding(devices, P(None, "model")))
    program = jax.jit(lambda w: w * 2.0, out_shardings=NamedSharding(devices, P())).lower(w).compile()
    assert "64,128" in gathers(program.as_text())


def test_blocks_that_do_not_divide_are_replicated():
    sp = problems.sparsifier("magnitude", STEPS, block=(8, 12), min_blocks=16)
    w = jax.device_put(jnp.ones((64, 128)), NamedSharding(mesh(), P(None, "model")))
    masks = sp.init({"w": w})[1].masks
    assert masks["w"].shape == (8, 11)
    assert len(masks["w"].sharding.device_set) == 1 or masks["w"].sharding.is_fully_replicated


def test_an_explicit_mesh():
    devices = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(devices):
        w = jax.device_put(jnp.ones((64, 128)), NamedSharding(devices, P(None, "model")))
        sp = problems.sparsifier("sequential_attention", STEPS, block=(8, 8))
        trainable, prune = sp.init({"w": w})
        assert prune.masks["w"].sharding.spec == P(None, "model")
        trainable, prune = jax.jit(sp.update)(trainable, prune)
        assert prune.masks["w"].sharding.spec == P(None, "model")
        assert trainable.logits["w"].sharding.spec == P(None, "model")
        params = sp.apply(trainable=trainable, prune=prune)  # by keyword, too
        same = sp.sync_from_params(trainable, prune, params)
        assert params["w"].sharding.spec == same.params["w"].sharding.spec == P(None, "model")
        chex.assert_trees_all_equal(same, trainable)
        assert not buffers(params, same) & buffers(trainable, prune)


def buffers(*trees):
    """Addresses of all arrays on all devices."""
    return {shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(trees) for shard in x.addressable_shards}
