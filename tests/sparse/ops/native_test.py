"""The compiled kernel against NumPy: exact in integers, and what follows each product."""

import os
import platform
import shutil
import subprocess
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import kernel_fuzz
import numpy as np
import problems
import pytest

from sa_plus_plus.sparse import BlockSparse
from sa_plus_plus.sparse.ops import native

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


@pytest.mark.parametrize("columns", [1, 5, 6, 11, 24, 37])  # of which some, none and all fill vectors
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.uint8])
def test_rounding_of_three_colours_to_four_channels(dtype, columns):
    x = np.random.default_rng(columns).normal(0, 60, (2, 3, columns, 3)).astype(np.float32)
    border = ((0, 1), (2, 1))
    got = native.round_images(x, dtype, factor=0.5, zero=100, border=border, channels=4)
    coded = np.clip(np.rint(x / 0.5) + 100, 0, 255) if dtype == np.uint8 else x.astype(dtype).astype(np.float32)
    zero = 100 if dtype == np.uint8 else 0
    want = np.pad(coded, ((0, 0), *border, (0, 1)), constant_values=zero)
    np.testing.assert_array_equal(np.asarray(got, np.float32), want)


@hypothesis.given(st.data())
def test_lookups(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    *rows, columns, count = data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=4))
    dtype = data.draw(st.sampled_from([np.float32, jnp.bfloat16, np.uint8]))
    x, places = rng.integers(0, 256, (*rows, columns)).astype(dtype), rng.integers(0, columns, count, np.int32)
    got = native.look_up(jnp.asarray(x), jnp.asarray(places))
    np.testing.assert_array_equal(np.asarray(got, np.float32), x[..., places].astype(np.float32))


@pytest.mark.parametrize("place", [-1, 4, 2**31 - 1, -(2**31)])
def test_a_place_that_is_no_column_is_refused(place):
    with pytest.raises((ValueError, RuntimeError), match="a place is not a column of x"):
        native.look_up(jnp.ones((2, 4)), jnp.array([0, place], jnp.int32)).block_until_ready()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.uint8])
def test_a_result_that_is_border_alone_is_written(dtype):
    """Where there are no rows or no columns to compute, all of it is padding."""
    w = BlockSparse.fromdense(np.ones((3, 3, 4, 16), np.int8), (4, 16))
    blocks = native.interleave_rows(np.asarray(w.blocks))
    epilogue = native.Epilogue(dtype=dtype, zero=7, border=((2, 1), (0, 3)))
    for height, width in ((2, 5), (5, 2), (0, 9), (1, 0)):
        got = native.conv(np.ones((2, height, width, 4), np.uint8), blocks, w.layout, epilogue=epilogue)
        assert got.shape == (2, max(height - 2, 0) + 3, max(width - 2, 0) + 3, 16)
        np.testing.assert_array_equal(np.asarray(got, np.float32), 7 if dtype == np.uint8 else 0)


WINDOWS = {"window_rows": 1, "window_columns": 1, "stride_down": 1, "stride_across": 1, "top": 0, "left": 0}
LAST = 2**63 - 1
FORGED = [
    (native.CONV, {"stride_down": 2**62 + 1}),
    (native.CONV, {"stride_across": LAST}),
    (native.CONV, {"window_rows": LAST, "window_columns": LAST}),
    (native.CONV, {"top": 2**62, "bottom": 2**62}),
    (native.CONV, {"top": -(2**63), "bottom": LAST}),
    (native.CONV, {"left": LAST, "right": LAST}),
    (native.ROUND, {"top": LAST}),
    (native.ROUND, {"left": LAST - 1}),
    (native.ROUND, {"top": -1, "left": -(2**63)}),
    (native.MAX_POOL, {"window_rows": LAST, "top": 2**62}),
    (native.MAX_POOL, {"left": LAST}),
    (native.MAX_POOL, {"top": -(2**63)}),
    (native.MAX_POOL, {"left": -(2**40)}),
    (native.MAX_POOL, {"stride_across": 2**61}),
    (native.SUM_POOL, {"stride_down": 2**62 - 1, "window_rows": 2**62}),
    (native.ATTENTION, {"strides": {3: 2**61}}),  # q's from query to query
    (native.ATTENTION, {"strides": {2: LAST, 3: LAST}}),
    (native.ATTENTION, {"sizes": {4: 2**59}, "strides": {7: 0, 11: 0}}),  # as many keys as no memory holds
    (native.ATTENTION, {"sizes": {5: 2**60}}),
    (native.ATTENTION, {"sizes": {2: 2**32, 3: 2**32}}),
    (native.ATTENTION, {"sizes": {7: LAST}}),  # how many keys the first query sees
    (native.ATTENTION, {"strides": {19: 0}}),  # all queries' results in one place, the rest not written
    (native.ATTENTION, {"strides": {18: 4, 19: 4}}),
    (native.ATTENTION, {"sizes": {3: 4}}),  # half of the result is not written
]


@pytest.mark.parametrize(("target", "forged"), FORGED)
def test_attributes_beyond_all_memory_are_refused(target, forged):
    """As a forged file could have them. In the middle of a sum or a product they must not overflow."""
    none, x = np.zeros(0, np.float32), np.ones((1, 4, 4, 8), np.float32)
    if target == native.CONV:
        arrays = [x, np.ones((1, 8, 8), np.float32), np.zeros(1, np.int32), np.array([0, 1], np.int32), *[none] * 3]
        floats = dict.fromkeys(("residual_scale", "residual_zero", "y_zero", "y_unit"), np.float32(0))
        integers = WINDOWS | {"bottom": 0, "right": 0, "activation": 0} | forged
        shape = x.shape
    elif target == native.ATTENTION:
        x = np.ones((2, 8, 4), np.float32)
        sizes, strides = [1, 1, 2, 8, 8, 4, 4, 8], [0, 0, 32, 4] * 3 + [0] * 4 + [0, 0, 32, 4]
        for name, numbers in (("sizes", sizes), ("strides", strides)):
            for at, number in forged.get(name, {}).items():
                numbers[at] = number
        arrays, integers, shape = [x, x, x, none], {"sizes": sizes, "strides": strides}, x.shape
        floats = {"scale": np.float32(1)}
    elif target == native.ROUND:
        arrays, integers, shape = [x], {"top": 1, "left": 1} | forged, (1, 6, 6, 8)
        floats = {"scale": np.float32(1), "zero": np.float32(0)}
    else:
        arrays, integers, floats, shape = [x], WINDOWS | forged, {}, x.shape
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.float32))
    with pytest.raises((ValueError, RuntimeError), match="INVALID_ARGUMENT"):
        jax.block_until_ready(call(*arrays, **{name: np.int64(n) for name, n in integers.items()}, **floats))


@pytest.mark.parametrize("zero", [np.nan, np.inf, -1.0, 256.0])
def test_a_code_for_zero_that_is_no_byte_is_refused(zero):
    with pytest.raises((ValueError, RuntimeError), match="the zero point is not a byte"):
        native.round_images(jnp.ones((1, 2, 2, 8)), np.uint8, 1.0, zero).block_until_ready()


@pytest.mark.parametrize(("single", "half", "pays"), [(2.0, 1.0, True), (1.0, 2.0, False)])
def test_bfloat16_pays_where_it_is_faster(monkeypatch, single, half, pays):
    def nanoseconds(code):
        return (single, half)[code]

    monkeypatch.setattr(native, "_library", lambda: types.SimpleNamespace(sa_plus_plus_nanoseconds=nanoseconds))
    assert native.bf16_is_faster.__wrapped__() is pays


X_DTYPES = np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.uint8)


def test_the_best_target_that_knows_the_type_is_chosen():
    for dtype in X_DTYPES:
        assert native.target(dtype) == next(t for t in native.targets() if t.supported and dtype in t.dtypes)
    *_, last = native.targets()
    assert (last.name, last.supported, last.dtypes) == ("baseline", True, X_DTYPES)
    names = [target.name for target in native.targets()]
    for i, target in enumerate(native.targets()[:-1]):
        assert target.extends in names[i + 1 :]
    with jax.enable_x64(True), pytest.raises(ValueError, match="float64"):
        native.target(np.float64)


@pytest.mark.parametrize("name", kernel_fuzz.target_flags(platform.machine()))
@pytest.mark.parametrize(("dtype", "narrow"), [*((t, False) for t in X_DTYPES), (np.uint8, True)])
def test_products_in_each_target(name, dtype, narrow):
    """Of integers, which are exact in each; weights of 7 bits with the largest bytes, whose sums just fit 16 bits."""
    (target,) = (target for target in native.targets() if target.name == name)
    if not target.supported:
        pytest.skip("not supported by this processor")
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 255, (1, 1, 37, 64)), rng.integers(-7, 8, (64, 48))
    w *= np.kron(rng.integers(0, 2, (4, 3)), np.ones((16, 16), int))
    if dtype != np.uint8:
        x -= 127
    if narrow:
        x[..., :16], w = 255, np.sign(w) * native.NARROW
    sparse = BlockSparse.fromdense(w.astype(np.int8 if dtype == np.uint8 else dtype), (16, 16))
    blocks = np.asarray(sparse.blocks)
    blocks = blocks if dtype == np.float32 else native.interleave_rows(blocks)
    try:
        native.limit_targets(target.name)
        assert native.target(dtype).name in _chain(target)
        got = native.conv(jnp.asarray(x.astype(dtype)), blocks, sparse.layout, narrow=narrow)
    finally:
        native.limit_targets(None)
    np.testing.assert_array_equal(got, x @ w)


def _chain(target):
    by_name = {row.name: row for row in native.targets()}
    return [target.name, *(_chain(by_name[target.extends]) if target.extends in by_name else [])]


def test_a_limit_that_is_no_target_is_refused():
    with pytest.raises(ValueError, match=r"no target 'avx3' here: this processor supports .*baseline"):
        native.limit_targets("avx3")


def test_threads_share_jobs_without_races(tmp_path):
    """Random jobs under the thread sanitizer, also from several threads at once and after a fork."""
    compiler, program = shutil.which("g++") or shutil.which("clang++"), tmp_path / "fuzz"
    flags = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread", "-fsanitize=thread"]
    (tmp_path / "probe.cc").write_text("int main() {}")
    probe = [compiler, *flags, tmp_path / "probe.cc", "-o", tmp_path / "probe"]
    if compiler is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no C++ compiler with a thread sanitizer")
    if subprocess.run([tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip("the thread sanitizer does not run on this kernel")
    sources = [kernel_fuzz.ROOT / "tests/fuzz/threads_fuzz.cc", kernel_fuzz.SOURCE / "thread_pool.cc"]
    subprocess.run([compiler, *flags, f"-I{kernel_fuzz.SOURCE}", *sources, "-o", program], check=True)
    environment = os.environ | {"TSAN_OPTIONS": "die_after_fork=0"}
    run = subprocess.run([program, "5000"], capture_output=True, text=True, timeout=120, env=environment)
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stdout + run.stderr
