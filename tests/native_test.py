"""The compiled kernel against NumPy: exact in integers, and what follows each product."""

import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import sa_plus_plus.sparse.ops.native as native
from sa_plus_plus.sparse import BlockSparse

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


def convolved(x, kernel, strides):
    """In float64, with NumPy alone."""
    (k_h, k_w, _, outputs), (down, across) = kernel.shape, strides
    rows, columns = (x.shape[1] - k_h) // down + 1, (x.shape[2] - k_w) // across + 1
    y = np.zeros((x.shape[0], rows, columns, outputs))
    for i in range(k_h):
        for j in range(k_w):
            part = x[:, i : i + down * (rows - 1) + 1 : down, j : j + across * (columns - 1) + 1 : across]
            y += part.astype(np.float64) @ kernel[i, j].astype(np.float64)
    return y


@st.composite
def layers(draw):
    """Images in bytes, an int8 kernel by blocks, and a way to go over them."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    window = draw(st.sampled_from([(1, 1), (3, 3), (2, 1)]))
    b_r, b_c = draw(st.sampled_from([(4, 16), (8, 32), (20, 16), (64, 16), (72, 48)]))
    channels, outputs = b_r * draw(st.integers(1, 2)), draw(st.sampled_from([1, 16, 37]))
    size = draw(st.sampled_from([(3, 3), (5, 21), (9, 7)]))
    x = rng.integers(0, 256, (2, *size, channels)).astype(np.uint8)
    kernel = rng.integers(-127, 128, (*window, channels, outputs)).astype(np.int8)
    grid = BlockSparse.fromdense(kernel, (b_r, b_c)).layout.grid
    mask = rng.random(grid) < draw(st.sampled_from([0, 0.3, 1]))
    border = draw(st.sampled_from([((0, 0), (0, 0)), ((1, 2), (3, 0))]))
    return x, BlockSparse.fromdense(kernel, (b_r, b_c), mask), draw(st.sampled_from([(1, 1), (2, 2)])), border


@hypothesis.given(layers())
@problems.examples(10)
def test_integers_are_exact(drawn):
    x, w, strides, border = drawn
    rng = np.random.default_rng(0)
    want = convolved(x, np.asarray(w.todense()), strides)
    pads = ((0, 0), *border, (0, 0))
    blocks = native.interleave_rows(np.asarray(w.blocks))

    sums = native.conv(x, blocks, w.layout, strides=strides, epilogue=native.Epilogue(border=border))
    np.testing.assert_array_equal(sums, np.pad(want, pads))

    # Powers of two and integers: exact, ties included, whatever the order of operations.
    scale = 2.0 ** rng.integers(-14, -8, want.shape[-1])
    bias = rng.integers(-50, 50, want.shape[-1])
    residual = rng.integers(0, 256, want.shape).astype(np.uint8)
    for activation in ("none", "relu"):
        epilogue = native.Epilogue(np.uint8, activation, 1.0, 7, 0.5, 3, border)
        got = native.conv(
            *(x, blocks, w.layout),
            strides=strides,
            scale=jnp.asarray(scale, jnp.float32),
            bias=jnp.asarray(bias, jnp.float32),
            residual=jnp.asarray(residual),
            epilogue=epilogue,
        )
        result = want * scale + bias + (residual.astype(np.float64) - 3) * 0.5
        result = np.maximum(result, 0) if activation == "relu" else result
        result = np.pad(np.clip(np.rint(result + 7), 0, 255), pads, constant_values=7)
        np.testing.assert_array_equal(got, result)


@hypothesis.given(layers(), st.sampled_from([np.float32, jnp.bfloat16]))
@problems.examples(6)
def test_halves_are_exact_where_they_hold_the_numbers(drawn, out):
    x, w, strides, border = drawn
    x = ((x.astype(np.float32) - 128) / 16).astype(jnp.bfloat16)  # eight bits
    blocks = np.asarray(w.blocks).astype(np.float32) / 16
    kernel = np.asarray(w.todense()).astype(np.float32) / 16
    want = np.pad(convolved(np.asarray(x, np.float32), kernel, strides), ((0, 0), *border, (0, 0)))
    got = native.conv(
        *(x, native.interleave_rows(blocks.astype(jnp.bfloat16)), w.layout),
        strides=strides,
        epilogue=native.Epilogue(dtype=out, border=border),
    )
    assert got.dtype == out
    np.testing.assert_array_equal(np.asarray(got, np.float32), want.astype(np.float32).astype(out).astype(np.float32))


def test_values_that_are_not_finite():
    """NaN stays, in bfloat16 too, ReLU keeps it, and bytes are clamped."""
    w = BlockSparse.fromdense(np.ones((4, 16), np.float32), (4, 16))
    x = np.ones((1, 1, 3, 4), np.float32) * np.array([np.nan, np.inf, -np.inf], np.float32)[:, None]
    for dtype in (np.float32, jnp.bfloat16):
        got = native.conv(x, w.blocks, w.layout, epilogue=native.Epilogue(dtype=dtype, activation="relu"))
        np.testing.assert_array_equal(np.asarray(got, np.float32)[0, 0, :, 0], [np.nan, np.inf, 0])
    got = native.conv(x, w.blocks, w.layout, epilogue=native.Epilogue(dtype=np.uint8, zero=9))
    np.testing.assert_array_equal(got[0, 0, 1:, 0], [255, 0])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.uint8])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [((3, 3), (2, 2), ((1, 1), (1, 1))), ((2, 3), (1, 3), ((0, 0), (0, 2))), ((5, 1), (4, 4), ((4, 4), (0, 0)))],
)
def test_max_pool(dtype, window, strides, padding):
    x = (np.random.default_rng(0).integers(0, 200, (2, 9, 8, 5)) - (0 if dtype == np.uint8 else 100)).astype(dtype)
    got = native.max_pool(jnp.asarray(x), window, strides, padding)
    low = 0 if dtype == np.uint8 else -np.inf
    padded = np.pad(x.astype(np.float32), ((0, 0), *padding, (0, 0)), constant_values=low)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window, (1, 2))[:, :: strides[0], :: strides[1]]
    np.testing.assert_array_equal(np.asarray(got, np.float32), windows.max((-1, -2)))


@pytest.mark.parametrize("channels", [1, 16, 33, 64, 131, 260])  # some, and none, beyond whole vectors
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.uint8])
def test_pooling_of_any_number_of_channels(channels, dtype):
    x = np.random.default_rng(channels).integers(0, 256, (1, 3, 4, channels)).astype(dtype)
    args = ((2, 2), (1, 2), ((0, 0), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float32), (2, 2), (1, 2))[:, :, ::2]
    got = native.max_pool(jnp.asarray(x), *args)
    np.testing.assert_array_equal(np.asarray(got, np.float32), windows.max((-1, -2)))
    if dtype == np.float32:
        np.testing.assert_array_equal(native.sum_pool(jnp.asarray(x), *args), windows.sum((-1, -2)))


def test_sums_of_windows_leave_out_what_is_beyond_the_edges():
    x = np.random.default_rng(0).standard_normal((2, 5, 6, 20), np.float32)
    got = native.sum_pool(jnp.asarray(x), (3, 3), (2, 1), ((1, 1), (1, 1)))
    want = jax.lax.reduce_window(
        x, np.float32(0), jax.lax.add, (1, 3, 3, 1), (1, 2, 1, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_pooling_keeps_nan():
    x = np.array([1, np.nan, np.nan, 2, 3, 4], np.float32).reshape(1, 1, 6, 1)
    for dtype in (np.float32, jnp.bfloat16):
        got = native.max_pool(jnp.asarray(x.astype(dtype)), (1, 2), (1, 2), ((0, 0), (0, 0)))
        np.testing.assert_array_equal(np.asarray(got, np.float32).ravel(), [np.nan, np.nan, 4])


def test_rounding_of_images():
    x = np.array([-3, -0.5, 0.5, 1.5, 2.49, 300, np.inf, 0], np.float32).reshape(1, 2, 2, 2)
    border = ((1, 0), (0, 2))
    got = native.round_images(x, np.uint8, factor=0.5, zero=10, border=border, channels=4)
    want = np.pad(np.clip(np.rint(x / 0.5) + 10, 0, 255), ((0, 0), *border, (0, 2)), constant_values=10)
    np.testing.assert_array_equal(got, want)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 3)).astype(np.float32)
    x[0, 0, 0, 0] = np.nan
    got = native.round_images(x, jnp.bfloat16, border=border)
    want = np.pad(x.astype(jnp.bfloat16), ((0, 0), *border, (0, 0)))
    np.testing.assert_array_equal(np.asarray(got, np.float32), want.astype(np.float32))


@pytest.mark.parametrize(("single", "half", "pays"), [(2.0, 1.0, True), (1.0, 2.0, False)])
def test_bfloat16_pays_where_it_is_faster(monkeypatch, single, half, pays):
    def nanoseconds(code):
        return (single, half)[code]

    monkeypatch.setattr(native, "_library", lambda: types.SimpleNamespace(sa_plus_plus_nanoseconds=nanoseconds))
    assert native.bf16_is_faster.__wrapped__() is pays


def test_instructions():
    assert {native.isa(t) for t in (np.float32, jnp.bfloat16, np.uint8)} <= {
        *("amx", "avx512_vnni", "avx512_bf16", "avx512", "avx_vnni", "avx2", "baseline")
    }
    with jax.enable_x64(True), pytest.raises(KeyError):
        native.isa(np.float64)
