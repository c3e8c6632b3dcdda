"""Axes that may be permuted together: any permutation of the groups found leaves the function as it is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from experiments.models.resnet import ResNet
from experiments.models.small import MLP, ConvNet
from sa_plus_plus.contrib.transformers.encoder import Bert
from sa_plus_plus.contrib.transformers.transformer import Decoder, ViT
from sa_plus_plus.reordering import axes
from sa_plus_plus.reordering.orders import order_of

pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
TOKENS = RNG.integers(0, 50, (2, 12)).astype(np.int32)
IMAGES = RNG.normal(size=(2, 16, 16, 3)).astype(np.float32)
SMALL = {"layers": 1, "width": 32, "hidden": 48, "heads": 4}
HEADS = [(4, 1), (8, 4), (8, 4)]  # heads, dimensions of queries and keys in each, and of values


@pytest.fixture(autouse=True)
def equal_draws_in_any_order_of_tests():
    RNG.bit_generator.state = START


def values(tree):
    """Random values of every leaf, biases and scales too; running variances have to be positive."""

    def one(leaf):
        size = RNG.uniform(0.5, 1.5, leaf.shape)
        if len(leaf.shape) > 1:
            size *= RNG.choice([-1, 1], leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return np.asarray(size, leaf.dtype)  # NumPy's, which are permuted without compiling anything

    return jax.tree.map(one, tree)


def scrambled(found):
    """A random permutation of each group, another for each element of what it is within."""
    tables = {}
    for group in found.groups.values():
        shape = (*(found.sizes[factor] for factor in group.within), group.size)
        tables[group.name] = RNG.permuted(np.broadcast_to(np.arange(group.size), shape), axis=-1)
    return order_of(found, tables)


def kinds(found):
    """`(size, orders)` of each group."""
    return sorted((g.size, int(np.prod([found.sizes[f] for f in g.within]))) for g in found.groups.values())


def check(fn, params, *inputs):
    """Hold a function with scrambled parameters to itself; return the groups."""
    found = axes.find(fn, params, *inputs)
    order = scrambled(found)
    moved = order.apply(params)
    fn = jax.jit(fn)
    for a, b in zip(*(jax.tree.leaves(fn(p, *inputs)) for p in (params, moved)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(np.abs(a).max()))
        assert np.std(a) > 0
    jax.tree.map(np.testing.assert_array_equal, order.inverse.apply(moved), params)
    return found


class Grouped(nn.Module):
    """flax's attention, a grouped convolution, and normalisation in groups."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(24)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, deterministic=True)(nn.RMSNorm()(x))
        x = nn.GroupNorm(4)(nn.Conv(32, (3,), feature_group_count=4)(nn.swish(x)))
        return nn.Dense(3)(x)


MODELS = {
    "MLP": (MLP(widths=(67, 48)), IMAGES, [(48, 1), (67, 1)]),
    "convolutions, flattened": (ConvNet(widths=(4, 6), hidden=10), IMAGES, [(4, 1), (6, 1), (10, 1)]),
    "ResNet": (
        ResNet(classes=10, stages=(1, 1), width=8, small_images=True),
        IMAGES,
        [(8, 1), (8, 1), (8, 1), (16, 1), (16, 1), (32, 1), (64, 1)],
    ),
    "ResNet of basic blocks": (
        ResNet(classes=10, stages=(1, 1), width=8, bottleneck=False),
        IMAGES,
        [(8, 1), (8, 1), (16, 1), (16, 1)],
    ),
    "GPT": (Decoder(vocabulary=50, context=16, **SMALL), TOKENS, [(32, 1), (48, 1), *HEADS]),
    "GPT in a loop": (
        Decoder(vocabulary=50, context=16, scan=True, **(SMALL | {"layers": 2})),
        TOKENS,
        [(4, 2), (8, 8), (8, 8), (32, 1), (48, 2)],
    ),
    "BERT": (Bert(vocabulary=50, context=16, **SMALL), TOKENS, [(32, 1), (32, 1), (48, 1), *HEADS]),
    "ViT": (ViT(classes=10, patch=4, **SMALL), IMAGES, [(32, 1), (48, 1), *HEADS]),
    "groups": (Grouped(), IMAGES[:, 0], [(4, 1), (6, 4), (8, 4), (4, 1), (6, 4), (6, 4)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model, x, expected = MODELS[name]
    params = values(jax.eval_shape(model.init, jax.random.key(0), x))
    assert kinds(check(model.apply, params, x)) == sorted(expected)


def test_equinox():
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")

    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        head: eqx.nn.MLP

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(3, 16, 4, 4, key=key)
            self.norm = eqx.nn.LayerNorm(16)
            self.attention = eqx.nn.MultiheadAttention(2, 16, qk_size=12, vo_size=10, key=key)
            self.head = eqx.nn.MLP(16, 5, 24, 1, key=key)

        def __call__(self, x):
            x = self.conv(x.transpose(2, 0, 1)).reshape(16, -1).T
            y = jax.vmap(self.norm)(x)
            return self.head((x + self.attention(y, y, y)).mean(0))

    arrays, rest = eqx.partition(Model(jax.random.key(0)), eqx.is_array)
    found = check(lambda p, x: jax.vmap(eqx.combine(p, rest))(x), values(arrays), IMAGES)
    assert kinds(found) == [(2, 1), (10, 2), (12, 2), (16, 1), (24, 1)]


def test_haiku():
    hk = pytest.importorskip("haiku", reason="Haiku is not installed")

    def layer(x):
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        init = hk.initializers.VarianceScaling()
        return x + hk.MultiHeadAttention(2, 12, model_size=16, w_init=init, name="attention")(y, y, y)

    def forward(x):
        x = jax.nn.relu(hk.Conv2D(16, 3, stride=4, name="conv")(x)).reshape(len(x), 16, 16)
        x = hk.experimental.layer_stack(3, name="layers")(layer)(x)
        return hk.nets.MLP([32, 8], name="mlp")(x.mean(1))

    model = hk.without_apply_rng(hk.transform(forward))
    params = values(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    assert kinds(check(model.apply, params, IMAGES)) == [(2, 3), (12, 6), (12, 6), (16, 1), (32, 1)]


W = {"a": (6, 12), "b": (12, 12), "c": (12, 5)}


def kernels():
    return {key: RNG.normal(size=shape).astype(np.float32) for key, shape in W.items()}


def hidden(fn):
    """Two layers with a function of the 12 hidden units between them."""
    return lambda p, x: fn(jnp.tanh(x @ p["a"]), p) @ p["c"]


def rotated(h, p):
    """A half turned by angles that depend on the unit, as rotary positions do."""
    q = (h @ p["b"]).reshape(-1, 2, 6)
    left, right = q[..., :3], q[..., 3:]
    angle = jnp.arange(3) * jnp.arange(len(h))[:, None, None]
    turned = [left * jnp.cos(angle) - right * jnp.sin(angle), right * jnp.cos(angle) + left * jnp.sin(angle)]
    return jnp.concatenate(turned, -1).reshape(h.shape)


FUNCTIONS = {  # and the sizes of the groups left
    "sum over the units": (lambda h, p: h - h.sum(-1, keepdims=True), [(12, 1)]),
    "softmax": (lambda h, p: jax.nn.softmax(h) * h.max(), [(12, 1)]),
    "a square kernel repeated": (lambda h, p: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["b"]), h), [(12, 1)]),
    "while": (
        lambda h, p: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["b"])), (0, h))[1],
        [(12, 1)],
    ),
    "cond": (lambda h, p: lax.cond(h.sum() > 0, lambda h: h @ p["b"], lambda h: -h, h), [(12, 1)]),
    "tied transposed": (lambda h, p: (h @ p["b"]) @ p["b"].T, [(12, 1), (12, 1)]),
    "remat": (lambda h, p: jax.checkpoint(lambda h: jax.nn.gelu(h @ p["b"]))(h), [(12, 1), (12, 1)]),
    "a gated half": (lambda h, p: jnp.tile(jnp.multiply(*jnp.split(h, 2, -1)), 2), [(2, 6), (6, 1)]),
    "stacked": (lambda h, p: (lambda a, b: a * 2 + b)(*jnp.stack([h, h @ p["b"]], 1).swapaxes(0, 1)), [(12, 1)]),
    "thirds": (lambda h, p: h[:, 4:8] @ p["b"][:4], [(4, 1), (12, 1)]),
    "norm of a kernel": (lambda h, p: h @ (p["b"] / jnp.linalg.norm(p["b"], axis=0)), [(12, 1), (12, 1)]),
    "interleaved": (lambda h, p: h.reshape(-1, 3, 4).swapaxes(1, 2).reshape(-1, 12), [(3, 1), (4, 3)]),
    "factors that do not fit": (
        lambda h, p: h.reshape(-1, 3, 4).max(1).sum(1)[:, None] * jnp.sort(h.reshape(-1, 2, 6), 1).reshape(-1, 12),
        [],
    ),
    "cut in two ways": (lambda h, p: (h[:, :5].sum(1) * h[:, 5:].max(1))[:, None] * h, []),
    "cumulative": (lambda h, p: jnp.cumsum(h, 1), []),
    "cumulative over rows": (lambda h, p: jnp.cumsum(h, 0), [(12, 1)]),
    "sorted": (lambda h, p: jnp.sort(h, 1), []),
    "sorted over rows": (lambda h, p: jnp.sort(h, 0), [(12, 1)]),
    "argmax": (lambda h, p: h * jnp.argmax(h, 1)[:, None], []),
    "top_k": (lambda h, p: h * lax.top_k(h, 3)[1].sum(1)[:, None], []),
    "reversed": (lambda h, p: h[:, ::-1], []),
    "strides": (lambda h, p: jnp.concatenate([h[:, ::2], h[:, 1::2]], 1), []),
    "padded": (lambda h, p: jnp.pad(h, ((0, 0), (1, 0)))[:, :-1], []),
    "numbered": (lambda h, p: h * jnp.arange(12), []),
    "a constant": (lambda h, p: h * np.linspace(0, 1, 12, dtype=np.float32), []),
    "a uniform constant": (lambda h, p: h * np.full(12, 2, np.float32), [(12, 1)]),
    "looked up": (lambda h, p: h + p["b"][jnp.arange(len(h))], [(12, 1)]),
    "looked up by a table": (lambda h, p: h[:, (100 * p["b"].max(0)).astype(int) % 12], [(12, 1), (12, 12)]),
    "taken along an axis": (lambda h, p: jnp.take_along_axis(h, (9 * jnp.abs(h)).astype(int) % 12, 1), []),
    "a computed place": (lambda h, p: h * lax.dynamic_index_in_dim(h, h.argmax() % 12, 1), []),
    "a row replaced": (lambda h, p: h.at[1].set(p["b"][0]), [(12, 1)]),
    "a unit replaced": (lambda h, p: h.at[:, 1].set(p["b"][0, 0]), []),
    "sums of segments": (lambda h, p: h + jax.ops.segment_sum(h, jnp.arange(7) // 3, 7), [(12, 1)]),
    "scattered units": (lambda h, p: jnp.zeros_like(h).at[:, jnp.arange(12) // 2].add(h), []),
    "associative scan": (lambda h, p: lax.associative_scan(lambda a, b: a * b + b, h), [(12, 1)]),
    "associative scan of the units": (lambda h, p: lax.associative_scan(jnp.add, h, axis=1), []),
    "transformed over rows": (lambda h, p: jnp.fft.fft(h, axis=0).real, [(12, 1)]),
    "parts of two sizes": (lambda h, p: jnp.concatenate([h[:, 8:], h[:, :8] ** 2], 1), [(4, 1)]),
    "windows": (lambda h, p: nn.max_pool(h[..., None], (3,), padding="SAME")[..., 0], []),
    "convolved": (lambda h, p: jax.vmap(lambda r: jnp.convolve(r, jnp.array([1.0, 2, 3]), "same"))(h), []),
    "rotary": (rotated, [(2, 3), (12, 1)]),  # whole pairs of units, with the same angle
    "transformed": (lambda h, p: jnp.fft.fft(h).real, []),
    "random": (lambda h, p: h * jax.random.uniform(jax.random.key(0), h.shape), []),
    "over two axes": (lambda h, p: jnp.einsum("ni,nj,ij->ni", h, h, p["b"]), [(12, 1)]),
    "its own diagonal": (lambda h, p: h * jnp.diagonal(p["b"]), []),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations(name):
    middle, expected = FUNCTIONS[name]
    params = kernels()
    found = check(hidden(middle), params, RNG.normal(size=(7, 6)).astype(np.float32))
    assert kinds(found) == expected, (found.groups, found.fixed)


def test_what_a_loop_carries_has_one_order_in_all_its_steps():
    """Also if it begins with a constant and is returned by none of them: no operation outside the loop has it."""
    start = np.zeros(12, np.float32)

    def fn(p, x):
        def step(carry, kernels):
            carry = carry / 2 + jnp.tanh(x @ kernels[0])
            return carry, carry @ kernels[1]

        return lax.scan(step, start, (p["in"], p["out"]))[1]

    params = {"in": RNG.normal(size=(3, 6, 12)).astype(np.float32), "out": RNG.normal(size=(3, 12)).astype(np.float32)}
    assert kinds(check(fn, params, RNG.normal(size=6).astype(np.float32))) == [(12, 1)]


def test_what_is_left_has_its_reason():
    params = {key: jnp.ones(shape) for key, shape in W.items()} | {"unused": jnp.ones(3)}
    found = axes.find(hidden(lambda h, p: jnp.cumsum(h, 1)), params, jnp.ones((7, 6)))
    assert not found.groups
    assert {
        str(place): (size, reason) for place, size, reason in found.fixed if place.path in ("a", "c", "unused")
    } == {
        "a axis 0": (6, "an input has it"),
        "a axis 1": (12, "cumsum along it"),
        "c axis 0": (12, "cumsum along it"),
        "c axis 1": (5, "the function returns it"),
        "unused axis 0": (3, "the function does not use the leaf"),
    }


def test_a_group_permuted_in_part_changes_the_function():
    """What `check` would see of a wrong group."""
    params = kernels()
    fn, x = hidden(lambda h, p: h), RNG.normal(size=(7, 6)).astype(np.float32)
    order = scrambled(axes.find(fn, params, x))
    moved = order.apply(params)
    assert not np.allclose(fn(params | {"a": moved["a"]}, x), fn(params, x), rtol=1e-2)


def test_an_order_after_another():
    """Of groups within permuted groups, too: the size of a head, in each head, in each layer."""
    model, x, _ = MODELS["GPT in a loop"]
    params = values(jax.eval_shape(model.init, jax.random.key(0), x))
    found = axes.find(model.apply, params, x)
    order, other = scrambled(found), scrambled(found)
    for factor, group in found.groups.items():
        step = order_of(found, {group.name: other.permutations[group.name]})
        both = order.then(factor, other.permutations[group.name])
        jax.tree.map(np.testing.assert_array_equal, both.apply(params), step.apply(order.apply(params)))


def test_optimizer_state_moves_along():
    """A step of training commutes with the permutation."""
    params = kernels()
    fn, x = hidden(lambda h, p: jax.nn.gelu(h @ p["b"])), RNG.normal(size=(7, 6)).astype(np.float32)
    order, tx = scrambled(axes.find(fn, params, x)), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(lambda p: jnp.sum(fn(p, x) ** 2))(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params))
    expected = order.apply(step(params, state))
    for a, b in zip(*map(jax.tree.leaves, (step(order.apply(params), order.apply(state)), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_permutations_of_other_parameters_are_refused():
    params = {key: jnp.ones(shape) for key, shape in W.items()}
    found = axes.find(hidden(lambda h, p: h), params, jnp.ones((7, 6)))
    order = scrambled(found)
    with pytest.raises(ValueError, match=r"belong to parameters with the leaves a \(6, 12\).*leaves are w \(3,\)"):
        order.apply({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"c has the shape \(12, 6\) here, but \(12, 5\) there"):
        order.apply(params | {"c": jnp.ones((12, 6))})
    with pytest.raises(ValueError, match="no group 'b axis 0' of axes"):
        order_of(found, {"b axis 0": np.arange(12)})
    with pytest.raises(ValueError, match=r"has the shape \(11,\), but the group takes \(12,\)"):
        order_of(found, {"a axis 1": np.arange(11)})
    with pytest.raises(ValueError, match="each number from 0 to 11 once"):
        order_of(found, {"a axis 1": np.zeros(12, int)})
    assert "a axis 1  12" in str(order)
    assert "the function returns it" in str(order)
