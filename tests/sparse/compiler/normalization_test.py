"""Layer normalisation in the compiled kernel: its numbers against NumPy's, and what is recognised as one."""

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import sa_plus_plus as sapp
from sa_plus_plus.contrib.transformers.encoder import Encoder
from sa_plus_plus.sparse.ops import native

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
KERNEL = np.random.default_rng(0).normal(size=(24, 24)).astype(np.float32)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def normalized(x, scale, shift, epsilon, centred):
    """In float64."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True) if centred else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale + shift


@hypothesis.given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    columns=st.one_of(st.integers(1, 70), st.sampled_from([128, 384, 1000])),
    dtypes=st.tuples(
        st.sampled_from([np.float32, jnp.bfloat16]), st.sampled_from([np.float32, jnp.bfloat16, np.uint8])
    ),
    epsilon=st.sampled_from([1e-12, 1e-5, 0.5]),
    centred=st.booleans(),
    offset=st.sampled_from([0.0, -3.0, 1000.0]),
)
@problems.examples(20)
def test_numbers(shape, columns, dtypes, epsilon, centred, offset):
    x = normal(*shape, columns) + offset
    x = x.at[..., 0].add(2.0).astype(dtypes[0])  # a row of equal numbers would be divided by the root of epsilon
    scale, shift = np.array(normal(columns)), np.array(normal(columns + 1)[1:])
    got = native.layer_norm(x, scale, shift, epsilon, centred, dtypes[1], 0.05, 100)
    want = normalized(x, scale, shift, epsilon, centred)
    assert (got.shape, got.dtype) == (x.shape, dtypes[1])
    got = np.asarray(got, np.float64)
    if dtypes[1] == np.uint8:
        assert np.all(np.abs(got - np.clip(want / 0.05 + 100, 0, 255)) <= 0.5 + 0.02 * (1 + abs(offset)))
    else:
        tolerance = 1e-2 if dtypes[1] == jnp.bfloat16 else 1e-5 * (1 + abs(offset)) / (1 if columns > 1 else 1e-3)
        hypothesis.assume(columns > 1 or epsilon > 0.1)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_many_rows_are_cut_into_parts():
    x = normal(513, 100)
    got = native.layer_norm(x, jnp.ones(100), jnp.zeros(100), 1e-6, True, np.float32)
    np.testing.assert_allclose(got, normalized(x, 1, 0, 1e-6, True), rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_in_its_row():
    x = normal(3, 40).at[1, 37].set(jnp.nan)
    got = np.asarray(native.layer_norm(x, jnp.ones(40), jnp.zeros(40), 1e-6, True, np.float32))
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()


def plain(x, epsilon=1e-5):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + epsilon)


def module(layer):
    """A function of a flax module with random parameters."""

    def apply(x):
        variables = layer.init(jax.random.key(0), x)
        return layer.apply(jax.tree.map(lambda a: a + 0.3 * normal(*a.shape), variables), x)

    return apply


FORMS = {
    "flax": (module(nn.LayerNorm(1e-12)), "layer_norm"),
    "flax, slow variance": (module(nn.LayerNorm(use_fast_variance=False)), "layer_norm"),
    "flax, without parameters": (module(nn.LayerNorm(use_scale=False, use_bias=False)), "layer_norm"),
    "flax, RMS": (module(nn.RMSNorm()), "rms_norm"),
    "var": (lambda x: plain(x) * normal(24) + 2, "layer_norm"),
    "scale of all": (lambda x: 3 - plain(x), "layer_norm"),
    "power": (lambda x: (x - x.mean(-1, keepdims=True)) * (x.var(-1, keepdims=True) + 0.1) ** -0.5, None),
    "in bfloat16": (lambda x: module(nn.LayerNorm(dtype=jnp.bfloat16))(x.astype(jnp.bfloat16)), "layer_norm"),
    "unbiased": (lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5), None),
    "of standard deviation": (lambda x: (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 0.1), None),
    "a guarded length": (lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12), None),
    "and a limit": (lambda x: jnp.maximum(plain(x), -4.5), "layer_norm"),
    "a limit that no result reaches": (lambda x: jnp.maximum(plain(x), -5), "layer_norm"),
    "of everything": (lambda x: (x - x.mean()) / jnp.sqrt(x.var() + 1e-5), None),
    "of rows": (lambda x: (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5), None),
    "groups": (module(nn.GroupNorm(4)), None),
    "and the mean": (lambda x: plain(x) + x.mean(-1, keepdims=True), "layer_norm"),
    "and a scale of each row": (lambda x: plain(x) * normal(7, 1), "layer_norm"),
    "and a mask of rows": (lambda x: plain(x) * (jnp.arange(7) != 6)[:, None], "layer_norm"),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("form", FORMS)
def test_recognition(form):
    """Every form gives the same numbers, as one step or as it was traced."""
    function, name = FORMS[form]
    x = normal(7, 24)

    def network(x):
        return function(x @ KERNEL) @ jnp.eye(24, dtype=jnp.float32)

    want, fast = jax.jit(network)(x), sapp.specialize(network, x, mode="always")
    steps = [step for step in fast.steps if step.endswith("_norm")]
    assert steps == ([] if name is None else [name])
    tolerance = 2e-2 if "bfloat16" in form else 2e-5
    np.testing.assert_allclose(fast(x), want, rtol=tolerance, atol=tolerance)
    if name and "bfloat16" not in form and "and" not in form:
        assert set(fast.steps) == {"dense", name}


GUARDED = [
    lambda x, length: x / jnp.maximum(length, 1e-12),
    lambda x, length: x / jnp.where(length > 0, length, 1),
    lambda x, length: x / (length + 1e-12),
    lambda x, length: x * jax.lax.rsqrt(jnp.maximum(length**2, 1e-12)),
]


@pytest.mark.parametrize("number", range(len(GUARDED)))
def test_rows_of_zeros_stay_zeros(number):
    """Where a network guards against them: without an epsilon below the root the compiled step would divide 0 by 0."""
    x = normal(7, 24).at[2:5].set(0)

    def network(x):
        x = jax.nn.relu(x @ KERNEL)
        return GUARDED[number](x, jnp.linalg.norm(x, axis=-1, keepdims=True))

    np.testing.assert_allclose(sapp.specialize(network, x, mode="always")(x), jax.jit(network)(x), atol=1e-5)


def test_a_limit_on_a_normalisation_stays():
    x = 10 * jnp.eye(24, dtype=jnp.float32)
    kernel = jnp.eye(24, dtype=jnp.float32)
    for limit in (lambda y: jnp.minimum(y, 3), lambda y: jnp.clip(y, -4.7, 4.7), lambda y: jnp.maximum(-y, -4)):
        network = lambda x, limit=limit: limit(plain(x @ kernel))  # noqa: E731
        np.testing.assert_allclose(sapp.specialize(network, x, mode="always")(x), jax.jit(network)(x), atol=1e-5)


def test_what_others_use_is_kept():
    """The value itself, as beside a residual, may have other users; what is computed on the way may not."""

    def before(x):
        x = x @ KERNEL
        return x + plain(x) @ KERNEL

    def outside(x):
        x = x @ KERNEL
        return plain(x) @ KERNEL, x.mean(-1)

    x = normal(7, 24)
    assert sapp.specialize(before, x, mode="always").steps == ("dense", "layer_norm", "dense, residual")
    fast = sapp.specialize(outside, x, mode="always")
    for got, want in zip(fast(x), outside(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("standard_promotion")
def test_an_encoder_runs_between_compiled_steps(tmp_path):
    """No operation of XLA's is left between the kernels but reshapes; also in a served file."""
    model, x = Encoder(layers=2, width=32, hidden=64, heads=2), normal(2, 16, 32)
    variables = problems.variables(model, x)
    fast = sapp.specialize(lambda x: model.apply(variables, x), x, mode="always")
    assert fast.steps.count("layer_norm") == 4
    layers = [step for step in fast.steps if step.startswith("dense")]
    assert {*fast.steps} - {*layers} == {"layer_norm", "attention", "reshape", "slice", "squeeze"}
    np.testing.assert_allclose(fast(x), model.apply(variables, x), rtol=1e-4, atol=1e-4)
    fast.save(tmp_path / "network")
    np.testing.assert_array_equal(sapp.serve.load(tmp_path / "network")(x), fast(x))


@pytest.mark.parametrize("options", [{"mode": "never"}, {"mode": "always", "implementation": "xla"}])
def test_without_the_compiled_kernel_it_stays_as_traced(options):
    fast = sapp.specialize(lambda x: plain(x @ KERNEL), normal(7, 24), **options)
    assert not any(step.endswith("_norm") for step in fast.steps)
    assert "sqrt" in fast.steps


@pytest.mark.filterwarnings("ignore:specialize found no")
def test_nothing_else_is_compiled_for_it():
    fast = sapp.specialize(plain, normal(7, 24), mode="always")
    assert "sqrt" in fast.steps


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"scale": np.ones(5, np.float32)}, "scale and shift need one number"),
        ({"shift": np.ones(0, np.float32)}, "scale and shift need one number"),
        ({"out": jax.ShapeDtypeStruct((4, 3), np.float32)}, "incompatible shapes"),
        ({"out": jax.ShapeDtypeStruct((3, 4), np.int32)}, "neither float32, bfloat16 nor bytes"),
        ({"x": np.ones((3, 4), np.uint8)}, "x is neither float32 nor bfloat16"),
        ({"out": jax.ShapeDtypeStruct((3, 4), np.uint8), "zero": np.float32(256)}, "zero point is not a byte"),
    ],
)
def test_the_kernel_refuses_wrong_buffers(change, wanted):
    call = {"x": np.ones((3, 4), np.float32), "out": jax.ShapeDtypeStruct((3, 4), np.float32), "zero": np.float32(0)}
    call |= {"scale": np.ones(4, np.float32), "shift": np.ones(4, np.float32)} | change
    options = {"centred": np.int64(1), "epsilon": np.float32(1), "factor": np.float32(1), "zero": call["zero"]}
    with pytest.raises((ValueError, RuntimeError), match=wanted):
        jax.block_until_ready(
            jax.ffi.ffi_call(native.LAYER_NORM, call["out"])(call["x"], call["scale"], call["shift"], **options)
        )
