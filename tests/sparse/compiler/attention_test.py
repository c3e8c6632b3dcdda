"""Attention in the compiled kernel: its numbers against NumPy's, and what is recognised as attention."""

import functools
import re

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import sa_plus_plus as sapp
from sa_plus_plus.contrib.transformers.encoder import Bert, Encoder
from sa_plus_plus.contrib.transformers.transformer import Decoder
from sa_plus_plus.sparse.compiler.frontend import layers_fused
from sa_plus_plus.sparse.compiler.passes.fuse_attention import fuse_attention
from sa_plus_plus.sparse.ops import native

pytestmark = [
    pytest.mark.skipif(
        native.unavailable_reason() is not None, reason=f"no compiled kernel: {native.unavailable_reason()}"
    ),
    pytest.mark.filterwarnings("ignore:specialize found no"),
]
AXES = ("batch", "shared", "group", "rows")


def numbers(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


def reference(q, k, v, scale, bias):
    """Attention in float64; all with axes (batch, shared, group, rows, numbers)."""
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    scores = scale * np.einsum("bsgqd,bsgkd->bsgqk", q, k) + bias
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bsgqk,bsgkd->bsgqd", powers / powers.sum(-1, keepdims=True), v)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    heads=st.tuples(*[st.integers(1, 3)] * 3),
    queries=st.one_of(st.integers(1, 20), st.just(131)),
    keys=st.one_of(st.integers(1, 40), st.just(200)),
    depth=st.integers(1, 70),
    width=st.integers(1, 70),
    orders=st.lists(st.permutations(range(4)), min_size=4, max_size=4),
    single=st.sets(st.integers(0, 3)),
    dtype=st.sampled_from([np.float32, jnp.bfloat16]),
)
def test_kernel(heads, queries, keys, depth, width, orders, single, dtype):
    """Any sizes, the axes of each array in any order, keys shared by a group, a bias that is the same along axes."""
    b, s, g = heads
    shapes = [(b, s, g, queries, depth), (b, s, 1, keys, depth), (b, s, 1, keys, width)]
    q, k, v = (numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    bias = numbers(*[1 if i in single else n for i, n in enumerate((b, s, g, queries))], keys)

    def laid_out(x, order):
        moved = np.transpose(np.asarray(x), (*order, 4))
        steps = np.cumprod([1, *moved.shape[:0:-1]])[::-1]
        at = [int(steps[order.index(i)]) if x.shape[i] > 1 else 0 for i in range(4)]
        return jnp.asarray(moved), at

    (q2, q_at), (k2, k_at), (v2, v_at) = (laid_out(x, order) for x, order in zip((q, k, v), orders[:3], strict=True))
    (bias2, bias_at), order = laid_out(bias, [0, 1, 2, 3]), orders[3]
    y_shape = jax.ShapeDtypeStruct([(b, s, g, queries)[i] for i in order] + [width], dtype)
    steps = np.cumprod([1, *y_shape.shape[:0:-1]])[::-1]
    y_at = [int(steps[order.index(i)]) for i in range(4)]
    sizes = (b, s, g, queries, keys, depth, width, keys)
    y = native.attention(q2, k2, v2, bias2, 0.25, y_shape, sizes, (q_at, k_at, v_at, bias_at, y_at))
    got = np.transpose(np.asarray(y, np.float64), (*np.argsort(order), 4))
    wide = [np.broadcast_to(np.asarray(x, np.float64), (b, s, g, *x.shape[3:])) for x in (k, v)]
    tolerance = 1e-5 if dtype == np.float32 else 1e-2
    np.testing.assert_allclose(got, reference(q, *wide, 0.25, bias), rtol=tolerance, atol=tolerance)


def plain(q, k, v, scale=0.3):
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scale * jnp.einsum("bqhd,bkhd->bhqk", q, k)), v)


def test_large_scores_masked_rows_and_nan():
    q, k, v = (numbers(1, 9, 2, 8, seed=i) for i in range(3))
    fast = sapp.specialize(plain, q, k, v, mode="always")
    np.testing.assert_allclose(fast(1e4 * q, k, v), plain(1e4 * q, k, v), atol=1e-4)
    bad = q.at[0, 3, 1, 0].set(np.nan)
    np.testing.assert_array_equal(np.isnan(fast(bad, k, v)), np.isnan(plain(bad, k, v)))

    def masked(q, k, v, mask):
        return nn.dot_product_attention(q, k, v, mask=mask)

    mask = jnp.ones((1, 1, 9, 9), bool).at[0, 0, 4].set(False)  # nothing to attend to: the mean of all values
    fast = sapp.specialize(masked, q, k, v, mask, mode="always")
    assert [choice.runs for choice in fast.choices] == ["fused"]
    np.testing.assert_allclose(fast(q, k, v, mask), masked(q, k, v, mask), atol=1e-5)
    np.testing.assert_allclose(fast(q, k, v, mask)[0, 4], v[0].mean(0), atol=1e-5)


def module(model, *inputs, **options):
    variables = problems.variables(model, *inputs, **options)
    return lambda *inputs: model.apply(variables, *inputs, **options)


X = numbers(2, 19, 32)
TOKENS, REAL = jnp.arange(38).reshape(2, 19) % 20, jnp.arange(38).reshape(2, 19) % 7 > 0
Q, K, V = numbers(2, 11, 4, 8), numbers(2, 13, 2, 8), numbers(2, 13, 2, 8, seed=1)
BERT = Bert(layers=1, width=32, hidden=32, heads=2, vocabulary=20, context=19)
WEIGHTS = problems.variables(BERT, TOKENS)
BIAS = numbers(1, 4, 11, 13)
SQUARE = numbers(2, 9, 9)
LOW = np.finfo(np.float32).min


def normalised(scores):
    powers = jnp.exp(scores)
    return powers / powers.sum(-1, keepdims=True)


RECOGNISED = {
    "encoder": (module(Encoder(layers=1, width=32, hidden=32, heads=2), X), X),
    "causal decoder": (
        module(Decoder(vocabulary=20, layers=1, width=32, hidden=32, heads=2, context=19), TOKENS),
        TOKENS,
    ),
    "padding": (lambda tokens, real: BERT.apply(WEIGHTS, tokens, real=real), TOKENS, REAL),
    "flax": (module(nn.MultiHeadDotProductAttention(2), X), X),
    "flax, masked": (lambda x, real: nn.dot_product_attention(x, x, x, mask=real[:, None, None]), X[:, :, None], REAL),
    "shared keys": (jax.nn.dot_product_attention, Q, K, V),
    "shared keys, bias": (functools.partial(jax.nn.dot_product_attention, bias=BIAS), Q, K, V),
    "bias among the arguments": (lambda q, k, v, b: jax.nn.dot_product_attention(q, k, v, bias=b), Q, K, V, BIAS),
    "causal": (functools.partial(jax.nn.dot_product_attention, is_causal=True), Q, Q, Q),
    "bfloat16": (jax.nn.dot_product_attention, *(x.astype(jnp.bfloat16) for x in (Q, K, V))),
    "one example": (lambda q, k, v: plain(q[None], k[None], v[None])[0], Q[0], Q[0], Q[0]),
    "without a maximum": (lambda q: normalised(q @ q.mT) @ q, numbers(2, 9, 4)),
    "scaled after a bias": (lambda q: jax.nn.softmax((q @ q.mT + BIAS[:, 0, :9, :9]) / 3) @ q, numbers(2, 9, 4)),
    "one array, one head": (lambda q: jax.nn.softmax(q @ q.mT) @ q, numbers(1, 16, 8)),
    "batch of one": (lambda q: jax.nn.softmax(q @ q.mT / 3) @ q, numbers(1, 3, 16, 8)),
    "one head of many": (lambda q, b: jax.nn.softmax(q @ q.mT + b) @ q, numbers(3, 1, 16, 8), numbers(1, 1, 16, 16)),
    "less than the largest of all": (lambda q: normalised(q @ q.mT - (q @ q.mT).max()) @ q, numbers(2, 9, 4)),
    "two masks": (
        lambda q, m: jax.nn.softmax(jnp.where(m.mT, jnp.where(m, q @ q.mT, LOW), LOW)) @ q,
        SQUARE,
        SQUARE > -1,
    ),
    "a bias, then a mask": (
        lambda q, m: jax.nn.softmax(jnp.where(m.mT, q @ q.mT + jnp.where(m, 0, LOW), LOW)) @ q,
        *(SQUARE, (SQUARE > -1).at[0, 3].set(False).at[0, :, 4].set(False)),
    ),
    "masked by -1e9, a row in full": (
        lambda q, m: jax.nn.softmax(jnp.where(m, q @ q.mT * 5, -1e9)) @ q,
        *(SQUARE, (SQUARE > -1).at[:, 3].set(False)),
    ),
    "sums of fewer axes": (
        lambda q: (lambda e: e / jax.lax.broadcast_in_dim(e.sum(-1), e.shape, (0, 1)) @ q)(jnp.exp(q @ q.mT)),
        SQUARE,
    ),
    "values transposed": (lambda q, v: jnp.einsum("bqk,bdk->bdq", jax.nn.softmax(q @ q.mT), v), X, numbers(2, 7, 19)),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", list(RECOGNISED))
def test_recognised(name):
    fn, *inputs = RECOGNISED[name]
    fast = sapp.specialize(fn, *inputs, mode="always")
    assert [choice.runs for choice in fast.choices if choice.layer == "attention"] == ["fused"]
    assert not {"exp", "dot_general"} & {*fast.steps}
    want, tolerance = jax.jit(fn)(*inputs), 2e-2 if name == "bfloat16" else 2e-5
    np.testing.assert_allclose(
        np.asarray(fast(*inputs), np.float32), np.asarray(want, np.float32), rtol=tolerance, atol=tolerance
    )


def shares_too(q):
    shares = jax.nn.softmax(q @ q.mT)
    return shares @ q, shares


OTHERWISE = {
    "few queries": lambda q: jax.nn.softmax(q[:, :4] @ q.mT) @ q,
    "shares are used": shares_too,
    "soft cap": lambda q: jax.nn.softmax(jnp.tanh(q @ q.mT)) @ q,
    "masked by zero": lambda q: jax.nn.softmax(jnp.where(q > 0, q @ q.mT, 0.0)) @ q,
    "along queries": lambda q: jax.nn.softmax(q @ q.mT, -2) @ q,
    "sums of the wrong axis": lambda q: (jnp.exp(q @ q.mT) / jnp.exp(q @ q.mT).sum(-1)[:, None]) @ q,
    "another maximum": lambda q: (
        (jnp.exp(q @ q.mT - q.max(-2)[:, None]) / jnp.exp(q @ q.mT).sum(-1, keepdims=True)) @ q
    ),
    "no softmax": lambda q: (q @ q.mT) @ q,
    "rounded scores": lambda q: jax.nn.softmax((3 * q @ q.mT).astype(jnp.int32).astype(jnp.float32)) @ q,
    "rounded shares": lambda q: jax.nn.softmax(3 * q @ q.mT).astype(bool).astype(jnp.float32) @ q,
    "masks of two values": lambda q: jax.nn.softmax(jnp.where(q > 0, jnp.where(q < 1, q @ q.mT, -1e9), -1e20)) @ q,
    "scalar scores": lambda q: jax.nn.softmax(q[0, 0] @ q[0, 1] + q) @ q,
    "one of two results": lambda q: jnp.split(q, [4], -1)[1] @ q[:, 4:],
    "sums from one of two results": lambda q: (lambda e: e / jnp.split(jnp.tile(e, 2), 2, -1)[1] @ q)(
        jnp.exp(q @ q.mT)
    ),
    "a transposed sum": lambda q: (lambda e: e / e.sum(-1).T.reshape(2, 9, 1) @ q)(jnp.exp(q @ q.mT)),
}


@pytest.mark.parametrize("name", list(OTHERWISE))
def test_not_attention(name):
    fn = OTHERWISE[name]
    fast = sapp.specialize(lambda q: jax.tree.map(lambda y: y @ jnp.eye(9), fn(q)), SQUARE, mode="always")
    assert "attention" not in {choice.layer for choice in fast.choices}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), fast(SQUARE), jax.jit(fn)(SQUARE))


def test_measured_saved_and_among_layers(tmp_path):
    fn, x = RECOGNISED["encoder"]
    fast = sapp.specialize(fn, x)
    (row,) = [choice for choice in fast.choices if choice.layer == "attention"]
    assert row.kernel == (4, 19, 19, 16)
    assert row.runs == ("fused" if row.compiled_seconds < row.traced_seconds else "traced")
    assert re.search("^attention +4×19×19×16 ", str(fast), re.MULTILINE)
    np.testing.assert_allclose(fast(x), jax.jit(fn)(x), atol=1e-5)
    narrow = sapp.specialize(fn, x, mode="always", precision="int8", calibration=[x])
    narrow.save(tmp_path / "network")
    np.testing.assert_array_equal(sapp.serve.load(tmp_path / "network")(x), narrow(x))
    assert "attention" not in {c.layer for c in sapp.specialize(fn, x, mode="always", implementation="xla").choices}


def test_as_traced():
    """A step that is slower in the compiled kernel runs the operations that it stands for."""
    fn, *inputs = RECOGNISED["shared keys, bias"]
    (step,) = [s for s in fuse_attention(layers_fused(fn, *inputs)).steps if hasattr(s, "axes")]
    q, k, v, bias = (v.full if hasattr(v, "full") else x for v, x in zip(step.inputs, [*inputs, None], strict=True))
    y = step.traced(q.reshape(2, 11, 2, 2, 8), k, v, bias)
    np.testing.assert_array_equal(y.reshape(Q.shape), fn(*inputs))


def test_causal_masks_need_no_bias():
    fn, q, k, v = RECOGNISED["causal"]
    fast = sapp.specialize(fn, q, k, v, mode="always")
    assert [step for step in fast.steps if "attention" in step] == ["attention, causal"]
    bands = {"later": np.tri(11, 13, 2), "band": np.tri(11, 13, 2) - np.tri(11, 13, -2), "none": np.tri(11, 13, -1)}
    for name, mask in bands.items():
        banded = functools.partial(jax.nn.dot_product_attention, mask=jnp.asarray(mask, bool))
        fast = sapp.specialize(banded, Q, K, V, mode="always")
        step = "attention, causal" if name == "later" else "attention, bias"
        assert [step for step in fast.steps if "attention" in step] == [step]
        np.testing.assert_allclose(fast(Q, K, V), jax.jit(banded)(Q, K, V), atol=1e-5)


def test_several_devices_by_shard_map():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    q = numbers(2, 16, 8)

    def fn(q):
        return jax.nn.softmax(q @ q.mT) @ q

    fast = sapp.specialize(fn, q[:1], mode="always")
    spec = jax.sharding.PartitionSpec("d")
    sharded = jax.shard_map(lambda q: fast.fn(fast.weights, q), mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(jax.jit(sharded)(q), fn(q), atol=1e-5)


def test_other_operations_stay():
    def fn(q):
        jax.debug.print("{}", q.sum())
        return jax.nn.softmax(q @ q.mT) @ q

    fast = sapp.specialize(fn, SQUARE, mode="always")
    assert sum("print" in step or "callback" in step for step in fast.steps) == 1


def test_long_networks_are_searched_in_linear_time():
    def fn(x, gate, v):
        for i in range(300):
            x = x * 0.9 + jnp.where(gate, jnp.sin(x) * 0.1, i)
        return jax.nn.softmax(x) @ v

    fast = sapp.specialize(fn, SQUARE, SQUARE > 0, SQUARE, mode="always")
    np.testing.assert_allclose(fast(SQUARE, SQUARE > 0, SQUARE), jax.jit(fn)(SQUARE, SQUARE > 0, SQUARE), rtol=1e-5)


def test_refused():
    out, sizes, at = jax.ShapeDtypeStruct(Q.shape, Q.dtype), [2, 4, 1, 11, 11, 8, 8, 11], [352, 8, 0, 32]
    call = functools.partial(native.attention, Q, Q, Q, None, 1.0, out)
    np.testing.assert_allclose(call(sizes, [at] * 5), plain(Q, Q, Q, 1.0), atol=1e-5)
    for wrong, strides in (
        ([2, 4, 1, 12, 11, 8, 8, 1], at),
        ([2, 4, 1, 11, 11, 8, 8, 0], at),
        (sizes, [352, 8, 0, -32]),
    ):
        with pytest.raises(Exception, match=r"attention: (an operand is too small|an axis is empty|a stride is)"):
            call(wrong, [strides] * 5).block_until_ready()
    with pytest.raises(Exception, match="of different types"):
        native.attention(Q, Q, Q.astype(jnp.bfloat16), None, 1.0, out, sizes, [at] * 5).block_until_ready()
