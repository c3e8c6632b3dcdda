"""Convolutions by blocks, and whole networks made fast: the same results as in full."""

import gc
import pickle
import re

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import sa_plus_plus as sapp
from experiments import models
from sa_plus_plus.sparse import BlockSparse, block_sparse_conv
from sa_plus_plus.sparse.compiler import autotune
from sa_plus_plus.sparse.ops import convolution

NHWC = ("NHWC", "HWIO", "NHWC")


@st.composite
def convolutions(draw):
    window = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    channels, outputs = draw(st.sampled_from([1, 5, 12])), draw(st.sampled_from([1, 8, 20]))
    strides = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pads = st.tuples(st.integers(0, 3), st.integers(0, 3))
    padding = draw(st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(pads, pads)))
    size = [draw(st.integers(k, 14)) for k in window]
    block = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    kernel = rng.normal(size=(*window, channels, outputs)).astype(np.float32)
    mask = rng.random(sapp.blocks.grid_shape(kernel.shape, block)) < draw(st.sampled_from([0, 0.2, 0.6, 1]))
    x = rng.normal(size=(draw(st.integers(0, 5)), *size, channels)).astype(np.float32)
    return (
        jnp.asarray(x),
        BlockSparse.fromdense(kernel, block, mask),
        strides,
        padding,
        draw(st.sampled_from([2**22, 2000])),
    )


@hypothesis.given(convolutions(), st.sampled_from(["xla", None]), st.booleans())
@problems.examples(15)
def test_convolution_against_the_dense_one(drawn, implementation, relu):
    x, w, strides, padding, patch_bytes = drawn
    bias = np.linspace(-1, 1, w.shape[3], dtype=np.float32)

    @jax.jit
    def both(x, w, bias):
        options = {"bias": bias, "relu": relu, "implementation": implementation}
        dense = jax.lax.conv_general_dilated(x, w.todense(), strides, padding, dimension_numbers=NHWC)
        return dense, block_sparse_conv(x, w, strides=strides, padding=padding, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "PATCH_BYTES", patch_bytes)
        dense, got = both(x, w, bias)
    want = np.asarray(dense) + bias
    assert got.shape == want.shape
    np.testing.assert_allclose(got, np.maximum(want, 0) if relu else want, rtol=1e-4, atol=1e-4)


def test_convolution_is_differentiable_and_maps():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 8, 16)).astype(np.float32)
    w = BlockSparse.fromdense(kernel, 4, rng.random((18, 4)) < 0.3)
    x = jnp.asarray(rng.normal(size=(4, 9, 9, 8)), jnp.float32)

    def dense(x, kernel):
        return jnp.sum(jnp.sin(jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=NHWC)))

    def sparse(x, w):
        return jnp.sum(jnp.sin(block_sparse_conv(x, w, strides=(2, 2))))

    want, got = jax.jit(jax.grad(dense, (0, 1)))(x, w.todense()), jax.jit(jax.grad(sparse, (0, 1)))(x, w)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        got[1].blocks, BlockSparse.fromdense(want[1], 4, w.layout.mask).blocks, rtol=1e-4, atol=1e-4
    )
    mapped = jax.jit(jax.vmap(lambda x: block_sparse_conv(x, w)))(x[None])
    np.testing.assert_allclose(mapped[0], jax.jit(block_sparse_conv)(x, w), rtol=1e-5, atol=1e-5)


def test_convolution_refuses_what_does_not_fit():
    w = BlockSparse.fromdense(np.ones((3, 3, 4, 8), np.float32), 4)
    with pytest.raises(ValueError, match=r"got \(2, 8, 8, 3\) and \(3, 3, 4, 8\)"):
        block_sparse_conv(jnp.ones((2, 8, 8, 3)), w)
    with pytest.raises(ValueError, match="one floating type"):
        block_sparse_conv(jnp.ones((2, 8, 8, 4), jnp.bfloat16), w)


def pruned(model, x, block, **options):
    """Variables as after training, with kernels pruned."""
    variables = dict(problems.variables(model, x))
    sp = sapp.random(block=block, sparsity=0.8, min_blocks=10, phases=sapp.phases.random(10), **options)
    variables["params"] = jax.jit(lambda params: sp.finalize(*sp.init(params)))(variables["params"])
    return variables, sp.plan(variables["params"])


IMAGES = np.random.default_rng(0).normal(size=(3, 28, 28, 1)).astype(np.float32)
PHOTOGRAPHS = np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32)
IDS = np.random.default_rng(0).integers(0, 5, (7, 39)).astype(np.int32)
NETWORKS = {
    "mlp": (models.LeNet300(), IMAGES, 4, 3, 0),
    "cnn": (models.ConvNet(), IMAGES, 8, 5, 1),
    "click": (models.ClickNet((5,) * 39), IDS, 20, 4, 8),
    "residual": (models.ResNet(10, stages=(1, 1)), PHOTOGRAPHS, 8, 10, 10),
    "basic residual": (models.ResNet(10, stages=(1, 1), bottleneck=False, small_images=True), PHOTOGRAPHS, 8, 7, 9),
}


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.usefixtures("standard_promotion")
def test_networks_give_the_same_results(name):
    model, x, block, layers, most_others = NETWORKS[name]
    variables, plan = pruned(model, x, block)

    def apply(x):
        return model.apply(variables, x)

    want = jax.jit(apply)(x)
    for mode in ("always", "never") + (("autotune",) if name == "mlp" else ()):
        fast = sapp.specialize(apply, x, mode=mode)
        got = fast(x)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(want))))
        assert len(fast.choices) == layers
        assert [c.sparse for c in fast.choices if c.block is None] == [False] * (layers - len(plan.pruned))
        sparse = [c.sparse for c in fast.choices if c.block]
        measured = [c.compiled_seconds < c.traced_seconds for c in fast.choices if c.block]
        assert sparse == {"always": [True] * len(sparse), "never": [False] * len(sparse), "autotune": measured}[mode]
        others = [step for step in fast.steps if not step.startswith(("dense", "convolution"))]
        assert not set(others) & {"rsqrt", "mul", "sub", "dot_general", "conv_general_dilated"}
        assert len([o for o in others if o not in ("reshape", "pad", "slice", "squeeze")]) <= most_others
        assert str(fast).count("\n") == layers + (5 if mode == "autotune" else 1)  # and what is said of the whole
    for side in (side for c in fast.choices if c.block for side in c.block):
        assert side % block == 0 or block % side == 0


def everything(weights):
    """Products followed by what may be folded into them, and by what may not."""

    def apply(x):
        w, c = weights
        y = x @ w
        a = jax.nn.relu((2.0 - y) / (jnp.abs(c) + 1) * 3 - c)  # folded
        b = x @ w
        b = b * b  # used twice
        d = jnp.maximum(x @ w, 0.5) + x[:1] @ w  # not a ReLU; broadcast along rows
        e = (x @ w) * jnp.arange(1.0, x.shape[0] + 1)[:, None] + c  # a scale for each row
        f = jax.checkpoint(lambda x: jnp.exp(x @ w))(x) + jax.jit(lambda x: x @ w)(x)
        g = c[None] / (x @ w + 100.0)
        h = w[:3].T @ x[:3] if x.shape[0] >= 3 else c
        return {"a": a, "rest": (b, d, e, f, g, h, jnp.sum(w))}

    return apply


def test_only_what_may_be_folded_is():
    rng = np.random.default_rng(0)
    w = np.kron(rng.random((6, 8)) < 0.3, np.ones((4, 4))) * rng.normal(size=(24, 32)) / 5
    apply = everything((jnp.asarray(w, jnp.float32), jnp.asarray(rng.normal(size=32), jnp.float32)))
    x = jnp.asarray(rng.normal(size=(5, 24)), jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        want, fast = jax.jit(apply)(x), sapp.specialize(apply, x, mode="always")
        got = fast(x)
        again = jax.jit(fast.fn)(fast.weights, x)
    for result in (got, again):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), result, want)
    first = next(i for i, step in enumerate(fast.steps) if step.startswith("dense"))
    assert fast.steps[first] == "dense, relu"
    assert fast.weights[first][-1].shape == (32,)
    assert all(choice.sparse and choice.block == (4, 4) for choice in fast.choices)


ACTIVATIONS = {
    "gelu": [
        lambda y: jax.nn.gelu(y, approximate=False),
        lambda y: y * 0.5 * (1 + jax.lax.erf(y / np.sqrt(2).astype(np.float32))),
    ],
    "gelu_tanh": [jax.nn.gelu, lambda y: y * jax.nn.sigmoid(1.5957691 * (y + 0.044715 * y * y * y))],
    "silu": [jax.nn.silu, lambda y: y / (1 + jnp.exp(-y)), lambda y: 0.5 * y * jnp.tanh(0.5 * y) + 0.5 * y],
    "relu": [lambda y: jnp.where(y > 0, y, 0.0), lambda y: (jnp.abs(y) + y) * 0.5],
    "relu6": [jax.nn.relu6, lambda y: jnp.clip(y, 0, 6), lambda y: jax.lax.clamp(0.0, y, 6.0)],
    "hard_swish": [jax.nn.hard_swish, lambda y: jnp.clip(y + 3, 0, 6) * (y / 6)],
    "none": [
        lambda y: y * jax.nn.sigmoid(1.702 * y),  # an approximation of GELU that differs from both
        lambda y: jax.nn.silu(y) + y,
        lambda y: jax.nn.silu(y) * jnp.arange(1.0, 33.0)[None],  # a function of the column too
        lambda y: (y, jax.nn.silu(y)),  # what lies between is seen
        lambda y: jax.nn.gelu(jnp.flip(y, 0)),
    ],
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_functions_become_part_of_a_layer_however_written(activation):
    rng = np.random.default_rng(0)
    w = np.kron(rng.random((6, 8)) < 0.5, np.ones((4, 4))) * rng.normal(size=(24, 32))
    w, c = jnp.asarray(w, jnp.float32), jnp.asarray(rng.normal(size=(1, 32)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(7, 24)), jnp.float32)
    for number, written in enumerate(ACTIVATIONS[activation]):
        with jax.numpy_rank_promotion("allow"):
            fast = sapp.specialize(lambda x, written=written: written(x @ w + c), x, mode="always")
            want = jax.jit(lambda x, written=written: written(x @ w + c))(x)
        expected = "silu" if (activation, number) == ("none", 2) else activation  # up to the factors of columns
        first = next(step for step in fast.steps if step.startswith("dense"))
        assert first == ("dense" if expected == "none" else f"dense, {expected}")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), fast(x), want)
        narrow = sapp.specialize(
            lambda x, written=written: jnp.tanh(jax.tree.leaves(written(x @ w + c))[-1] @ w.T),
            *(x,),
            mode="always",
            precision="int8",
            calibration=[x],
        )
        want = jnp.tanh(jax.tree.leaves(want)[-1] @ w.T)
        assert np.sqrt(np.mean((narrow(x) - want) ** 2)) < 0.05 * np.sqrt(np.mean(want**2))


LIMITED = [
    lambda y: jnp.minimum(jax.nn.relu(y), 20),
    lambda y: jnp.clip(y, 0, 65504),
    lambda y: jnp.clip(jax.nn.gelu(y), -20, 20),
    lambda y: jnp.where(y > 30, 0, jax.nn.silu(y)),
    lambda y: jnp.where(y < -1e6, y, jax.nn.relu(y)),
]


@pytest.mark.parametrize("size", [100, 1e7])
@pytest.mark.parametrize("number", range(len(LIMITED)))
def test_limits_far_from_zero_stay(number, size):
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((24, 32), (7, 24)))
    x = size * x

    def fn(x):
        return LIMITED[number](x @ w)

    np.testing.assert_allclose(sapp.specialize(fn, x, mode="always")(x), jax.jit(fn)(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"rhs_dilation": (2, 2)}, {"lhs_dilation": (2, 2)}])
def test_unusual_convolutions_stay_dense_but_are_folded(options):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 8, 16)), jnp.float32).at[..., 4:].set(0)
    scale = jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 9, 9, 8)), jnp.float32)

    def apply(x):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC, **options)
        return jax.nn.relu(y * scale + scale)

    fast = sapp.specialize(apply, x, mode="always")
    np.testing.assert_allclose(fast(x), apply(x), rtol=1e-4, atol=1e-4)
    assert fast.steps == ("convolution 3×3, relu",)
    assert not fast.choices[0].sparse


def dropped(x, key):
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_random_keys_are_inputs_like_others(precision):
    """One key, one for each example, those of a scan; taken on, split and returned."""
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.normal(size=(16, 16)) / 4, jnp.float32), jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)
    keys, many = jax.random.split(jax.random.key(1), 4), jax.random.split(jax.random.key(2), 2000)

    def apply(x, key, each, steps):
        y = dropped(x @ w, key) + jax.vmap(dropped)(x, each) + dropped(x, many[steps.size])
        y, _ = jax.lax.scan(lambda y, k: (dropped(jnp.sin(y @ w), k), None), y, steps)
        return y, jax.random.split(jnp.where(y.sum() > 99, key, each[1]))

    inputs = (x, jax.random.key(3, impl="rbg")), (x, jax.random.key(0), keys, keys[:3])

    def between(x, key):
        return dropped(x @ w, key) @ w

    other = sapp.specialize(between, *inputs[0], mode="always")
    np.testing.assert_allclose(other(*inputs[0]), jax.jit(between)(*inputs[0]), rtol=1e-4, atol=1e-5)
    fast = sapp.specialize(apply, *inputs[1], mode="always", precision=precision, calibration=[inputs[1]])
    (want, after), loaded = jax.jit(apply)(*inputs[1]), pickle.loads(pickle.dumps(fast))
    assert [c.runs for c in fast.choices] == ["dense"] * 4
    for got, last in (fast(*inputs[1]), loaded(*inputs[1])):
        np.testing.assert_allclose(got, want, atol=0.1 if precision else 1e-5)
        np.testing.assert_array_equal(jax.random.key_data(last), jax.random.key_data(after))
    with pytest.raises(ValueError, match=r"made for float32\[4, 16\], key<fry>\[\], .* got .* uint32\[2\]"):
        fast(x, jax.random.PRNGKey(0), keys, keys[:3])


def test_a_key_for_each_example_in_batches_of_any_size():
    w, keys = jnp.eye(8), jax.random.split(jax.random.key(0), 5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)

    def apply(x, keys):
        return jax.vmap(dropped)(x @ w, keys), jax.vmap(jax.random.split)(keys)

    networks = [sapp.specialize(apply, x[:n], keys[:n], mode="always") for n in (1, 2)]
    pieces = sapp.specialize(apply, x[:4], keys[:4], mode="always", microbatch=2)
    for n, fast in ((5, sapp.serve.loads(sapp.serve.dumps(networks))), (4, pieces)):
        (got, after), (want, last) = fast(x[:n], keys[:n]), jax.jit(apply)(x[:n], keys[:n])
        np.testing.assert_allclose(got, want, atol=1e-6)
        np.testing.assert_array_equal(jax.random.key_data(after), jax.random.key_data(last))


def test_half_precision():
    rng = np.random.default_rng(0)
    w = np.kron(rng.random((6, 8)) < 0.3, np.ones((8, 8))) * rng.normal(size=(48, 64)) / 5
    w = jnp.asarray(w, jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(5, 48)), jnp.bfloat16)
    fast = sapp.specialize(lambda x: jax.nn.relu(x @ w), x, mode="always")
    got, want = fast(x), jax.nn.relu(x @ w)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=0.02, atol=0.02)


def test_bad_requests():
    w = jnp.ones((4, 4))
    fast = sapp.specialize(lambda x: x @ w, jax.ShapeDtypeStruct((2, 4), jnp.float32))
    np.testing.assert_array_equal(fast(np.ones((2, 4), np.float32)), 4)
    with pytest.raises(ValueError, match=r"made for float32\[2, 4\], got float32\[3, 4\]"):
        fast(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="mode must be one of autotune, always, never, got 'fast'"):
        sapp.specialize(lambda x: x, w, mode="fast")
    with pytest.raises(ValueError, match="block must be a positive integer"):
        sapp.specialize(lambda x: x, w, block=0)
    with pytest.raises(ValueError, match="implementation must be one of"):
        sapp.specialize(lambda x: x, w, mode="never", implementation="cuda")
    with pytest.raises(TypeError, match="outside jit, vmap and grad"):
        jax.jit(lambda w: sapp.specialize(lambda x: x @ (w + 1), w, mode="never")(w))(w)
    two = sapp.specialize(lambda x: x["q"] @ w - x["k"], {"q": w, "k": w})
    with pytest.raises(ValueError, match="made for arguments like"):
        two((w, w))


def narrow(dtype, out):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(24, 32)), dtype)
    return lambda x: jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=out)


DTYPES = {
    "integers": (lambda x: narrow("int8", jnp.float32)((8 * x).astype(jnp.int8)) * jnp.float32(0.01)),
    "integer division": (lambda x: jax.lax.div(narrow("int8", jnp.int32)((8 * x).astype(jnp.int8)), jnp.int32(7))),
    "half, scaled beyond its range": (
        lambda x: narrow("float16", jnp.float32)(x.astype(jnp.float16)) * jnp.float32(1e5) * jnp.float32(1e-5)
    ),
    "half, scaled, in float32": (
        lambda x: narrow("bfloat16", jnp.float32)(x.astype(jnp.bfloat16)) * jnp.float32(0.37) + jnp.float32(1)
    ),
    "rounded on purpose": (
        lambda x: narrow("float32", None)(x).astype(jnp.bfloat16).astype(jnp.float32) + jnp.float32(1)
    ),
    "divided by zero": (lambda x: narrow("float32", None)(x) / jnp.zeros((1, 32))),
    "scaled to denormals": (lambda x: narrow("float32", None)(x) * jnp.float32(1e-38) * jnp.float32(1e38)),
    "outer product": (lambda x: jnp.einsum("bi,j->bij", x, jnp.arange(3.0))),
}


@pytest.mark.filterwarnings("ignore:specialize found no products")
@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.usefixtures("standard_promotion")
def test_nothing_is_folded_that_would_change_more_than_rounding(name):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 24)), jnp.float32)
    want = DTYPES[name](x)
    for mode in ("never", "always"):
        got = sapp.specialize(DTYPES[name], x, mode=mode)(x)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_the_faster_form_of_each_layer_runs(monkeypatch):
    rng = np.random.default_rng(0)
    first, second = (
        jnp.asarray(np.kron(rng.random((6, 6)) < 0.4, np.ones((4, 4))) * rng.normal(size=(24, 24)), jnp.float32)
        for _ in range(2)
    )
    seconds = [(2.0, 1.0), (1.0, 2.0)]  # as traced, and by its blocks
    monkeypatch.setattr(autotune, "seconds_of", lambda *_: seconds)
    fast = sapp.specialize(lambda x: jax.nn.relu(x @ first) @ second, jnp.ones((2, 24)))
    assert [choice.runs for choice in fast.choices] == ["sparse", "traced"]
    assert [weights[0].shape == (24, 24) for weights in fast.weights] == [False, True]
    assert " sparse " in str(fast).splitlines()[2]
    assert " traced " in str(fast).splitlines()[3]


def test_weights_are_held_once():
    def live():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def specialized():
        mask = np.random.default_rng(0).random((10, 6)) < 0.2
        w = jnp.asarray(np.kron(mask, np.ones((20, 20))), jnp.float32)
        table = jnp.ones((16, 120))
        return sapp.specialize(lambda x: (x @ w) * table, jnp.ones((16, 200)), mode="always")

    before, fast = live(), specialized()
    assert live() - before == sum(a.nbytes for a in jax.tree.leaves(fast.weights)) < 200 * 120 * 4


def test_an_empty_batch():
    w = jnp.asarray(np.kron(np.eye(4), np.ones((4, 4))), jnp.float32)
    fast = sapp.specialize(lambda x: x @ w, jnp.ones((0, 16)), mode="always")
    assert fast(jnp.ones((0, 16))).shape == (0, 16)
    mapped = jax.vmap(lambda x: sapp.block_sparse_matmul(x, BlockSparse.fromdense(w, 4)))
    assert mapped(jnp.ones((0, 3, 16))).shape == (0, 3, 16)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_microbatches_give_what_the_whole_batch_gives(precision):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 4, 16)).astype(np.float32))
    head = jnp.asarray(rng.normal(size=(16, 5)).astype(np.float32))

    def fn(inputs):
        y = jax.nn.relu(jax.lax.conv_general_dilated(inputs["a"], kernel, (1, 1), "SAME", dimension_numbers=NHWC))
        return {"head": y.mean((1, 2)) @ head + inputs["b"][:, None], "same": inputs["b"]}

    x = {"a": rng.normal(size=(6, 5, 5, 4)).astype(np.float32), "b": rng.normal(size=6).astype(np.float32)}
    options = {"mode": "always", "precision": precision, "calibration": [x]}
    if sapp.sparse.native.unavailable_reason():
        options = {}
    whole = sapp.specialize(fn, x, **options)
    cut = sapp.specialize(fn, x, microbatch=2, **options)
    chex.assert_trees_all_close(cut(x), whole(x), rtol=1e-6, atol=1e-6)
    assert cut.examples == whole.examples
    assert [choice.rows for choice in cut.choices] == [choice.rows // 3 for choice in whole.choices]
    chex.assert_trees_all_close(sapp.serve.loads(sapp.serve.dumps(cut))(x), whole(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fn", "microbatch", "message"),
    [
        (lambda x: x @ jnp.eye(3), 4, "must divide the batch, the first axis of every input; got float32[6, 3]"),
        (lambda x: x @ jnp.eye(3), 0, "must be a positive integer, got 0"),
        (lambda x: (x @ jnp.eye(3)).sum(), 2, "every output needs the batch as its first axis, got ()"),
    ],
)
def test_microbatches_that_do_not_fit(fn, microbatch, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sapp.specialize(fn, jnp.ones((6, 3)), microbatch=microbatch)


def test_several_devices_by_shard_map():
    """On each device its own part of the batch; what the kernel's gradient misses is summed over them."""
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((4,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec
    kernel = np.kron(rng.random((6, 8)) < 0.4, np.ones((4, 4))) * rng.normal(size=(24, 32))
    w = BlockSparse.fromdense(kernel.astype(np.float32), 4)
    x = jnp.asarray(rng.normal(size=(8, 24)), jnp.float32)
    fast = sapp.specialize(lambda x: jax.nn.relu(x @ w.todense()), x[:2], mode="always")
    split = jax.jit(jax.shard_map(fast.fn, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec("d")))
    got = split(fast.weights, x)
    assert got.sharding.spec == spec("d")
    np.testing.assert_allclose(got, jax.nn.relu(x @ w.todense()), rtol=1e-5, atol=1e-5)

    def loss(x, w):
        return jax.lax.psum(jnp.sum(jnp.sin(sapp.block_sparse_matmul(x, w))), "d")

    def loss_of_images(x, w):
        return jax.lax.psum(jnp.sum(jnp.sin(block_sparse_conv(x, w))), "d")

    images = jnp.asarray(rng.normal(size=(4, 5, 5, 4)), jnp.float32)
    conv = BlockSparse.fromdense(rng.normal(size=(3, 3, 4, 8)).astype(np.float32), 4, rng.random((9, 2)) < 0.5)
    for fn, a, b in ((loss, x, w), (loss_of_images, images, conv)):
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=(spec("d"), spec()), out_specs=spec())
        one = jax.shard_map(fn, mesh=mesh, in_specs=(spec(), spec()), out_specs=spec())  # four times the whole
        got, want = (jax.jit(jax.grad(loss, (0, 1)))(a, b) for loss in (mapped, one))
        jax.tree.map(lambda g, w: np.testing.assert_allclose(4 * g, w, rtol=1e-4, atol=1e-4), got, want)
    with pytest.raises(ValueError, match="out_specs"):  # what differs between devices is known to
        jax.shard_map(lambda x: sapp.block_sparse_matmul(x, w), mesh=mesh, in_specs=spec("d"), out_specs=spec())(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": (1, 1, 1)}, "strides must be two positive integers"),
        ({"strides": (0, 1)}, "strides must be two positive integers"),
        ({"bias": np.ones(0, np.float32)}, r"bias must be floating and of shape \(8,\)"),
        ({"bias": np.ones(8, np.int32)}, "bias must be floating"),
        ({"implementation": "cuda"}, "implementation must be one of"),
    ],
)
def test_convolution_options(options, message):
    w = BlockSparse.fromdense(np.ones((3, 3, 4, 8), np.float32), 4)
    for x in (jnp.ones((2, 8, 8, 4)), jnp.ones((0, 8, 8, 4))):
        with pytest.raises(ValueError, match=message):
            block_sparse_conv(x, w, **options)
    wide = sapp.BlockSparse(jnp.pad(w.blocks, ((0, 0), (0, 0), (0, 4))), w.layout)
    with pytest.raises(ValueError, match="blocks must be"):
        block_sparse_conv(jnp.ones((2, 8, 8, 4)), wide)


def test_blocks_wider_than_their_kernel_are_found():
    """A narrow head of a network is pruned in ragged blocks, and served by them."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(1024, 10)) * np.kron(rng.random(64) < 0.2, np.ones(16))[:, None]
    x, kernel = rng.normal(size=(3, 1024)).astype(np.float32), jnp.asarray(kernel, jnp.float32)
    fast = sapp.specialize(lambda x: x @ kernel, x, mode="always")
    assert (fast.choices[0].block, fast.choices[0].sparse) == ((16, 16), True)
    np.testing.assert_allclose(fast(x), x.astype(np.float64) @ np.asarray(kernel, np.float64), rtol=1e-4, atol=1e-4)


def image_network(seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((2, 7, 8, 16)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((16, 32)), jnp.float32).at[:8].set(0)
    return x, w, jnp.asarray(rng.standard_normal((32, 32)), jnp.float32).at[:, 16:].set(0)


@pytest.mark.parametrize(
    ("rows", "columns"), [(slice(None, None, 2), slice(None, None, 3)), (slice(1, None, 2), slice(4))]
)
def test_a_product_with_every_nth_position_is_a_convolution(rows, columns):
    x, w, _ = image_network()

    def fn(x):
        return jax.nn.relu(x[:, rows, columns] @ w + 1)

    fast = sapp.specialize(fn, x, mode="always")
    np.testing.assert_allclose(fast(x), fn(x), rtol=1e-5, atol=1e-5)
    regular = rows.start is None
    assert fast.choices[0].layer == ("convolution 1×1, strides 2×3" if regular else "dense")


def test_a_residual_whose_place_the_result_takes_may_be_needed_again():
    x, w, v = image_network()

    def fn(x):
        residual = jax.nn.relu(x @ w)
        y = jax.nn.relu(residual @ v + residual)
        return y, residual, y @ v + x @ w

    fast = sapp.specialize(fn, x, mode="always")
    for got, want in zip(fast(x), fn(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axes", [(1, 2), (1,), (0, 1, 2), (1, 3), (3,)])
def test_means_over_positions(axes):
    x, w, _ = image_network()

    def fn(x):
        return (x @ w).mean(axes)

    fast = sapp.specialize(fn, x, mode="always")
    np.testing.assert_allclose(fast(x), fn(x), rtol=1e-5, atol=1e-5)


def test_average_pooling():
    x, w, _ = image_network()

    def fn(x):
        return nn.avg_pool(x @ w, (3, 3), (2, 2), padding=((1, 1), (0, 1)), count_include_pad=False)

    fast = sapp.specialize(fn, x, mode="always")
    np.testing.assert_allclose(fast(x), fn(x), rtol=1e-5, atol=1e-5)
