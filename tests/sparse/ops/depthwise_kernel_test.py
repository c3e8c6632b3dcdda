"""The compiled kernel's depthwise convolution against sums over positions, in NumPy."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from sa_plus_plus.sparse.ops import native

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


def convolved(x, kernel, strides, dilation, padding):
    """In float64: what each tap of the window adds to all positions."""
    x = np.pad(x.astype(np.float64), ((0, 0), *padding, (0, 0)))
    x = np.repeat(x, kernel.shape[2] // x.shape[3], -1)
    reach = [(k - 1) * d for k, d in zip(kernel.shape, dilation, strict=False)]
    rows, columns = (max((n - r - 1) // s + 1, 0) for n, r, s in zip(x.shape[1:3], reach, strides, strict=True))
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[2]))
    for i in range(rows):
        for j in range(columns):
            at = i * strides[0], j * strides[1]
            seen = x[:, at[0] : at[0] + reach[0] + 1 : dilation[0], at[1] : at[1] + reach[1] + 1 : dilation[1]]
            y[:, i, j] = np.einsum("brsc,rsc->bc", seen, kernel)
    return y


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def layers(draw):
    """Images and a kernel in small integers, and how it goes over them."""
    channels, multiplier = draw(st.sampled_from([1, 3, 8, 17, 32, 44, 100])), draw(st.sampled_from([1, 1, 2, 3]))
    window, dilation = draw(st.tuples(st.integers(1, 5), st.integers(1, 7))), draw(pairs)
    padding = tuple(draw(st.tuples(st.integers(0, 4), st.integers(0, 4))) for _ in range(2))
    size = [
        draw(st.integers(max(1, (k - 1) * d + 1 - sum(pads)), 20))
        for k, d, pads in zip(window, dilation, padding, strict=True)
    ]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    x = rng.integers(-9, 10, (draw(st.integers(1, 2)), *size, channels)).astype(np.float32)
    kernel = rng.integers(-9, 10, (*window, channels * multiplier)).astype(np.float32)
    return x, kernel, {"strides": draw(pairs), "dilation": dilation, "padding": padding}


@hypothesis.given(layers(), st.booleans(), st.booleans(), st.sampled_from(["none", "relu6", "silu"]))
@problems.examples(20)
def test_sums_are_exact(drawn, biased, added, activation):
    x, kernel, geometry = drawn
    want = convolved(x, kernel, **geometry)
    rng = np.random.default_rng(0)
    bias, residual = (rng.integers(-9, 10, shape).astype(np.float32) for shape in (kernel.shape[-1], want.shape))
    want += bias * biased + residual * added
    got = native.depthwise_conv(
        *map(jnp.asarray, (x, kernel)),
        **geometry,
        bias=jnp.asarray(bias) if biased else None,
        residual=jnp.asarray(residual) if added else None,
        activation=activation,
    )
    if activation == "silu":
        np.testing.assert_allclose(got, want / (1 + np.exp(np.minimum(-want, 80))), rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(got, np.clip(want, 0, 6) if activation == "relu6" else want)


def test_no_number_is_lost():
    """NaN and infinity come out where windows see them, and nowhere else."""
    x = np.zeros((1, 9, 11, 20), np.float32)
    x[0, 4, 5, 3], x[0, 0, 0, 19] = np.nan, np.inf
    options = {"strides": (1, 1), "dilation": (1, 1), "padding": ((1, 1), (1, 1)), "activation": "relu"}
    y = np.asarray(native.depthwise_conv(jnp.asarray(x), jnp.ones((3, 3, 20)), **options))
    lost = np.argwhere(np.isnan(y))
    assert lost.tolist() == [[0, i, j, 3] for i in (3, 4, 5) for j in (4, 5, 6)]
    assert np.argwhere(np.isinf(y)).tolist() == [[0, i, j, 19] for i in (0, 1) for j in (0, 1)]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"kernel": np.ones((3, 3, 5), np.float32)}, "incompatible shapes"),
        ({"bias": np.ones(3, np.float32)}, "one number for each channel"),
        ({"residual": np.ones(3, np.float32)}, "the residual"),
        ({"x": np.ones((1, 4, 4, 3), np.float32)}, "not a multiple"),
        ({"stride_down": 0}, "out of range"),
        ({"dilation_across": 2**62}, "out of range"),
        ({"activation": 99}, "an unknown activation"),
        ({"x": np.ones((1, 4, 4, 4), jnp.bfloat16)}, "float32"),
    ],
)
def test_calls_that_do_not_fit_are_refused(change, wanted):
    """As a forged file could make them."""
    none = np.zeros(0, np.float32)
    call = {"x": np.ones((1, 4, 4, 4), np.float32), "kernel": np.ones((3, 3, 4), np.float32), "bias": none}
    call |= {"residual": none, "stride_down": 1, "stride_across": 1, "dilation_down": 1, "dilation_across": 1}
    call |= {"top": 0, "left": 0, "activation": 0} | change
    operands = [jnp.asarray(call.pop(name)) for name in ("x", "kernel", "bias", "residual")]
    run = jax.ffi.ffi_call(native.DEPTHWISE, jax.ShapeDtypeStruct((1, 2, 2, 4), jnp.float32))
    with pytest.raises((ValueError, RuntimeError), match=wanted):
        jax.block_until_ready(run(*operands, **{name: np.int64(n) for name, n in call.items()}))
