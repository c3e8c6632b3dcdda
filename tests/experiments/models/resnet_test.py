"""ResNets against a NumPy implementation with the same weights; their published sizes and costs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sa_plus_plus as sapp
from experiments import models
from experiments.models import convolution, costs
from experiments.training import sharding

pytestmark = pytest.mark.usefixtures("standard_promotion")


def conv(x, kernel, stride):
    """Convolution in float64, padded by half the kernel: windows of the padded image times the kernel."""
    k = kernel.shape[0]
    x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel, optimize=True)


class Reference:
    """The network of He et al. (2015), with strides in the 3 x 3 convolutions, in NumPy."""

    def __init__(self, variables, stages, bottleneck, small_images, training):
        self.params, self.stats = variables["params"], variables["batch_stats"]
        self.stages, self.bottleneck, self.small_images, self.training = stages, bottleneck, small_images, training

    def norm(self, x, params, stats):
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if self.training else (stats["mean"], stats["var"])
        return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]

    def layer(self, x, name, scope, stride=1):
        params, stats = (self.params, self.stats) if scope is None else (self.params[scope], self.stats[scope])
        y = conv(x, params[f"conv{name}"]["kernel"], stride)
        return self.norm(y, params[f"norm{name}"], stats[f"norm{name}"])

    def block(self, x, scope, stride):
        if self.bottleneck:
            y = np.maximum(self.layer(x, 1, scope), 0)
            y = np.maximum(self.layer(y, 2, scope, stride), 0)
            y = self.layer(y, 3, scope)
        else:
            y = np.maximum(self.layer(x, 1, scope, stride), 0)
            y = self.layer(y, 2, scope)
        if "conv_shortcut" in self.params[scope]:
            x = self.layer(x, "_shortcut", scope, stride)
        return np.maximum(x + y, 0)

    def __call__(self, x):
        x = np.maximum(self.layer(x, "_stem", None, 1 if self.small_images else 2), 0)
        if not self.small_images:
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
            x = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-1, -2))
        for i, blocks in enumerate(self.stages, 1):
            for j in range(1, blocks + 1):
                x = self.block(x, f"stage{i}_block{j}", 2 if i > 1 and j == 1 else 1)
        head = self.params["head"]
        return x.mean((1, 2)) @ head["kernel"] + head["bias"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("make", "stages", "bottleneck", "small_images", "size"),
    [
        (models.ResNet50, (3, 4, 6, 3), True, False, 75),
        (models.ResNet18, (2, 2, 2, 2), False, False, 64),
        (models.ResNet20, (3, 3, 3), False, True, 32),
    ],
)
def test_forward_pass(make, stages, bottleneck, small_images, size, training):
    model, x = make(classes=10), np.random.default_rng(1).normal(size=(3, size, size, 3)).astype(np.float32)
    variables = problems.variables(model, x)
    apply = jax.jit(lambda v, x: model.apply(v, x, training=training, mutable=["batch_stats"]))
    logits, changed = apply(variables, x)
    doubles = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    want = Reference(doubles, stages, bottleneck, small_images, training)(x.astype(np.float64))
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), changed["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved)) == training


def test_bfloat16_computes_in_bfloat16_on_float32_parameters():
    x = jnp.ones((2, 32, 32, 3))
    model = models.ResNet20(classes=10, dtype="bfloat16")
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, state = jax.jit(functools.partial(model.apply, capture_intermediates=True))(variables, x)
    assert state["intermediates"]["stage2_block1"]["__call__"][0].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    exact = jax.jit(models.ResNet20(classes=10).apply)(variables, x)
    np.testing.assert_allclose(logits, exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("make", "size", "classes", "parameters", "billions"),
    [
        (models.ResNet50, 224, 1000, 25_557_032, 4.089),
        (models.ResNet18, 224, 1000, 11_689_512, 1.814),
        (models.ResNet34, 224, 1000, 21_797_672, 3.664),
        (models.ResNet20, 32, 10, 272_474, 0.041),
    ],
)
def test_published_sizes_and_costs(make, size, classes, parameters, billions):
    model, x = make(classes=classes), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])) == parameters
    cost = costs.multiply_adds(model, variables, x)
    kernels = [layer.path for layer in sapp.plan(variables["params"], block=1, sparsity=0.5).leaves if layer.is_kernel]
    assert set(cost) == set(kernels)
    assert sum(cost.values()) / 1e9 == pytest.approx(billions, abs=1e-3)


def test_kernels_of_resnet50():
    variables = jax.eval_shape(
        models.ResNet50(classes=1000).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    )
    plan = sapp.plan(variables["params"], block=8, sparsity=0.9)
    assert sum(layer.is_kernel for layer in plan.leaves) == 54
    assert plan.kernel_weights == 25_502_912


def test_statistics_are_those_of_the_global_batch():
    """As though each half were not normalised by itself: the halves have different means."""
    model = models.ResNet20(classes=10)
    x = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    x[:8] += 3
    variables = problems.variables(model, x)

    @jax.jit
    def run(variables, x):
        return model.apply(variables, x, training=True, mutable=["batch_stats"])

    whole = run(variables, jax.device_put(x, jax.devices()[0]))
    mesh = sharding.make_mesh()
    placed = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    split = run(placed, sharding.place(x, sharding.of_batch(mesh)))
    assert len(split[0].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), whole, split)


@pytest.mark.parametrize(("size", "k", "stride"), [(2, 3, 1), (4, 3, 2), (3, 3, 2), (1, 3, 1), (7, 1, 2), (4, 1, 1)])
def test_convolution_by_a_product_is_a_convolution(size, k, stride):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, size, size, 5)), rng.normal(size=(k, k, 5, 6))
    pads = [(k // 2, k // 2)] * 2
    got = convolution.convolution(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), (stride, stride), pads)
    np.testing.assert_allclose(got, conv(x, w, stride), atol=1e-4)
