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
QUICK = ("sequential_attention", "gradual_magnitude", "powerpropagation")


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
    spread = np.asarray(blocks.expand_blocks(jnp.asarray(numbers), shape, block, view))
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
    [
        *((name, "layer") for name in QUICK),
        *(pytest.param(name, "layer", marks=pytest.mark.long) for name in SEEDLESS if name not in QUICK),
        *((name, "global") for name in ("sequential_attention", "movement")),
    ],
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


def test_the_plan_says_how_leaves_are_read():
    params = jax.eval_shape(Stacked().init, jax.random.key(0), jnp.zeros((2, 5, 24)))["params"]
    table = str(sapp.plan(params, block=2, sparsity=0.5))
    assert "3 × 24×(4·6)" in table
    assert "3 × 12×12" in table
    assert "read as" not in str(sapp.plan({"kernel": jnp.ones((40, 40))}, block=2, sparsity=0.5))
    assumed = str(sapp.plan({"kernel": jnp.ones((3, 40, 40))}, block=2, sparsity=0.5))
    assert "(3·40)×40, assumed" in assumed


def test_a_pattern_passes_over_leaves_with_other_numbers_of_axes():
    params = {"norm": {"weight": jnp.ones(40)}, "linear": {"weight": jnp.ones((40, 40))}}
    plan = sapp.plan(params, block=2, sparsity=0.5, views={"*/weight": "o i -> i o"})
    assert plan.pruned["linear/weight"].view == View((), (1,), (0,))
    assert "40×40 transposed" in str(plan)
    for pattern in ("*/weight", "norm/weight"):
        with pytest.raises(ValueError, match=r"/weight, of shape .* names 3 axes, but the leaf has"):
            sapp.plan(params, block=2, sparsity=0.5, views={pattern: "a b c -> c (a b)"})


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
