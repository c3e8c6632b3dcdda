"""Whole networks in bfloat16 and int8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import sa_plus_plus as sapp
from experiments import models
from sa_plus_plus.sparse import BlockSparse, native
from sa_plus_plus.sparse.compiler import executor
from sa_plus_plus.sparse.compiler.quantization import overflows

pytestmark = [
    pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason())),
    pytest.mark.usefixtures("standard_promotion"),
]
RNG = np.random.default_rng(0)
PHOTOGRAPHS = RNG.normal(size=(2, 24, 24, 3)).astype(np.float32)


def kernel(*shape, block=8, density=0.4):
    rng = np.random.default_rng(shape)  # whatever the tests before have drawn
    keep = rng.random(sapp.blocks.grid_shape(shape, (block, block))) < density
    keep[0] = True
    mask = np.kron(keep, np.ones((block, block)))
    rows, columns = sapp.blocks.matrix_shape(shape)
    return jnp.asarray(mask[:rows, :columns].reshape(shape) * rng.normal(size=shape) / np.sqrt(rows), jnp.float32)


@pytest.fixture(scope="module")
def residual():
    """A residual network with values as after training."""
    model = models.ResNet(10, stages=(1, 1), bottleneck=True)
    variables = problems.variables(model, PHOTOGRAPHS)
    return lambda x: model.apply(variables, x)


@pytest.mark.parametrize(
    ("precision", "most", "pays"), [("bfloat16", 0.02, False), ("int8", 0.05, False), ("int8", 0.05, True)]
)
def test_a_residual_network(residual, monkeypatch, precision, most, pays):
    monkeypatch.setattr(native, "bf16_is_faster", lambda: pays)
    want = np.asarray(jax.jit(residual)(PHOTOGRAPHS))
    fast = sapp.specialize(residual, PHOTOGRAPHS, mode="always", precision=precision, calibration=[PHOTOGRAPHS])
    got = fast(PHOTOGRAPHS)
    assert got.dtype == want.dtype
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0 < error < most
    np.testing.assert_allclose(fast.choices[-1].error, error, rtol=1e-3)  # what the table says of the last layer
    inner = [choice.precision for choice in fast.choices[1:-1]]
    assert inner == [precision] * len(inner)
    outer = "bfloat16" if precision == "bfloat16" or pays else "float32"
    assert {fast.choices[0].precision, fast.choices[-1].precision} == {outer}
    assert precision in str(fast)
    # Values stay narrow between the layers: nothing is converted but the input and the result.
    program = jax.jit(fast.fn).lower(fast.weights, PHOTOGRAPHS).as_text()
    assert program.count("sa_plus_plus_round_images") <= 2  # the input, and what the last layer takes
    assert "stablehlo.convert" not in program


def test_signed_activations_and_wide_outputs():
    """int8 inputs below zero, kernels narrower than their blocks, shapes that are not a multiple of any register."""
    first, second, third = kernel(20, 36), kernel(36, 21), kernel(21, 9)
    bias = jnp.asarray(RNG.normal(size=36), jnp.float32)

    def network(x):
        return jnp.tanh((x @ first + bias) @ second) @ third

    x = RNG.normal(size=(5, 20)).astype(np.float32)
    fast = sapp.specialize(network, x, mode="always", precision="int8", calibration=[x, 2 * x])
    want = network(jnp.asarray(x))
    assert [choice.precision for choice in fast.choices][1] == "int8"
    assert np.linalg.norm(fast(x) - want) < 0.03 * np.linalg.norm(want)


def test_weights_have_7_bits_where_products_are_summed_in_16():
    first, second, third = kernel(20, 36), kernel(36, 24), kernel(24, 9)

    def network(x):
        return jnp.tanh(jnp.tanh(x @ first) @ second) @ third

    x = RNG.normal(size=(5, 20)).astype(np.float32)
    exact = native.target(np.uint8)
    limited = next(t for t in native.targets() if t.supported and t.limit == native.NARROW)
    wanted = {limited.name: (native.NARROW, native.NARROW_CONV), exact.name: (exact.limit, native.CONV)}
    for name, (limit, call) in wanted.items():
        native.limit_targets(name)
        try:
            assert native.target(np.uint8).limit == limit
            fast = sapp.specialize(network, x, mode="always", precision="int8", calibration=[x])
        finally:
            native.limit_targets(None)
        (blocks,) = (a for a in jax.tree.leaves(fast.weights) if a.dtype == np.int8)
        assert int(np.abs(np.asarray(blocks, np.int32)).max()) == limit
        single = jax.make_jaxpr(functools.partial(executor._run_once, fast._program))(fast.weights, (x,))
        assert f"target_name={call}\n" in str(single)
        want = network(jnp.asarray(x))
        assert np.linalg.norm(fast(x) - want) < 0.03 * np.linalg.norm(want)


def test_other_batches_set_the_scale():
    """Values beyond those of the calibration data are clamped to them."""
    w = jnp.eye(16)

    def network(x):
        y = jax.nn.relu(x @ w)
        return jax.nn.relu(y @ w) @ w

    x = np.full((1, 16), 2.0, np.float32)
    fast = sapp.specialize(network, x, mode="always", precision="int8", calibration=[x, np.ones((1, 16), np.float32)])
    np.testing.assert_allclose(fast(x), 2, rtol=0.01)
    np.testing.assert_allclose(fast(3 * x), 2, rtol=0.01)


def test_images_of_one_axis():
    w, then = kernel(3, 8, 24), kernel(24, 8)

    def network(x):
        y = jax.lax.conv_general_dilated(x, w, (2,), ((1, 1),), dimension_numbers=("NWC", "WIO", "NWC"))
        return jax.nn.relu(y) @ then

    x = RNG.normal(size=(2, 11, 8)).astype(np.float32)
    for precision, most in ((None, 1e-5), ("bfloat16", 0.02), ("int8", 0.02)):
        fast = sapp.specialize(network, x, mode="always", precision=precision, calibration=[x])
        want = network(x)
        assert np.linalg.norm(fast(x) - want) < most * np.linalg.norm(want)
        assert all(choice.runs != "traced" for choice in fast.choices)


MOST = 66308  # rows of weights of 127 that meet bytes of 255, in groups of four: four more are beyond 2**31


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_of_int8_are_exact(sign):
    w = BlockSparse.fromdense(np.full((MOST, 16), 127 * sign, np.int8), (4, 16))
    blocks = native.interleave_rows(np.asarray(w.blocks))
    got = native.conv(np.full((1, 1, 1, MOST), 255, np.uint8), blocks, w.layout)
    np.testing.assert_array_equal(got, np.float32(255 * 127 * sign * MOST))
    assert not overflows(np.asarray(w.todense()))
    assert overflows(np.full((MOST + 4, 16), 127 * sign, np.int8))
    both = np.full((MOST, 2, 16), 127 * sign, np.int8)
    both[:, 0] *= -1  # of two signs: each sum is within the same limits
    assert not overflows(both)


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("window", [1, 3])
def test_layers_whose_sums_could_overflow_are_not_int8(monkeypatch, window, pays):
    """A layer of more than 66,311 rows of weights of 127, or twice as many of 64, as a product and as a convolution."""
    monkeypatch.setattr(native, "bf16_is_faster", lambda: pays)
    most = (2**31 - 1) // (255 * native.target(np.uint8).limit)  # twice as many where weights have 7 bits
    channels = -(-(most + 4) // window**2)
    wide = np.full((window, window, channels, 16), 0.5, np.float32)

    def convolved(x, kernel):
        if window == 1:
            return x @ kernel[0, 0]
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def network(x):
        y = jax.nn.relu(x @ np.ones((1, channels), np.float32))
        return jax.nn.relu(convolved(y, wide)) @ np.eye(16, dtype=np.float32)

    x = np.full((1, window, window, 1), 2, np.float32)
    fast = sapp.specialize(network, x, mode="always", precision="int8", calibration=[x])
    np.testing.assert_allclose(fast(x), wide[..., 0].size, rtol=0.01)
    assert fast.choices[1].precision == ("bfloat16" if pays else "float32")
    assert "in int8 its sums could be beyond 32 bits" in str(fast)


def images(x, kernel, *padding):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


K = np.random.default_rng(1).normal(size=(5, 5, 8, 8)).astype(np.float32)
EMPTY = {  # by name: a network, and its input
    "no rows": (
        lambda x: images(jax.nn.relu(images(x, K, (0, 0), (2, 2))), K, (4, 1), (2, 2)) + 1,
        np.ones((2, 4, 5, 8), np.float32),
    ),
    "fewer than no columns": (
        lambda x: images(jax.nn.relu(images(x, K, (2, 2), (0, 0))), K, (2, 2), (1, 4)) + 1,
        np.ones((2, 5, 2, 8), np.float32),
    ),
    "no examples": (
        lambda x: images(jax.nn.relu(images(x, K, (2, 2), (2, 2))), K, (2, 2), (2, 2)),
        np.ones((0, 5, 5, 8)),
    ),
    "no channels": (
        lambda x: images(images(x, K[:, :, :0], (2, 2), (2, 2)) + 1, K, (2, 2), (2, 2)),
        np.ones((2, 5, 5, 0)),
    ),
    "no features": (lambda x: jnp.pad(x @ K[0, 0, :, :0], ((0, 0), (0, 8))) @ K[0, 0], np.ones((3, 8))),
    "an inner axis of length 0": (
        lambda x: ((x @ K[0, 0]) @ K[0, 0, :, :0] @ K[0, 0, :0] + 1) @ K[0, 1],
        np.ones((3, 8)),
    ),
    "no layer": (lambda x: images(x, K[..., :0], (2, 2), (2, 2)), np.ones((2, 5, 5, 8))),
    "no weights but 0": (lambda x: jax.nn.relu(x @ (0 * K[0, 0]) + 1) @ (0 * K[0, 0]) + 2, np.ones((3, 8))),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", EMPTY)
def test_empty_values(name, precision):
    """Nothing comes from memory that was not written."""
    network, x = EMPTY[name]
    x = x.astype(np.float32)
    fast = sapp.specialize(network, x, mode="always", precision=precision, calibration=[x])
    want = network(jnp.asarray(x))
    np.testing.assert_allclose(fast(x), want, atol=0.02 * np.abs(want).max(initial=1e-30), strict=True)


def test_bad_requests(monkeypatch):
    w = kernel(16, 16)
    x = np.ones((2, 16), np.float32)

    def request(**options):
        sapp.specialize(lambda x: x @ w, x, **options)

    for error, message, options in [
        (ValueError, "precision must be one of float32, bfloat16, int8 or None, got 'int4'", {"precision": "int4"}),
        (ValueError, "int8 needs calibration data to choose the scale", {"precision": "int8"}),
        (ValueError, "calibration has no batches", {"precision": "int8", "calibration": []}),
        (ValueError, r"calibration batch 1 is float32\[3, 16\]", {"calibration": [x, np.ones((3, 16), np.float32)]}),
        (ValueError, "batch 0 has values that are not finite", {"calibration": [x * np.nan]}),
        (RuntimeError, "needs the compiled kernel", {"precision": "bfloat16", "implementation": "xla"}),
    ]:
        with pytest.raises(error, match=message):
            request(**options)
    with pytest.raises(ValueError, match="not finite, at dense"):
        sapp.specialize(lambda x: (x / 0) @ w, x, precision="int8", calibration=[x])
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found")
    with pytest.raises(RuntimeError, match="no compiler was found"):
        request(precision="bfloat16")
