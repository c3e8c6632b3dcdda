"""Calls of the compiled kernel as sequences: the same numbers, few calls, and a place in memory for every value."""

import itertools
import math
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from hypothesis import strategies as st

import sa_plus_plus as sapp
from sa_plus_plus.sparse.compiler import executor, sequences
from sa_plus_plus.sparse.compiler.ir import Call, Variable
from sa_plus_plus.sparse.compiler.trace import recorded
from sa_plus_plus.sparse.ops import native

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason="no compiled kernel")
RNG = np.random.default_rng(0)
NUMBERS = np.dtype(np.float32)


def kernel(rows, columns):
    return jnp.asarray(RNG.normal(size=(rows, columns)) / math.sqrt(rows), jnp.float32)


UP, DOWN, QUERY, OTHER = kernel(16, 48), kernel(48, 16), kernel(16, 16), kernel(16, 16)


def blocks_with_residuals(x):
    """Layers, a residual, a normalisation and attention; what is between two of them is a view."""
    for _ in range(2):
        q = (x @ QUERY).reshape(2, 9, 2, 8)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, q) / 3
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), q).reshape(2, 9, 16)
        x = x + y @ OTHER
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x + jax.nn.gelu(x @ UP) @ DOWN
    return x, y


def interrupted(x):
    """Operations of XLA's between the layers, on one of two branches."""
    y = jnp.tanh(x @ UP) @ DOWN
    return (jax.nn.relu(x @ QUERY) @ OTHER + y).sum(0), y


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("network", [blocks_with_residuals, interrupted])
def test_the_numbers_are_those_of_single_calls(network, precision):
    x = jnp.asarray(RNG.normal(size=(2, 9, 16)), jnp.float32)
    fast = sapp.specialize(network, x, mode="always", precision=precision, calibration=[x])
    want = executor._run_once(fast._program, fast.weights, (x,))
    for got in (fast(x), jax.vmap(lambda x: fast.fn(fast.weights, x))(x[None])):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a.reshape(b.shape), b)


def test_what_follows_one_another_is_one_call():
    x = jnp.ones((2, 9, 16))
    for network, count in ((blocks_with_residuals, 1), (interrupted, 2)):
        fast = sapp.specialize(network, x, mode="always")
        text = jax.jit(fast.fn).lower(fast.weights, x).as_text()
        assert text.count(f"@{native.SEQUENCE}(") == count
        assert not any(f"@{kind}(" in text for kind in native.KINDS)


def test_small_weights_are_constants_of_the_compiled_call(tmp_path):
    w, bias = kernel(80, 64), jnp.ones(64)
    fast = sapp.specialize(lambda x: jax.nn.relu(x @ w + bias[None]), jnp.ones((3, 80)), mode="always")
    sizes = sorted(a.nbytes for a in jax.tree.leaves(fast.weights))
    assert sizes == [bias.nbytes, w.nbytes]
    inputs = jax.tree.leaves(fast.lower().in_avals)
    assert [a.size for a in inputs] == [w.size, 240]
    fast.save(tmp_path / "network")
    ((_, passed),) = sapp.serve.load(tmp_path / "network")._calls
    assert [a.size for a in passed] == [w.size]


def test_a_network_that_is_split_over_devices():
    """Within `shard_map` the calls stay single ones; so they know over which devices a value varies."""
    mesh = jax.make_mesh((4,), ("d",))
    w, spec = kernel(16, 16), jax.sharding.PartitionSpec("d")
    fast = sapp.specialize(lambda x: jax.nn.relu(x @ w) @ w, jnp.ones((2, 16)), mode="always")
    split = jax.shard_map(lambda x: fast.fn(fast.weights, x), mesh=mesh, in_specs=spec, out_specs=spec)
    x = jnp.asarray(RNG.normal(size=(8, 16)), jnp.float32)
    placed = jax.device_put(x, jax.NamedSharding(mesh, spec))
    np.testing.assert_allclose(jax.jit(split)(placed), jax.nn.relu(x @ w) @ w, rtol=1e-5, atol=1e-5)


@st.composite
def calls(draw):
    """Calls on values of any size and their views, some of which may overwrite one of these."""
    known, found, whole = [Variable(0, (4,), NUMBERS)], [], {}
    for number in range(1, draw(st.integers(1, 12)) + 1):
        inputs = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
        over = draw(st.booleans())
        output = Variable(number, inputs[-1].shape if over else (draw(st.integers(0, 60)),), NUMBERS)
        aliases = ((len(inputs) - 1, 0),) if over else ()
        params = {"target_name": native.CONV, "input_output_aliases": aliases}
        found.append(Call(types.SimpleNamespace(name="ffi_call"), params, tuple(inputs), (output,)))
        known.append(output)
        if draw(st.booleans()):
            known.append(view := Variable(100 + number, (*output.shape, 1), NUMBERS))
            whole[view] = output
    results = draw(st.sets(st.sampled_from([call.outputs[0] for call in found])))
    return found, whole, results


@hypothesis.given(calls())
@problems.examples(100)
def test_values_that_are_alive_have_places_of_their_own(drawn):
    found, whole, results = drawn
    offsets, memory = sequences._offsets(found, whole, results)
    assert set(offsets) == {call.outputs[0] for call in found} - results
    begin = {call.outputs[0]: number for number, call in enumerate(found)}
    taken = [[whole.get(v, v) for v in call.inputs] for call in found]
    end = begin | {v: number for number, values in enumerate(taken) for v in values if v in begin}
    for a, b in itertools.combinations(offsets, 2):  # a is before b
        (ends_a, ends_b), size = (offsets[v] + 4 * math.prod(v.shape) for v in (a, b)), math.prod(a.shape)
        assert offsets[a] % 64 == 0 <= offsets[a] <= ends_a <= memory
        number = begin[b]
        over = [taken[number][i] for i, _ in found[number].params["input_output_aliases"]]
        if end[a] == number and over == [a] and taken[number].count(a) == 1:
            assert offsets[a] == offsets[b]
        elif end[a] >= number and size:
            assert ends_a <= offsets[b] or ends_b <= offsets[a]


def shared_root(x):
    """A layer whose input and residual are views of one value."""
    a = jax.nn.relu(x @ WIDE)
    return jax.nn.relu(a.reshape(4, 512) @ SQUARE + a.reshape(4, 512)) @ SQUARE


def in_another_order(x):
    return jax.lax.reshape(jax.nn.relu(x @ UP), (48, 8), (1, 0)) @ THIN


def no_numbers(x):
    return jax.nn.relu(x @ UP) @ DOWN, jax.nn.relu(x[:0] @ UP) @ DOWN


def of_nine_axes(x):
    y = x.reshape(1, 1, 1, 1, 1, 1, 2, 4, 16)
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-5)
    return y @ UP @ DOWN


def with_new_axes(x):
    return jax.nn.relu(jax.nn.relu(x @ UP)[:, None] @ DOWN)[..., 0, :] @ UP


WIDE, SQUARE, THIN = kernel(16, 256), kernel(512, 512), kernel(8, 8)


@pytest.mark.parametrize("network", [shared_root, in_another_order, no_numbers, of_nine_axes, with_new_axes])
def test_views_sizes_and_ranks(network):
    x = jnp.asarray(RNG.normal(size=(8, 16)), jnp.float32)
    fast = sapp.specialize(network, x, mode="always")
    got, want = (jax.tree.leaves(each) for each in (fast(x), network(x)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    if network is with_new_axes:
        assert jax.jit(fast.fn).lower(fast.weights, x).as_text().count(f"@{native.SEQUENCE}(") == 1


def test_effects_keep_their_order_and_their_time():
    """One of them depends on no input: it is due at each call, not when the network is traced."""
    w, found = kernel(16, 16), []

    def network(x):
        jax.debug.callback(lambda y: found.append("layer"), jax.nn.relu(x @ w) @ w, ordered=True)
        jax.debug.callback(lambda: found.append("nothing"), ordered=True)
        jax.debug.callback(lambda y: found.append("input"), x, ordered=True)
        return x @ w

    fast = sapp.specialize(network, jnp.ones((2, 16)), mode="always")
    found.clear()
    for _ in range(2):
        jax.block_until_ready(fast(jnp.ones((2, 16))))
    jax.effects_barrier()
    assert found == ["layer", "nothing", "input"] * 2


def test_numbers_are_arguments_too():
    w = kernel(16, 16)
    fast = sapp.specialize(lambda x, factor: jax.nn.relu(x @ w) @ w * factor, jnp.ones((2, 16)), 1.0, mode="always")
    x = jnp.asarray(RNG.normal(size=(2, 16)), jnp.float32)
    np.testing.assert_allclose(fast.fn(fast.weights, x, 2.0), jax.nn.relu(x @ w) @ w * 2, rtol=1e-5, atol=1e-5)


ATTRIBUTES = {  # in the order in which `csrc/sequence.cc` reads them
    native.CONV: "activation bottom left residual_scale residual_zero right stride_across stride_down top "
    "window_columns window_rows y_unit y_zero",
    native.DEPTHWISE: "activation dilation_across dilation_down left stride_across stride_down top",
    native.ATTENTION: "scale sizes strides",
    native.LAYER_NORM: "centred epsilon factor zero",
    native.MAX_POOL: "left stride_across stride_down top window_columns window_rows",
    native.SUM_POOL: "left stride_across stride_down top window_columns window_rows",
    native.ROUND: "left scale top zero",
    native.LOOK_UP: "",
}


def test_the_order_of_attributes():
    ones = jnp.ones(4)
    w = sapp.sparse.BlockSparse.fromdense(jnp.ones((1, 1, 4, 4)), (4, 4))
    heads = jax.ShapeDtypeStruct((9, 4), jnp.float32)
    run = {
        native.CONV: lambda image: native.conv(image, w.blocks, w.layout),
        native.DEPTHWISE: lambda image: native.depthwise_conv(
            image, jnp.ones((3, 3, 4)), strides=(1, 1), dilation=(1, 1), padding=((1, 1), (1, 1))
        ),
        native.ATTENTION: lambda image: native.attention(
            *(image.reshape(-1, 4)[:9],) * 3, None, 1.0, heads, (1, 1, 1, 9, 9, 4, 4, 9), [(0, 0, 0, 4)] * 5
        ),
        native.LAYER_NORM: lambda image: native.layer_norm(image, ones, ones, 1e-5, True, jnp.float32),
        native.MAX_POOL: lambda image: native.max_pool(image, (2, 2), (2, 2), ((0, 0), (0, 0))),
        native.SUM_POOL: lambda image: native.sum_pool(image, (2, 2), (2, 2), ((0, 0), (0, 0))),
        native.ROUND: lambda image: native.round_images(image, jnp.float32),
        native.LOOK_UP: lambda image: native.look_up(image, jnp.arange(4)[::-1]),
    }
    assert set(run) == set(native.KINDS) - {native.NARROW_CONV}
    for kind, call in run.items():
        traced = recorded(jax.make_jaxpr(call)(jnp.ones((1, 6, 6, 4))), (), None, None)
        steps = [step for step in traced.steps if step.name == "ffi_call"]
        assert [step.params["target_name"] for step in steps] == [kind]
        assert [name for name, _ in sorted(steps[0].params["attributes"])] == ATTRIBUTES[kind].split()
