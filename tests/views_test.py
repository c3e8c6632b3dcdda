"""Leaves read as one or several matrices: the same as pruning those matrices one by one."""

import functools
import re

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from optax.contrib import MuonDimensionNumbers

import sa_plus_plus as sapp
from sa_plus_plus import blocks, views
from sa_plus_plus.sparse import BlockSparse
from sa_plus_plus.views import View

# A random key is of the leaf's path.
SEEDLESS = [name for name in problems.NAMES if name not in ("dense", "random", "rigl", "sparse_evolutionary")]


@pytest.mark.parametrize(
    ("view", "ndim", "want"),
    [
        ("i o", 2, View((), (0,), (1,))),
        ("d (h k)", 3, View((), (0,), (1, 2))),
        ("(h k) d", 3, View((), (0, 1), (2,))),
        ("[l] i o", 3, View((0,), (1,), (2,))),
        ("[l e] i o", 4, View((0, 1), (2,), (3,))),
        ("o i -> i o", 2, View((), (1,), (0,))),
        ("o i h w -> (h w i) o", 4, View((), (2, 3, 1), (0,))),
        ("i l o -> [l] i o", 3, View((1,), (0,), (2,))),
        ("d(h k)", 3, View((), (0,), (1, 2))),
        (MuonDimensionNumbers((0,), (1, 2)), 3, View((), (0,), (1, 2))),
        (MuonDimensionNumbers(-2, -1), 3, View((0,), (1,), (2,))),
        (View((), (-2,), (-1,)), 2, View((), (0,), (1,))),
    ],
)
def test_views_as_users_write_them(view, ndim, want):
    assert views.as_view(view, ndim) == want


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ("i o", "the view 'i o' names 2 axes, but the leaf has 3"),
        ("(i i) o", "names the axis 'i' twice"),
        ("a b c", "has 3 axes or groups besides those in brackets"),
        ("[a b c]", "has 0 axes or groups"),
        ("a (b c", "cannot read the view"),
        ("a b c -> a (b d)", "does not have the axis 'c' once on each side"),
        (MuonDimensionNumbers((0,), (0,)), "names an axis twice"),
        (View((0,), (1,), ()), "names 2 axes, but the leaf has 3"),
        (View((0, 1), (2,), ()), "leaves no axis for columns"),
    ],
)
def test_views_that_do_not_fit(view, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sapp.plan({"a": {"kernel": jnp.ones((3, 4, 5))}}, block=2, sparsity=0.5, views={"a/*": view})
    assert "a/kernel, of shape (3, 4, 5)" in str(error.value)


def test_views_that_are_none():
    params = {"kernel": jnp.ones((40, 40))}
    with pytest.raises(TypeError, match="a view is text"):
        sapp.plan(params, block=2, sparsity=0.5, views={"kernel": 3})
    with pytest.raises(ValueError, match="the view of 'kernle' matches no leaf; nearest: 'kernel'"):
        sapp.plan(params, block=2, sparsity=0.5, views={"kernle": "i o"})
    with pytest.raises(ValueError, match="views must be a mapping"):
        sapp.magnitude(block=2, sparsity=0.5, phases=sapp.phases.magnitude(10), views="i o")


SHAPES = st.sampled_from(
    [
        ((5, 7), View((), (1,), (0,))),
        ((4, 3, 6), View((), (0,), (1, 2))),
        ((3, 5, 4), View((0,), (1,), (2,))),
        ((3, 5, 4), View((1,), (2,), (0,))),
        ((2, 3, 4, 5), View((0, 2), (3,), (1,))),
        ((6, 2, 3, 5), View((), (2, 3, 1), (0,))),
        ((2, 2, 3, 2, 4), View((0,), (1, 2), (4, 3))),
    ]
)


@hypothesis.given(SHAPES, st.sampled_from([(1, 1), (2, 3), (3, 2), (5, 4)]), st.integers(0, 99))
@problems.examples(20)
def test_blocks_of_views_against_numpy(drawn, block, seed):
    (shape, view), rng = drawn, np.random.default_rng(seed)
    kernel = rng.normal(size=shape) * (rng.random(shape) < 0.3)
    rows, cols = view.matrix(shape)
    stacked = kernel.transpose(view.order).reshape(-1, rows, cols)
    g_r, g_c = -(-rows // block[0]), -(-cols // block[1])
    norms = np.zeros((len(stacked), g_r, g_c))
    for m, r, c in np.ndindex(stacked.shape):
        norms[m, r // block[0], c // block[1]] += stacked[m, r, c] ** 2
    got = blocks.to_blocks(kernel, block, view)
    assert got.shape == (*view.stack(shape), g_r, block[0], g_c, block[1])
    np.testing.assert_allclose((got**2).sum((-3, -1)).reshape(norms.shape), norms)
    np.testing.assert_array_equal(blocks.from_blocks(got, shape, view), kernel)
    numbers = np.arange(norms.size).reshape(blocks.full_grid(shape, block, view))
    spread = np.asarray(blocks.spread(jnp.asarray(numbers), shape, block, view))
    for m, r, c in np.ndindex(stacked.shape):
        want = numbers.reshape(norms.shape)[m, r // block[0], c // block[1]]
        assert spread.transpose(view.order).reshape(stacked.shape)[m, r, c] == want
    w = BlockSparse.fromdense(kernel.astype(np.float32), block, view=view)
    np.testing.assert_array_equal(w.todense(), kernel.astype(np.float32))
    assert w.nse == (norms > 0).sum()
    sizes = np.broadcast_to(blocks.block_sizes(shape, block, view), norms.shape)
    assert int(w.layout.real.sum()) == sizes[norms > 0].sum()


# Of attention: queries, stacked layers, Equinox's order; by view, and as the matrices they stand for.
LEAVES = {
    "query": ((24, 2, 13), "d (h k)", lambda w: [w.reshape(24, 26)]),
    "layers": ((3, 20, 24), "[l] i o", list),
    "weight": ((26, 24), "o i -> i o", lambda w: [w.T]),
}


def leaves(seed=0):
    keys = jax.random.split(jax.random.key(seed), len(LEAVES))
    return {name: jax.random.normal(key, LEAVES[name][0]) for name, key in zip(LEAVES, keys, strict=True)}


def apart(tree):
    return {f"{name}{i}": w for name, (_, _, cut) in LEAVES.items() for i, w in enumerate(cut(tree[name]))}


@functools.partial(jax.jit, static_argnums=(0, 1))
def trained(sp, cut, params):
    tx = optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale(-0.05))
    trainable, prune = sp.init(params)
    opt_state = tx.init(trainable)
    targets = cut(leaves(1))

    def loss(trainable, prune):
        effective = sp.apply(trainable, prune)
        return jax.tree.reduce(jnp.add, jax.tree.map(lambda w, t: jnp.sum((w - t) ** 2), effective, targets))

    def step(state, _):
        trainable, prune, opt_state = state
        grads = jax.grad(loss)(trainable, prune)
        updates, opt_state = tx.update(grads, opt_state, trainable, phase=prune.phase)
        trainable, prune = sp.update(trainable, prune, updates)
        return (trainable, prune, opt_state), None

    (trainable, prune, _), _ = jax.lax.scan(step, (trainable, prune, opt_state), length=40)
    return sp.finalize(trainable, prune), prune.masks, trainable.logits


@pytest.mark.parametrize(
    ("name", "scope"),
    [*((name, "layer") for name in SEEDLESS), ("sequential_attention", "global"), ("movement", "global")],
)
def test_a_view_is_pruned_as_its_matrices_are(name, scope):
    make = functools.partial(problems.sparsifier, name, 40, block=(3, 4), sparsity=0.7, min_blocks=1, scope=scope)
    viewed = make(views={name: view for name, (_, view, _) in LEAVES.items()})
    got, masks, _ = trained(viewed, lambda tree: tree, leaves())
    want, want_masks, _ = trained(make(), apart, apart(leaves()))
    chex.assert_trees_all_close(apart(got), want, rtol=2e-5, atol=2e-5)
    for path, (_, _, _) in LEAVES.items():
        grids = masks[path].reshape(-1, *masks[path].shape[-2:])
        for i, grid in enumerate(grids):
            np.testing.assert_array_equal(grid, want_masks[f"{path}{i}"])
    plan = viewed.plan(leaves())
    sapp.check_pruned(got, plan)
    assert plan.sparsity == make().plan(apart(leaves())).sparsity
    assert float(sapp.metrics.kernel_sparsity(masks, plan)) == pytest.approx(
        float(sapp.metrics.kernel_sparsity(want_masks, make().plan(apart(leaves()))))
    )


def test_random_masks_have_the_planned_number_of_blocks_in_each_matrix():
    sp = problems.sparsifier("random", views={"layers": "[l] i o"})
    params = {"layers": jnp.ones((3, 40, 40))}
    masks = sp.init(params)[1].masks["layers"]
    assert masks.shape == (3, 20, 20)
    np.testing.assert_array_equal(masks.sum((1, 2)), 80)
    assert (masks[0] != masks[1]).any()


@pytest.mark.filterwarnings("ignore:3 of 3 layers keep more blocks")  # nothing is trained here
@pytest.mark.parametrize("storage", ["exact", "bfloat16", "int8"])
def test_files(storage, tmp_path):
    sp = problems.sparsifier(
        "magnitude", 40, block=(3, 4), min_blocks=1, views={name: view for name, (_, view, _) in LEAVES.items()}
    )
    pruned = jax.jit(sp.finalize)(*sp.init(leaves()))
    exported = sapp.export(jax.tree.map(lambda w: jnp.where(abs(w) > 1, w, 0), pruned), sp.plan(leaves()))
    sapp.save(tmp_path / "file", exported, storage=storage)
    loaded = sapp.load(tmp_path / "file")
    for path in LEAVES:
        assert loaded[path].layout == exported[path].layout
    if storage == "exact":
        chex.assert_trees_all_equal(sapp.todense(loaded), sapp.todense(exported))


def test_products_with_a_view():
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 24), (16, 24)))
    w = BlockSparse.fromdense(weight, 8, view="o i -> i o")
    np.testing.assert_allclose(sapp.block_sparse_matmul(x, w), x @ weight.T, rtol=1e-5, atol=1e-5)
    query = jnp.asarray(rng.normal(size=(24, 2, 8)), jnp.float32)
    for implementation in ("xla", None):
        y = sapp.block_sparse_matmul(x, BlockSparse.fromdense(query, 8, view="d (h k)"), implementation=implementation)
        np.testing.assert_allclose(y, x @ query.reshape(24, 16), rtol=1e-5, atol=1e-5)
    stack = BlockSparse.fromdense(jnp.ones((2, 8, 8)), 4, view="[l] i o")
    with pytest.raises(ValueError, match="w is a stack of 2 matrices"):
        sapp.block_sparse_matmul(x[:, :8], stack)


class Attention(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(x)
        x = nn.MultiHeadDotProductAttention(4, use_bias=self.bias, name="attention")(x)
        return nn.Dense(24, use_bias=self.bias, name="dense")(x)


class Stacked(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda module, x, _: (module(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scan(Attention(self.bias, name="layers"), x, None)[0]


def plan_of(module, *inputs):
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    plan = sapp.plan(params, block=2, sparsity=0.5, min_blocks=1)
    return {layer.path: layer for layer in plan.leaves}


@pytest.mark.parametrize("bias", [True, False])
def test_flax_attention_and_scanned_layers(bias):
    x = jnp.zeros((2, 5, 24))
    layers = plan_of(Attention(bias), x)
    for name in ("query", "key", "value"):
        assert layers[f"attention/{name}/kernel"].grid == (12, 12)
    assert layers["attention/out/kernel"].grid == (12, 12)
    stacked = plan_of(Stacked(bias), x)
    for path in ("attention/query/kernel", "attention/out/kernel", "dense/kernel"):
        layer = stacked[f"layers/{path}"]
        assert (layer.stack, layer.grid, layer.kept, layer.assumed) == ((3,), (12, 12), 3 * 72, False)
        assert layer.shape[1:] == layers[path].shape


def test_flax_convolutions():
    images, series = jnp.zeros((1, 9, 9, 4)), jnp.zeros((1, 9, 4))
    for bias in (True, False):
        assert plan_of(nn.Conv(6, (3, 3), use_bias=bias), images)["kernel"].grid == (18, 3)
        assert plan_of(nn.Conv(6, (3,), use_bias=bias), series)["kernel"].grid == (6, 3)
    assert plan_of(nn.Conv(6, (3,), use_bias=False), series)["kernel"].assumed
    assert not plan_of(nn.Conv(6, (3,)), series)["kernel"].assumed
    assert plan_of(nn.DenseGeneral((2, 6)), series)["kernel"].grid == (2, 6)


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
        # No stack, though all leaves begin with the same axis.
        ({"l/w": (24, 36), "l/b": (24, 1)}, {"l/w": (one((0,), (1,)), False), "l/b": (one((0,), (1,)), False)}),
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
        ({"in_proj_weight": (96, 24), "in_proj_bias": (96,)}, {"in_proj_weight": (OUT_IN, False)}),
        ({"conv/weight": (16, 8, 3, 3), "conv/bias": (16,)}, {"conv/weight": (one((2, 3, 1), (0,)), False)}),
        ({"conv/weight": (16, 8, 3, 3)}, {"conv/weight": (one((2, 3, 1), (0,)), True)}),
        ({"conv/weight": (3, 3, 8, 16)}, {"conv/weight": (one((0, 1, 2), (3,)), True)}),
        ({"up/weight": (16, 8, 3, 3), "up/bias": (8,)}, {"up/weight": (one((2, 3, 0), (1,)), False)}),
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
    ],
)
def test_transposed_convolutions(path, shape, bias, want):
    beside = {path.rpartition("/")[0] + "/bias": bias} if bias else {}
    assert read({path: shape, **beside})[path] == want


def test_the_plan_says_how_leaves_are_read():
    params = jax.eval_shape(Stacked().init, jax.random.key(0), jnp.zeros((2, 5, 24)))["params"]
    table = str(sapp.plan(params, block=2, sparsity=0.5))
    assert "3 × 24×(4·6)" in table
    assert "3 × 12×12" in table
    assert "read as" not in str(sapp.plan({"kernel": jnp.ones((40, 40))}, block=2, sparsity=0.5))
    assumed = str(sapp.plan({"kernel": jnp.ones((3, 40, 40))}, block=2, sparsity=0.5))
    assert "(3·40)×40, assumed" in assumed


def test_groups_that_are_whole_sides():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(120, 30)), jnp.float32)}
    rows = sapp.plan(params, block=(1, None), sparsity=0.9).pruned["w"]
    assert (rows.block, rows.grid, rows.kept) == ((1, 30), (120, 1), 12)
    columns = sapp.plan(params, block=(None, 1), sparsity=0.9, min_blocks=1).pruned["w"]
    assert (columns.block, columns.grid, columns.kept) == ((120, 1), (1, 30), 3)
    overridden = sapp.plan(
        params, block=4, sparsity=0.9, overrides={"w": {"block": (None, 7), "min_blocks": 5, "sparsity": 0.6}}
    )
    assert overridden.pruned["w"].grid == (1, 5)  # ragged
    for wrong in (None, (None,), (1, 0), "a"):
        with pytest.raises(ValueError, match="block must be a positive integer or a pair"):
            sapp.plan(params, block=wrong, sparsity=0.9)


@pytest.mark.parametrize(("block", "axis"), [((1, None), 0), ((None, 1), 1)])
def test_shrunk_layers_compute_the_same(block, axis):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(120, 30)), jnp.float32), "b": jnp.zeros(30)}
    sp = problems.sparsifier("magnitude", 10, block=block, min_blocks=1)
    trainable, prune = sp.init(params)
    for _ in range(10):
        trainable, prune = jax.jit(sp.update)(trainable, prune)
    pruned, plan = sp.finalize(trainable, prune), sp.plan(params)
    shrunk = sapp.shrink(pruned, plan)
    w = shrunk["w"]
    want = [120, 30]
    want[axis] = plan.pruned["w"].kept
    assert w.kernel.shape == tuple(want)
    np.testing.assert_array_equal(w.todense(), pruned["w"])
    x = jnp.asarray(rng.normal(size=(4, 120)), jnp.float32)
    y = jnp.zeros((4, 30)).at[:, w.indices[1]].set(x[:, w.indices[0]] @ w.kernel)
    np.testing.assert_allclose(y, x @ pruned["w"], rtol=1e-5, atol=1e-5)
    assert shrunk["b"] is pruned["b"]
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda p: sapp.shrink(p, plan))(pruned)


def test_heads_are_shrunk_from_their_own_axis():
    kernel = jnp.ones((8, 4, 3)).at[:, 1].set(0)
    plan = sapp.plan({"query": {"kernel": kernel}}, block=(None, 3), sparsity=0.25, min_blocks=1)
    w = sapp.shrink({"query": {"kernel": kernel}}, plan)["query"]["kernel"]
    assert w.kernel.shape == (8, 3, 3)
    np.testing.assert_array_equal(w.indices[1], [0, 2, 3])
    np.testing.assert_array_equal(w.todense(), kernel)
