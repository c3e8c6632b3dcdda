"""Depthwise convolutions of networks: recognised, joined with their neighbours, or left as traced for a reason."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax import lax

import sa_plus_plus as sapp
from experiments.models import MobileNetV2
from sa_plus_plus.sparse.ops import native

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
NHWC = ("NHWC", "HWIO", "NHWC")


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape) / 2, dtype)


def compared(fn, x, tolerance=1e-5, **options):
    """The network with every layer in the compiled kernel, whose results are the function's."""
    want, fast = jax.jit(fn)(x), sapp.specialize(fn, x, mode="always", **options)
    error = float(jnp.abs(fast(x) - want).max() / jnp.abs(want).max())
    assert error < tolerance
    return fast


def depthwise(x, kernel, strides=(1, 1), padding="SAME", numbers=NHWC, groups=None, **options):
    options = {"dimension_numbers": numbers, "feature_group_count": groups or x.shape[numbers[0].index("C")]} | options
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def pointwise(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


FIRST, WINDOW, LAST = normal(1, 1, 8, 24), normal(3, 3, 1, 24), normal(1, 1, 24, 8)


def block(x):
    """An inverted residual with a batch normalisation's scale and shift."""
    y = jax.nn.relu6(pointwise(x, FIRST) + 1)
    y = jax.nn.relu6(depthwise(y, WINDOW) * normal(1, 1, 1, 24) + 0.5)
    return x + pointwise(y, LAST)


def test_an_inverted_residual_is_three_layers_without_copies():
    fast = compared(block, normal(2, 9, 13, 8))
    assert fast.steps == ("convolution 1×1, relu6", "depthwise convolution 3×3, relu6", "convolution 1×1, residual")
    text = jax.jit(fast.fn).lower(fast.weights, normal(2, 9, 13, 8)).as_text()
    assert not any(f"stablehlo.{name}" in text for name in ("pad", "transpose", "convolution", "clamp", "slice"))
    assert [choice.runs for choice in fast.choices] == ["dense"] * 3


def test_autotuning_keeps_the_faster_one():
    fast = sapp.specialize(block, normal(2, 9, 13, 8))
    choice = fast.choices[1]
    assert choice.runs == ("dense" if choice.compiled_seconds < choice.traced_seconds else "traced")


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 9, 12, 6), (5, 3, 1, 12), {"strides": (2, 3)}),  # two outputs for each channel
        ((2, 9, 12, 6), (3, 3, 1, 6), {"rhs_dilation": (2, 3), "padding": [(4, 1), (0, 2)]}),
        ((2, 21, 6), (4, 1, 6), {"strides": (2,), "numbers": ("NWC", "WIO", "NWC")}),
        ((2, 6, 9, 12), (12, 1, 3, 3), {"numbers": ("NCHW", "OIHW", "NCHW")}),
        ((6, 9, 12), (3, 3, 1, 6), {"batched": True}),
    ],
)
def test_any_window_and_order_of_axes(shape, kernel, options):
    options, weights = dict(options), normal(*kernel)
    if options.pop("batched", False):  # an image at a time under vmap
        shape = (3, 9, 12, 6)
        fn = jax.vmap(lambda x: jax.nn.silu(depthwise(x[None], weights, **options)[0]))
    else:
        fn = lambda x: jax.nn.silu(depthwise(x, weights, **options))  # noqa: E731
    fast = compared(fn, normal(*shape))
    (choice,) = fast.choices
    assert (choice.runs, choice.note) == ("dense", "")
    assert "depthwise" in choice.layer
    assert not {"conv_general_dilated", "logistic", "mul"} & {*fast.steps}


def test_padding_with_zeros_before_a_convolution_becomes_its_own():
    """As Keras pads before strides."""

    def fn(x, value=0.0):
        x = jnp.pad(x, ((0, 0), (0, 1), (1, 2), (0, 0)), constant_values=value)
        return depthwise(x, WINDOW, (2, 2), "VALID")

    assert compared(fn, normal(2, 9, 12, 24)).steps == ("depthwise convolution 3×3, strides 2×2",)
    with_ones = compared(lambda x: fn(x, 1.0), normal(2, 9, 12, 24))
    assert with_ones.steps == ("pad", "depthwise convolution 3×3, strides 2×2")
    dense = compared(
        lambda x: pointwise(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), normal(3, 3, 8, 16)), normal(1, 6, 6, 8)
    )
    assert dense.steps == ("convolution 3×3",)
    channels = compared(lambda x: depthwise(jnp.pad(x, ((0, 0),) * 3 + ((0, 8),)), WINDOW), normal(2, 9, 12, 16))
    assert channels.steps[0] == "pad"


def test_what_stays_as_traced_says_why():
    x = normal(1, 7, 7, 24)
    transposed = compared(lambda x: depthwise(x, WINDOW, padding=((2, 2), (2, 2)), lhs_dilation=(2, 2)), x)
    negative = compared(lambda x: depthwise(x, WINDOW, padding=((-1, 2), (0, 0))), x)
    narrow = compared(lambda x: depthwise(x, WINDOW.astype(jnp.bfloat16)), x.astype(jnp.bfloat16), 1e-2)
    other = compared(lambda x: depthwise(x, WINDOW), x, implementation="xla")
    for fast in (transposed, negative, narrow, other):
        (choice,) = fast.choices
        assert choice.runs == "traced"
        assert choice.note.startswith("a depthwise convolution that the compiled kernel has not")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(3, 8, 8), (2, 5, 12), (4, 4, 2)])
def test_groups_are_blocks(groups, inputs, outputs, precision):
    x, kernel = normal(2, 9, 8, groups * inputs), normal(3, 3, inputs, groups * outputs)
    first = normal(1, 1, groups * inputs, groups * inputs)

    def fn(x):
        y = jax.nn.relu(pointwise(x, first))
        return pointwise(jax.nn.relu(depthwise(y, kernel, groups=groups)), normal(1, 1, groups * outputs, 8))

    fast = compared(fn, x, {"float32": 1e-5}.get(precision, 0.1), precision=precision, calibration=[x])
    assert [choice.runs for choice in fast.choices] == ["dense"] * 3
    assert fast.choices[1].precision == precision


def test_pruned_groups_are_multiplied_by_their_blocks():
    mask = np.kron(np.random.default_rng(0).random((6, 12)) < 0.4, np.ones((4, 4)))
    kernel = normal(3, 1, 8, 48) * mask.reshape(3, 1, 8, 48)
    fast = compared(lambda x: depthwise(x, kernel, groups=3), normal(2, 9, 8, 24))
    (choice,) = fast.choices
    assert (choice.runs, choice.block) == ("sparse", (4, 4))
    other = compared(lambda x: depthwise(x, kernel, groups=3), normal(2, 9, 8, 24), implementation="xla")
    assert other.choices[0].note == "a convolution with groups, for which there is only the compiled kernel"


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_it_stays_in_float32_between_layers_of_low_precision(precision):
    x = normal(2, 9, 13, 8)
    fast = compared(lambda x: block(block(x)), x, 0.1, precision=precision, calibration=[x])
    kinds = {choice.precision for choice in fast.choices if "depthwise" in choice.layer}
    assert kinds == {"float32"}
    assert {choice.precision for choice in fast.choices[2:4]} == {precision}


def test_a_served_network_has_it(tmp_path):
    x = normal(2, 9, 13, 8)
    fast = compared(block, x)
    fast.save(tmp_path / "network")
    served = sapp.serve.load(tmp_path / "network")
    np.testing.assert_array_equal(served(x), fast(x))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("options", [{}, {"same": True, "epsilon": 1e-3}], ids=["mobilenet", "efficientnet-lite"])
def test_all_of_mobilenet_runs_compiled(options):
    model, x = MobileNetV2(5, stages=((1, 8, 1, 1), (2, 16, 2, 2, 5)), **options), normal(1, 32, 32, 3)
    variables = problems.variables(model, x)
    fast = compared(lambda x: model.apply(variables, x), x)
    assert {choice.runs for choice in fast.choices} == {"dense"}
    assert {*fast.steps} - {*(step for step in fast.steps if "conv" in step)} == {"sum_pool", "div", "dense"}


@pytest.mark.usefixtures("standard_promotion")
def test_a_block_of_convnext():
    """A residual beside a 7 x 7 window: the images are read twice, and padded nowhere."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(16, (7, 7), feature_group_count=16)(x)
            y = nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(y))))
            return x + y * self.param("scale", nn.initializers.ones, (16,))

    x = normal(1, 14, 14, 16)
    variables = problems.variables(Block(), x)
    fast = compared(lambda x: Block().apply(variables, x), x)
    layers = [step for step in fast.steps if step.startswith(("dense", "depthwise"))]
    assert layers == ["depthwise convolution 7×7", "dense, gelu_tanh", "dense, residual"]
    assert "pad" not in fast.steps
