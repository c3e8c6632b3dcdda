"""How leaves without a given view are read, by names and biases; held to what layers of each framework compute."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sa_plus_plus as sapp
from sa_plus_plus import blocks, views
from sa_plus_plus.views import View


def read(shapes, attributes=False, alone=True):
    """`{path: (view, assumed)}` of the kernels among leaves; see `planned`."""
    found = [layer for layer in planned(shapes, attributes, alone) if layer.is_kernel]
    return {layer.path: (layer.view or views.default(len(layer.shape)), layer.assumed) for layer in found}


def planned(shapes, attributes=False, alone=False):
    """The plan's layers.

    Leaves are entries of a dict, or attributes of a module as Equinox has them. If they are not alone, there is another
    kernel, since a plan without any is refused.
    """
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    if not alone:
        leaves["other"] = jax.ShapeDtypeStruct((40, 40), jnp.float32)
    plan = sapp.plan(Attributes(leaves) if attributes else leaves, block=1, sparsity=0.5, min_blocks=1)
    return [layer for layer in plan.leaves if layer.path != "other"]


@jax.tree_util.register_pytree_with_keys_class
class Attributes(dict):
    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(path), leaf) for path, leaf in self.items()], tuple(self)

    @classmethod
    def tree_unflatten(cls, keys, leaves):
        return cls(zip(keys, leaves, strict=True))


def one(rows, cols, batch=()):
    return View(batch, rows, cols)


@pytest.mark.parametrize(
    ("shapes", "want"),
    [
        # Keras, and flax without a bias.
        ({"a/query/kernel": (24, 4, 6), "a/query/bias": (4, 6)}, {"a/query/kernel": (one((0,), (1, 2)), False)}),
        ({"a/attention_output/kernel": (4, 6, 24)}, {"a/attention_output/kernel": (one((0, 1), (2,)), False)}),
        ({"norm/gamma": (5, 24), "norm/beta": (5, 24)}, {}),  # over two axes
        # Stacked twice, as ensembles of stacked layers are: by the bias, and by the scale beside.
        ({"l/kernel": (2, 3, 24, 36), "l/bias": (2, 3, 36)}, {"l/kernel": (one((2,), (3,), (0, 1)), False)}),
        (
            {"l/norm/scale": (2, 3, 24), "l/query/kernel": (2, 3, 24, 4, 9)},
            {"l/query/kernel": (one((2,), (3, 4), (0, 1)), False)},
        ),
        # Haiku's stacks: a bias, an offset and a vector of the user's for each layer.
        (
            {"l/w": (3, 24, 36), "l/b": (3, 36), "l/norm/offset": (3, 24), "l/gate": (3, 24)},
            {"l/w": (one((1,), (2,), (0,)), False)},
        ),
        # The whole tree is a stack.
        ({"w": (3, 24, 36), "scale": (3, 24)}, {"w": (one((1,), (2,), (0,)), False)}),
        # No stack, though all leaves begin with the same axis: a column of biases, one for each output.
        ({"l/w": (24, 36), "l/b": (24, 1)}, {"l/w": (one((1,), (0,)), False), "l/b": (one((0,), (1,)), False)}),
        # Transposed convolutions of Keras and Haiku have their outputs first; of one as wide as deep it cannot be told.
        ({"c/kernel": (3, 3, 8, 16), "c/bias": (8,)}, {"c/kernel": (one((0, 1, 3), (2,)), False)}),
        ({"transpose/w": (3, 3, 8, 8), "transpose/b": (8,)}, {"transpose/w": (one((0, 1, 3), (2,)), True)}),
        # A bias that fits in two ways, and one that fits in none.
        ({"l/kernel": (4, 4, 6), "l/bias": (4, 6)}, {"l/kernel": (one((0,), (1, 2)), True)}),
        ({"l/kernel": (3, 24, 36), "l/bias": (5,)}, {"l/kernel": (one((0, 1), (2,)), True)}),
    ],
)
def test_what_biases_and_names_tell(shapes, want):
    assert read(shapes, alone=bool(want)) == want


@pytest.mark.parametrize(
    ("shapes", "want"),
    [
        ({"weight": (36, 24), "bias": (36,)}, {"weight": (one((1,), (0,)), False)}),
        ({"weight_ih": (36, 24), "bias": (36,)}, {"weight_ih": (one((1,), (0,)), False)}),
        ({"weight": (3, 36, 24), "bias": (3, 36)}, {"weight": (one((2,), (1,), (0,)), False)}),
        ({"weight": (2, 3, 36, 24), "bias": (2, 3, 36)}, {"weight": (one((3,), (2,), (0, 1)), False)}),
        ({"weight": (16, 8, 3, 3), "bias": (16, 1, 1)}, {"weight": (one((2, 3, 1), (0,)), False)}),
        ({"weight": (5, 16, 8, 3), "bias": (5, 16, 1)}, {"weight": (one((3, 2), (1,), (0,)), False)}),
        ({"weight": (16, 1, 5), "bias": (16, 1)}, {"weight": (one((2, 1), (0,)), True)}),  # or 16 layers of one output
        ({"weight": (16, 8, 5)}, {"weight": (one((2, 1), (0,)), True)}),  # or stacked layers without a bias
        ({"weight": (16, 8, 3, 3)}, {"weight": (one((2, 3, 1), (0,)), False)}),
        ({"weight": (6, 16, 8, 3, 3)}, {"weight": (one((2, 3, 4, 1), (0,)), True)}),  # likewise
        ({"weight": (3, 24), "bias": (3, 24)}, {}),  # of stacked norms
    ],
)
def test_weights_with_outputs_first(shapes, want):
    assert read(shapes, attributes=True, alone=False) == want


def test_one_weight_for_each_channel_is_no_kernel():
    params = {"l": {"kernel": jnp.ones((3, 24, 36)), "bias": jnp.ones((3, 36)), "gate": jnp.ones((3, 24))}}
    plan = sapp.plan(params, block=1, sparsity=0.5, min_blocks=1)
    reasons = {layer.path: layer.skip_reason for layer in plan.leaves}
    assert reasons["l/gate"] == "not a kernel (one weight for each channel)"
    given = sapp.plan(params, block=1, sparsity=0.5, min_blocks=1, views={"l/gate": "i o"})
    assert given.pruned["l/gate"].grid == (3, 24)


IN_OUT, OUT_IN = one((0,), (1,)), one((1,), (0,))


@pytest.mark.parametrize(
    ("shapes", "want"),
    [
        # PyTorch's order, in trees and in the flat names of its files.
        ({"dense/weight": (96, 24), "dense/bias": (96,)}, {"dense/weight": (OUT_IN, False)}),
        ({"a.dense.weight": (96, 24), "a.dense.bias": (96,)}, {"a.dense.weight": (OUT_IN, False)}),
        (
            {"in_proj_weight": (96, 32), "in_proj_bias": (96,), "out/weight": (32, 32), "out/bias": (32,)},
            {"in_proj_weight": (OUT_IN, False), "out/weight": (OUT_IN, True)},
        ),
        ({"conv/weight": (16, 8, 3, 3), "conv/bias": (16,)}, {"conv/weight": (one((2, 3, 1), (0,)), False)}),
        ({"conv/weight": (16, 8, 3, 3)}, {"conv/weight": (one((2, 3, 1), (0,)), True)}),
        ({"conv/weight": (3, 3, 8, 16)}, {"conv/weight": (one((0, 1, 2), (3,)), True)}),
        ({"up/weight": (16, 8, 3, 3), "up/bias": (8,)}, {"up/weight": (one((2, 3, 0), (1,)), False)}),
        ({"deconv.weight": (16, 8, 3, 3)}, {"deconv.weight": (one((2, 3, 0), (1,)), True)}),
        ({"deconv.weight": (8, 8, 3, 3), "deconv.bias": (8,)}, {"deconv.weight": (one((2, 3, 0), (1,)), True)}),
        ({"conv1.weight": (96, 24, 1, 1)}, {"conv1.weight": (one((2, 3, 1), (0,)), True)}),  # not depthwise
        ({"conv1.weight": (96, 96, 1, 7)}, {"conv1.weight": (one((2, 3, 1), (0,)), True)}),
        # A plain tree with the same names and outputs last.
        ({"dense/weight": (24, 96), "dense/bias": (96,)}, {"dense/weight": (IN_OUT, False)}),
        ({"w1": (24, 96), "b1": (96,)}, {"w1": (IN_OUT, False)}),
        # Ties.
        ({"weight": (24, 24), "bias": (24,)}, {"weight": (IN_OUT, True)}),
        ({"a.weight": (24, 36)}, {"a.weight": (OUT_IN, True)}),
        ({"kernel": (24, 24), "bias": (24,)}, {"kernel": (IN_OUT, False)}),
        # GPT-2 of transformers; what its biases do not decide is read as those they do.
        (
            {
                **{"c_attn/kernel": (72, 24), "c_attn/bias": (72,)},
                **{"c_proj/kernel": (24, 24), "c_proj/bias": (24,), "head/kernel": (24, 99)},
            },
            {"c_attn/kernel": (OUT_IN, False), "c_proj/kernel": (OUT_IN, True), "head/kernel": (OUT_IN, True)},
        ),
        # Stacks of these.
        ({"l/kernel": (3, 72, 24), "l/bias": (3, 72)}, {"l/kernel": (one((2,), (1,), (0,)), False)}),
        ({"l/kernel": (3, 24, 24), "l/bias": (3, 24)}, {"l/kernel": (one((1,), (2,), (0,)), False)}),
        # A bias that two matrices have beside them contradicts none.
        (
            {"up": (24, 96), "down": (96, 24), "bias": (24,)},
            {"up": (IN_OUT, True), "down": (IN_OUT, False)},
        ),
        # A norm's weights, one vector for each of three layers.
        ({"norm/weight": (3, 24), "norm/bias": (3, 24)}, {}),
    ],
)
def test_which_side_of_a_matrix_is_the_outputs(shapes, want):
    assert read(shapes, alone=bool(want)) == want


def test_matrices_of_equinox_are_read_by_their_biases_too():
    assert read({"weight": (24, 96), "bias": (96,)}, attributes=True) == {"weight": (IN_OUT, False)}
    assert read({"weight": (24, 24), "bias": (24,)}, attributes=True) == {"weight": (OUT_IN, False)}


@pytest.mark.parametrize(
    ("shape", "bias", "path"),
    [
        ((3, 3, 40, 1), (40,), "a/kernel"),  # Keras
        ((3, 3, 40, 2), (80,), "a/kernel"),
        ((3, 40, 2), (80,), "a/kernel"),
        ((3, 3, 40, 1), None, "conv_dw_1/kernel"),
        ((3, 3, 40, 2), None, "spatial/kernel"),
        ((5, 40, 1), None, "spatial/kernel"),
        ((3, 3, 40, 2), (1, 1, 1, 80), "spatial/kernel"),  # with a bias that is no vector
        ((7, 1, 40, 2), None, "spatial/kernel"),
        ((3, 3, 40, 16), None, "a/depthwise_kernel"),
        ((3, 3, 1, 1), None, "depthwise_conv2d/kernel"),
        ((3, 1, 80), (80,), "Conv_0/kernel"),  # flax and Haiku
        ((3, 1, 80), None, "Conv_0/kernel"),
        ((3, 3, 3, 1, 80), None, "a/w"),
        ((6, 3, 3, 1, 80), (6, 80), "layers/kernel"),
        ((6, 3, 1, 80), (6, 80), "layers/kernel"),
        ((10, 1, 512), None, "conv_layers/0/conv/kernel"),  # on raw audio
        ((4, 256), (256,), "conv_1d/w"),  # without an axis for its one input
        ((80, 1, 3, 3), None, "a.weight"),  # PyTorch
        ((8, 1, 5, 5), None, "a.weight"),
        ((80, 1, 3), (80,), "a.weight"),
    ],
)
def test_depthwise_kernels_by_their_structure(shape, bias, path):
    beside = {path[: -len("kernel")] + "bias" if "kernel" in path else path[:-1] + "b": bias} if bias else {}
    if path.endswith("weight"):
        beside = {"a.bias": bias} if bias else {}
    (layer,) = (layer for layer in planned({path: shape, **beside}) if layer.path == path)
    assert "depthwise" in layer.skip_reason, layer


@pytest.mark.parametrize(
    ("shape", "bias"),
    [
        ((80, 1, 3), (80, 1)),
        ((80, 1, 3), None),
        ((80, 1, 3, 3, 3), (80, 1, 1, 1)),
        ((6, 80, 1, 3, 3), (6, 80, 1, 1)),
        ((6, 80, 1, 3, 3), None),  # of stacked layers, or over one frame
        ((6, 80, 1, 3), None),
    ],
)
def test_depthwise_kernels_of_equinox(shape, bias):
    shapes = {"weight": shape} | ({"bias": bias} if bias else {})
    (layer,) = (layer for layer in planned(shapes, attributes=True) if layer.path == "weight")
    assert "depthwise" in layer.skip_reason


@pytest.mark.parametrize(
    ("shape", "points"), [((48, 40, 1, 1), (2, 3)), ((48, 40, 1), (2,)), ((48, 40, 1, 1, 1), (2, 3, 4))]
)
def test_filters_of_one_point_in_equinox_are_not_depthwise(shape, points):
    (layer,) = planned({"weight": shape}, attributes=True)
    assert (layer.skip_reason, layer.view) == ("", View((), (*points, 1), (0,)))


@pytest.mark.parametrize(
    ("shape", "bias", "path"),
    [
        ((3, 3, 40, 1), (1,), "head/kernel"),  # one output channel
        ((1, 1, 40, 1), None, "conv_head/kernel"),
        ((3, 3, 40, 6), None, "Conv_3/kernel"),  # as linen numbers convolutions
        ((3, 3, 40, 6), None, "conv2d_3/kernel"),
        ((3, 3, 40, 16), None, "conv1/kernel"),
        ((3, 3, 4, 40), (40,), "conv1/kernel"),  # four input channels a group
        ((1, 1, 40, 8), None, "separable_conv2d/pointwise_kernel"),
        ((512, 1, 64), (1, 64), "key/kernel"),  # attention of one head
        ((512, 1, 64), None, "key/kernel"),
        ((1, 24, 64), None, "out/kernel"),
        ((24, 36), (36,), "graph_conv/kernel"),
    ],
)
def test_kernels_that_are_not_depthwise(shape, bias, path):
    beside = {path.replace("kernel", "bias"): bias} if bias else {}
    layer = next(layer for layer in planned({path: shape, **beside}) if layer.path == path)
    assert (layer.skip_reason, layer.assumed) == ("", False)


@pytest.mark.parametrize(
    ("path", "shape", "bias", "want"),
    [
        ("conv2d_transpose_1/kernel", (3, 3, 8, 16), None, (one((0, 1, 3), (2,)), True)),
        ("conv3_d_transpose/w", (3, 3, 3, 8, 16), None, (one((0, 1, 2, 4), (3,)), True)),
        ("my_deconv/w", (3, 8, 16), None, (one((0, 2), (1,)), True)),
        ("ConvTranspose_0/kernel", (3, 3, 8, 16), None, (one((0, 1, 2), (3,)), True)),  # linen has both orders
        ("up_1/kernel", (3, 3, 8, 16), None, (one((0, 1, 2), (3,)), True)),
        ("decoder/conv1/kernel", (3, 3, 8, 16), None, (one((0, 1, 2), (3,)), True)),
        ("layer/kernel", (3, 3, 16, 16), (16,), (one((0, 1, 2), (3,)), True)),
        ("conv2d_transpose_1/kernel", (3, 3, 16, 16), (16,), (one((0, 1, 3), (2,)), True)),
        ("l/kernel", (5, 3, 3, 8, 16), (5, 8), (one((1, 2, 4), (3,), (0,)), False)),  # stacked
        ("decoder/expand/kernel", (1, 1, 9, 54), None, (one((0, 1, 2), (3,)), False)),  # of one point
        ("conv1/kernel", (3, 3, 16, 16), (16,), (one((0, 1, 2), (3,)), False)),
        ("stage/convs/0/kernel", (3, 3, 16, 16), None, (one((0, 1, 2), (3,)), False)),
        ("conv2d_1/kernel", (7, 1, 8, 16), None, (one((0, 1, 2), (3,)), False)),
        ("Conv_0/kernel", (6, 3, 3, 8, 16), None, (one((0, 1, 2, 3), (4,)), True)),  # or stacked layers without a bias
    ],
)
def test_transposed_convolutions(path, shape, bias, want):
    beside = {path.rpartition("/")[0] + "/bias": bias} if bias else {}
    assert read({path: shape, **beside})[path] == want


class Transposed(nn.Module):
    rank: int
    bias: bool
    kernel: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.ConvTranspose(9, (3,) * self.rank, use_bias=self.bias, transpose_kernel=self.kernel)(x)


# Layers of each framework: a kernel with a single column of its matrix changes a single output channel.

pytestmark = pytest.mark.usefixtures("standard_promotion")
SIDE = 3


def linen(make):
    def built(rank, inputs, bias):
        x, module = images(rank, inputs), make(rank, bias)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        return variables["params"], lambda params, x=x: module.apply({"params": params}, x)

    return built


def of_nnx(make):
    def built(rank, inputs, bias):
        graph, params = nnx.split(nnx.eval_shape(lambda: make(rank, bias)))
        x = images(rank, inputs)
        return params, lambda params, x=x: nnx.merge(graph, params)(x)

    return built


def equinox(name, **options):
    def built(rank, inputs, bias):
        eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
        make = getattr(eqx.nn, name)
        module = eqx.filter_eval_shape(
            lambda: make(rank, inputs, kernel_size=3, use_bias=bias, key=jax.random.key(0), **options)
        )
        params, static = eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        first = lambda x: jnp.moveaxis(x[0], -1, 0)  # noqa: E731
        x = images(rank, inputs)
        return params, lambda params, x=x: jnp.moveaxis(eqx.combine(params, static)(first(x)), 0, -1)

    return built


def haiku(name, *arguments):
    def built(rank, inputs, bias):
        hk = pytest.importorskip("haiku", reason="Haiku is not installed")
        make = getattr(hk, name.format(rank))
        model = hk.without_apply_rng(hk.transform(lambda x: make(*arguments, 3, with_bias=bias)(x)))
        x = images(rank, inputs)
        return jax.eval_shape(model.init, jax.random.key(0), x), lambda params, x=x: model.apply(params, x)

    return built


def keras(layer, **options):
    def built(rank, inputs, bias):
        module = pytest.importorskip("keras", reason="Keras is not installed")
        if module.backend.backend() != "jax":
            pytest.skip("Keras does not run on JAX")
        x, made = images(rank, inputs), getattr(module.layers, layer.format(rank))(use_bias=bias, **options)
        made.build(x.shape)
        order = [variable.path for variable in made.trainable_variables]
        params = {v.path: jax.ShapeDtypeStruct(v.shape, jnp.float32) for v in made.trainable_variables}
        return params, lambda params, x=x: made.stateless_call([params[path] for path in order], [], x)[0]

    return built


def images(rank, channels):
    return jnp.ones((1, *[SIDE] * rank, channels))


def channels_of(path, params, column, layer, call):
    """The output channels that differ from zero if of a kernel's matrix only one column does."""

    def filled(keys, leaf):
        if sapp.path_string(keys) != path:
            return jnp.full(leaf.shape, float("kernel" in sapp.path_string(keys)))  # biases 0, other kernels 1
        matrix = jnp.zeros(blocks.matrix_shape(leaf.shape, layer.view)).at[:, column].set(1)
        return blocks.from_matrices(matrix, leaf.shape, layer.view)

    y = np.asarray(call(jax.tree_util.tree_map_with_path(filled, params)))
    return np.flatnonzero(y.reshape(-1, y.shape[-1]).any(0)), y.shape[-1]


K = {"kernel_size": 3}
CONVOLUTIONS = {
    "linen": linen(lambda rank, bias: nn.Conv(9, (3,) * rank, use_bias=bias)),
    "linen, groups": linen(lambda rank, bias: nn.Conv(9, (3,) * rank, use_bias=bias, feature_group_count=3)),
    "linen, transposed": linen(Transposed),
    "linen, transposed kernel": linen(lambda rank, bias: Transposed(rank, bias, kernel=True)),
    "nnx": of_nnx(lambda rank, bias: nnx.Conv(12, 9, (3,) * rank, use_bias=bias, rngs=nnx.Rngs(0))),
    "equinox": equinox("Conv", out_channels=9),
    "equinox, groups": equinox("Conv", out_channels=9, groups=3),
    "equinox, transposed": equinox("ConvTranspose", out_channels=9),
    "haiku": haiku("Conv{}D", 9),
    "haiku, transposed": haiku("Conv{}DTranspose", 9),
    "keras": keras("Conv{}D", filters=9, **K),
    "keras, transposed": keras("Conv{}DTranspose", filters=9, **K),
    "keras, transposed and named": keras("Conv{}DTranspose", filters=9, name="layer", **K),
    "keras, separable": keras("SeparableConv{}D", filters=9, **K),
}
DEPTHWISE = {
    "linen": linen(lambda rank, bias: nn.Conv(24, (3,) * rank, use_bias=bias, feature_group_count=12)),
    "nnx": of_nnx(
        lambda rank, bias: nnx.Conv(12, 12, (3,) * rank, use_bias=bias, feature_group_count=12, rngs=nnx.Rngs(0))
    ),
    "equinox": equinox("Conv", out_channels=12, groups=12),
    "equinox, two each": equinox("Conv", out_channels=24, groups=12),
    "haiku": haiku("DepthwiseConv{}D", 2),
    "keras": keras("DepthwiseConv{}D", **K),
    "keras, named": keras("DepthwiseConv{}D", name="layer", **K),
    "keras, two each": keras("DepthwiseConv{}D", depth_multiplier=2, name="layer", **K),
    "keras, groups": keras("Conv{}D", filters=24, groups=12, name="layer", **K),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_columns_are_the_output_channels_of_a_convolution(name, rank, bias):
    if "separable" in name and rank == 3:
        pytest.skip("Keras has none")
    params, call = CONVOLUTIONS[name](rank, 12, bias)
    plan = sapp.plan({"": params, "other": jnp.ones((40, 40))}, block=1, sparsity=0.5, min_blocks=1)
    found = [layer for path, layer in plan.pruned.items() if path != "other"]
    assert len(found) == 1
    assert found[0].assumed <= (not bias)
    if not found[0].assumed:
        channels, n = channels_of(found[0].path[1:], params, 4, found[0], call)
        assert (channels.tolist(), blocks.matrix_shape(found[0].shape, found[0].view)[1]) == ([4], n)


@pytest.mark.parametrize(("rank", "bias"), [(1, False), (2, True)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_views_read_off_a_convolution(name, rank, bias):
    params, call = CONVOLUTIONS[name](rank, 12, bias)
    arrays = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), params)
    ((path, view),) = sapp.views_of(call, arrays, images(rank, 12)).items()
    plan = sapp.plan({"": params, "other": jnp.ones((40, 40))}, block=1, sparsity=0.5, min_blocks=1)
    (guessed,) = (layer for layer in plan.pruned.values() if layer.path != "other")
    assert guessed.path == f"/{path}"
    channels, n = channels_of(path, params, 4, guessed._replace(view=view), call)
    assert (channels.tolist(), blocks.matrix_shape(guessed.shape, view)[1]) == ([4], n)
    if not guessed.assumed:
        places = np.arange(guessed.weights).reshape(guessed.shape)
        np.testing.assert_array_equal(blocks.matrices(places, view), blocks.matrices(places, guessed.view))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_convolutions_have_no_view_to_read_off(name, rank):
    params, call = DEPTHWISE[name](rank, 12, False)
    arrays = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), params)
    assert sapp.views_of(call, arrays, images(rank, 12)) == {}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_convolutions_stay_dense(name, rank, bias):
    if rank == 3 and "keras" in name and "groups" not in name:
        pytest.skip("Keras has none")
    params, _ = DEPTHWISE[name](rank, 12, bias)
    plan = sapp.plan({"": params, "other": jnp.ones((40, 40))}, block=1, sparsity=0.5, min_blocks=1)
    assert list(plan.pruned) == ["other"]
