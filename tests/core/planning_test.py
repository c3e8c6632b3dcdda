"""The plan of a network: ResNet-50 as the paper's Table 1 has it, paths, options, and what is refused."""

import functools
import gc
import math
import re
import warnings
import weakref
from fractions import Fraction

import flax
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from flax import linen, nnx
from hypothesis import strategies as st

import sa_plus_plus as sapp
from sa_plus_plus.planning import map_layers, planner


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def resnet50():
    """ResNet-50's parameters, named as flax's example names them, batch norms and biases included."""

    def conv(*shape):
        return {"kernel": leaf(*shape)}

    def norm(width):
        return {"bias": leaf(width), "scale": leaf(width)}

    params, inputs, count = {"conv_init": conv(7, 7, 3, 64), "bn_init": norm(64)}, 64, 0
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(blocks):
            block = {
                "Conv_0": conv(1, 1, inputs, width),
                "Conv_1": conv(3, 3, width, width),
                "Conv_2": conv(1, 1, width, 4 * width),
                "BatchNorm_0": norm(width),
                "BatchNorm_1": norm(width),
                "BatchNorm_2": norm(4 * width),
            }
            if i == 0:
                block |= {"conv_proj": conv(1, 1, inputs, 4 * width), "norm_proj": norm(4 * width)}
            params[f"BottleneckResNetBlock_{count}"] = block
            inputs, count = 4 * width, count + 1
    return params | {"Dense_0": {"kernel": leaf(2048, 1000), "bias": leaf(1000)}}


RESNET50 = resnet50()
MLP = {"hidden": {"kernel": leaf(390, 400), "bias": leaf(400)}, "out": {"kernel": leaf(400, 1), "bias": leaf(1)}}

plan_mlp = functools.partial(sapp.plan, MLP, block=20, sparsity=0.9)

# Block, pruned layers, sparsity of the whole network in percent at 70, 80, 90, 95% (Table 1).
TABLE_1 = [
    (8, 53, ("70.00", "79.99", "89.99", "94.99")),
    (16, 46, ("69.72", "79.67", "89.63", "94.61")),
    (32, 35, ("68.12", "77.83", "87.56", "92.42")),
    (64, 18, ("57.94", "66.18", "74.45", "78.58")),
]


def test_resnet50_has_its_kernels_and_weights():
    result = sapp.plan(RESNET50, block=8, sparsity=0.9)
    assert sum(layer.is_kernel for layer in result.leaves) == 54
    assert result.kernel_weights == 25_502_912
    assert len(result.leaves) == len(jax.tree.leaves(RESNET50))


@pytest.mark.parametrize(("block", "layers", "printed"), TABLE_1)
def test_resnet50_reproduces_table_1(block, layers, printed):
    for sparsity, want in zip(("0.7", "0.8", "0.9", "0.95"), printed, strict=True):
        result = sapp.plan(RESNET50, block=block, sparsity=float(sparsity))
        assert len(result.pruned) == layers
        assert f"{100 * result.sparsity:.2f}" == want
        for layer in result.pruned.values():
            assert layer.kept == math.floor((1 - Fraction(sparsity)) * layer.blocks)


@pytest.mark.parametrize(("block", "layers"), [row[:2] for row in TABLE_1])
def test_a_layer_is_pruned_from_100_blocks_on(block, layers):
    result = sapp.plan(RESNET50, block=block, sparsity=0.9)
    for layer in result.leaves:
        if layer.is_kernel:
            rows, cols = math.prod(layer.shape[:-1]), layer.shape[-1]
            tiles = len(range(0, rows, block)) * len(range(0, cols, block))
            assert (layer.path in result.pruned) == (tiles >= 100)
    assert len(result.pruned) == layers


def test_a_layer_of_the_plan():
    result = sapp.plan(RESNET50, block=32, sparsity=0.9)
    layer = result.pruned["BottleneckResNetBlock_3/Conv_1/kernel"]
    assert layer == sapp.LeafPlan(
        "BottleneckResNetBlock_3/Conv_1/kernel", (3, 3, 128, 128), (32, 32), (36, 4), 14, 0.9, ""
    )
    assert (layer.blocks, layer.weights, layer.is_kernel) == (144, 147_456, True)
    dense = next(layer for layer in result.leaves if layer.path == "conv_init/kernel")
    assert (dense.grid, dense.kept, dense.sparsity, dense.skip_reason) == ((5, 2), 10, 0.0, "fewer than 100 blocks")
    bias = next(layer for layer in result.leaves if layer.path == "Dense_0/bias")
    assert (bias.grid, bias.kept, bias.is_kernel, bias.skip_reason) == ((0, 0), 0, False, "not a kernel (1-D)")


def test_criteo_prunes_the_first_dense_layer_alone():
    result = plan_mlp(block=10, sparsity=0.97)
    assert list(result.pruned) == ["hidden/kernel"]
    assert result.pruned["hidden/kernel"].kept == 46  # of 1560: 46.8


@hypothesis.given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 60),
    block=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    percent=st.integers(0, 99),
    min_blocks=st.integers(1, 20),
)
def test_one_kernel_against_the_rules(rows, cols, block, percent, min_blocks):
    """Pruned if there are enough blocks, edges counted, and one stays; then exactly the floor is kept."""
    n = len(range(0, rows, block[0])) * len(range(0, cols, block[1]))
    kept = n * (100 - percent) // 100
    make = functools.partial(
        sapp.plan, {"w": leaf(rows, cols)}, block=block, sparsity=float(f"0.{percent:02}"), min_blocks=min_blocks
    )
    if n < min_blocks:
        with pytest.raises(ValueError, match=f"nothing to prune with block={re.escape(str(block))}"):
            make()
    elif kept == 0:
        with pytest.raises(ValueError, match=f"sparsity .* leaves no block of the {n} in w"):
            make()
    else:
        result = make()
        assert result.pruned["w"].kept == kept
        assert result.sparsity == pytest.approx(1 - kept / n)


def test_whole_network_sparsity_weighs_layers_by_their_weights():
    params = {"a": leaf(20, 10), "b": leaf(10, 10), "c": leaf(100), "d": leaf(2, 2)}
    result = sapp.plan(params, block=2, sparsity=0.4, min_blocks=20, overrides={"b": {"sparsity": 0.8}})
    assert result.kernel_weights == 200 + 100 + 4
    assert result.sparsity == pytest.approx((200 * 20 / 50 + 100 * 20 / 25) / 304)


def test_arrays_shapes_and_dtypes_will_do():
    want = sapp.plan({"w": leaf(30, 40)}, block=4, sparsity=0.5, min_blocks=1)
    assert sapp.plan({"w": jnp.ones((30, 40))}, block=4, sparsity=0.5, min_blocks=1) == want
    assert sapp.plan({"w": np.ones((30, 40), np.float32)}, block=4, sparsity=0.5, min_blocks=1) == want
    shapes = jax.eval_shape(lambda: {"w": jnp.ones((30, 40), jnp.bfloat16)})
    assert sapp.plan(shapes, block=4, sparsity=0.5, min_blocks=1) == want


def test_kernels_of_two_to_five_dimensions():
    params = {f"{n}d": leaf(*[3] * n) for n in range(7)} | {"empty": leaf(0, 3)}
    result = sapp.plan(params, block=1, sparsity=0.5, min_blocks=1)
    assert sorted(result.pruned) == ["2d", "3d", "4d", "5d"]
    assert {la.path for la in result.leaves if not la.is_kernel} == {"0d", "1d", "6d", "empty"}


# Which leaves.


@pytest.mark.parametrize("name", ["embedding", "Embedding", "pos_embedding", "word_embed"])
def test_embeddings_stay_dense(name):
    result = sapp.plan({"Embed_0": {name: leaf(64, 64)}, "head": {"kernel": leaf(64, 64)}}, block=4, sparsity=0.5)
    assert list(result.pruned) == ["head/kernel"]
    assert result.leaves[0].skip_reason == "embedding"


@pytest.mark.parametrize("name", ["bias", "scale"])
def test_biases_and_scales_stay_dense_though_they_be_matrices(name):
    params = {"attention": {"kernel": leaf(64, 64), name: leaf(64, 64)}}
    for result in (sapp.plan(params, block=4, sparsity=0.5), sapp.dense(phases=sapp.phases.dense(10)).plan(params)):
        assert {la.path: la.skip_reason for la in result.leaves}[f"attention/{name}"] == name
        assert result.kernel_weights == 64 * 64
    chosen = sapp.plan(params, block=4, sparsity=0.5, where=lambda path: True)
    assert sorted(chosen.pruned) == sorted([f"attention/{name}", "attention/kernel"])


@pytest.mark.parametrize("kind", [np.float32, np.float64, jnp.float32])
def test_a_sparsity_of_any_width_is_the_decimal_that_is_meant(kind):
    result = sapp.plan({"kernel": leaf(100, 100)}, block=1, sparsity=kind(0.8))
    assert result.pruned["kernel"].kept == 2000


def test_a_dense_layer_inside_a_module_called_embedding_is_pruned():
    result = sapp.plan({"embedding_mlp": {"kernel": leaf(64, 64)}}, block=4, sparsity=0.5)
    assert list(result.pruned) == ["embedding_mlp/kernel"]


def test_where_chooses_by_path_and_replaces_the_default():
    params = {"embed": {"embedding": leaf(64, 64)}, "a": {"kernel": leaf(64, 64)}, "b": {"kernel": leaf(64, 64)}}
    seen = []

    def where(path):
        seen.append(path)
        return path.startswith(("embed", "b"))

    result = sapp.plan(params, block=4, sparsity=0.5, where=where)
    assert sorted(result.pruned) == ["b/kernel", "embed/embedding"]
    assert sorted(set(seen)) == ["a/kernel", "b/kernel", "embed/embedding"]
    assert result.leaves[0].skip_reason == "excluded by `where`"


@pytest.mark.parametrize(("min_blocks", "pruned"), [(399, True), (400, True), (401, False)])
def test_min_blocks_is_the_fewest_that_are_pruned(min_blocks, pruned):
    params = {"a": leaf(390, 400), "b": leaf(1000, 1000)}
    assert ("a" in sapp.plan(params, block=20, sparsity=0.5, min_blocks=min_blocks).pruned) == pruned


def test_kernels_narrower_or_lower_than_a_block_are_pruned_in_ragged_blocks():
    result = sapp.plan({"head": leaf(2048, 10), "low": leaf(3, 1600), "few": leaf(64, 3)}, block=16, sparsity=0.9)
    assert {path: (layer.grid, layer.kept) for path, layer in result.pruned.items()} == {
        "head": ((128, 1), 12),
        "low": ((1, 100), 10),
    }
    params = {"head": jnp.asarray(np.random.default_rng(0).normal(size=(2048, 10)), jnp.float32)}
    phases = sapp.phases.custom(2, [("sparse", 2)])
    sp = sapp.magnitude(block=16, sparsity=0.9, phases=phases)
    pruned = np.asarray(sp.finalize(*sp.init(params))["head"])
    norms = np.linalg.norm(np.asarray(params["head"]).reshape(128, 160), axis=1)
    alive = pruned.reshape(128, 160).any(1)
    assert sorted(np.flatnonzero(alive)) == sorted(np.argsort(norms)[-12:])


def test_integers_may_stay_where_nothing_prunes_them():
    params = {"a": leaf(64, 64), "steps": leaf(64, 64, dtype=jnp.int32)}
    result = sapp.plan(params, block=4, sparsity=0.5, where=lambda path: path != "steps")
    assert list(result.pruned) == ["a"]


# Overrides.


def test_overrides_set_block_and_sparsity():
    result = sapp.plan(
        RESNET50,
        block=32,
        sparsity=0.9,
        overrides={
            "conv_init/kernel": {"block": (7, 8), "sparsity": 0.5},
            "*/Conv_1/kernel": {"sparsity": 0.8},
            "Dense_0/kernel": {"block": 16},
        },
    )
    assert result.pruned["conv_init/kernel"][2:6] == ((7, 8), (21, 8), 84, 0.5)
    assert result.pruned["BottleneckResNetBlock_3/Conv_1/kernel"][2:6] == ((32, 32), (36, 4), 28, 0.8)
    assert result.pruned["Dense_0/kernel"][2:6] == ((16, 16), (128, 63), 806, 0.9)
    assert result.pruned["BottleneckResNetBlock_7/Conv_2/kernel"][2:6] == ((32, 32), (8, 32), 25, 0.9)


def test_a_leafs_own_path_counts_and_then_the_first_pattern_that_matches():
    params = {"a": {"kernel": leaf(64, 64)}, "b": {"kernel": leaf(64, 64)}}
    exact, wild = {"a/kernel": {"sparsity": 0.5}}, {"*/kernel": {"sparsity": 0.75, "block": 2}}
    for overrides in (exact | wild | {"b/*": {"sparsity": 0.25}}, wild | exact):
        pruned = sapp.plan(params, block=4, sparsity=0.9, overrides=overrides).pruned
        assert (pruned["a/kernel"].sparsity, pruned["a/kernel"].block) == (0.5, (4, 4))
        assert (pruned["b/kernel"].sparsity, pruned["b/kernel"].block) == (0.75, (2, 2))


def test_own_paths_that_look_like_patterns():
    params = {name: leaf(64, 64) for name in ("w*", "w1", "w[1]")}
    overrides = {name: {"sparsity": share} for name, share in (("w*", 0.25), ("w[1]", 0.5), ("w1", 0.75))}
    pruned = sapp.plan(params, block=4, sparsity=0.9, overrides=overrides).pruned
    assert {path: layer.sparsity for path, layer in pruned.items()} == {"w*": 0.25, "w[1]": 0.5, "w1": 0.75}
    views = {"w*": "o i -> i o", "w1": "i o"}
    assert sapp.plan(params, block=4, sparsity=0.9, views=views).pruned["w1"].view is None  # i o


def test_patterns_are_those_of_a_shell_and_mind_case():
    params = {f"Conv_{i}": {"kernel": leaf(64, 64)} for i in range(4)}
    overrides = {"Conv_[01]/*": {"sparsity": 0.5}, "Conv_?/kernel": {"sparsity": 0.25}}
    pruned = sapp.plan(params, block=4, sparsity=0.9, overrides=overrides).pruned
    assert [layer.sparsity for layer in pruned.values()] == [0.5, 0.5, 0.25, 0.25]
    with pytest.raises(ValueError, match="'conv_0/kernel' matches no leaf"):
        sapp.plan(params, block=4, sparsity=0.9, overrides={"conv_0/kernel": {"sparsity": 0.5}})


# What is refused, and whether the message says what is wrong.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, r"positive integer.*got 0"),
        ({"block": (8, -1)}, r"positive integer.*got \(8, -1\)"),
        ({"block": (8, 8, 8)}, r"pair of them, got \(8, 8, 8\)"),
        ({"sparsity": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"sparsity": 90}, r"in \[0, 1\), got 90"),
        ({"sparsity": -0.1}, r"in \[0, 1\), got -0.1"),
        ({"sparsity": float("nan")}, r"in \[0, 1\), got nan"),
        ({"sparsity": 0.999}, r"sparsity 0.999 leaves no block of the 400 in hidden/kernel.*0\.997\d* there"),
        ({"min_blocks": 0}, r"min_blocks must be a whole number of at least 1, got 0"),
        ({"min_blocks": -7}, r"min_blocks must be a whole number of at least 1, got -7"),
        (
            {"min_blocks": 401},
            r"(?s)nothing to prune with block=\(20, 20\) and min_blocks=401.*"
            r"hidden/kernel \(390, 400\): fewer than 401 blocks.*out/kernel \(400, 1\): fewer than 401 blocks",
        ),
        ({"block": 512}, r"(?s)nothing to prune with block=\(512, 512\).*hidden/kernel.*fewer than 100 blocks"),
        ({"where": lambda path: "Dense" in path}, r"(?s)nothing to prune.*hidden/kernel.*excluded by `where`"),
        ({"overrides": {"hiden/kernel": {"block": 4}}}, r"'hiden/kernel' matches no leaf; nearest: 'hidden/kernel'"),
        ({"overrides": {"*/Conv_?": {"block": 4}}}, r"'\*/Conv_\?' matches no leaf"),
        (
            {"overrides": {"hidden/*": {"blok": 4}}},
            r"'hidden/\*' may set `block`, `sparsity`, `min_blocks` and `min_kept`, got \['blok'\]",
        ),
        ({"overrides": {"hidden/*": {"min_blocks": 0}}}, r"min_blocks of override 'hidden/\*' must be .* got 0"),
        ({"block": True}, r"block must be .* got True"),
        ({"min_blocks": 2.5}, "min_blocks must be a whole number of at least 1, got 2.5"),
        ({"sparsity": {"hidden": 0.5}}, r"sparsity .* got \{'hidden': 0.5\}"),
        ({"overrides": {"hidden/*": {"sparsity": 1.5}}}, r"'hidden/\*'.*in \[0, 1\), got 1.5"),
        ({"overrides": {"hidden/*": {"block": (4, 0)}}}, r"got \(4, 0\)"),
        ({"overrides": {"out/*": {"sparsity": 0.5}}}, "override 'out/\\*' changes nothing.*fewer than 100 blocks"),
    ],
    ids=problems.without_addresses,
)
def test_faulty_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_mlp(**options)


def test_without_kernels_there_is_nothing_to_prune():
    with pytest.raises(ValueError, match=r"(?s)nothing to prune.*none"):
        sapp.plan({"bias": leaf(10)}, block=1, sparsity=0.5)
    with pytest.raises(ValueError, match=r"the parameter tree has no leaves: \{\}"):
        sapp.plan({}, block=1, sparsity=0.5)


def test_the_limit_in_the_message_helps():
    """Just below the number it names the same call succeeds, also where there are many blocks."""
    for side in (10, 30, 150):
        make = functools.partial(sapp.plan, {"w": leaf(side, side)}, block=1)
        with pytest.raises(ValueError, match=f"sparsity 0.999999 leaves no block of the {side * side}") as error:
            make(sparsity=0.999999)
        limit = re.search(r"(?:below|at most) (0\.\d+) there", str(error.value))
        assert limit, error.value
        assert make(sparsity=float(limit[1]) - 1e-6).pruned["w"].kept >= 1


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool", "complex64"])
def test_kernels_that_are_not_floating_point_are_refused(dtype):
    with pytest.raises(TypeError, match=f"a/kernel has dtype {dtype}"):
        sapp.plan({"a": {"kernel": leaf(64, 64, dtype=jnp.dtype(dtype))}}, block=4, sparsity=0.5)


def test_paths_must_tell_leaves_apart():
    with pytest.raises(ValueError, match="'a/b'"):
        sapp.plan({"a": {"b": leaf(64, 64)}, "a/b": leaf(32, 32)}, block=2, sparsity=0.5)


# Paths.


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(30)(linen.Dense(20)(linen.Embed(50, 10)(x)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 20, rngs=rngs)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.layers = nnx.List([nnx.Linear(20, 30, rngs=rngs), nnx.Linear(30, 40, rngs=rngs)])


def paths(tree):
    return [layer.path for layer in sapp.plan(tree, block=1, sparsity=0.5, min_blocks=1).leaves]


def test_paths_of_linen_parameters():
    params = jax.eval_shape(Mlp().init, jax.random.key(0), jnp.ones(1, jnp.int32))
    want = ["Dense_0/bias", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel", "Embed_0/embedding"]
    assert paths(params["params"]) == want
    assert paths(params) == [f"params/{path}" for path in want]
    assert paths(flax.core.freeze(params)) == [f"params/{path}" for path in want]


def test_paths_of_nnx_state():
    state = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    want = [
        "conv/bias",
        "conv/kernel",
        "embed/embedding",
        "layers/0/bias",
        "layers/0/kernel",
        "layers/1/bias",
        "layers/1/kernel",
    ]
    assert paths(state) == want
    assert paths(nnx.to_pure_dict(state)) == want
    pruned = sapp.plan(state, block=1, sparsity=0.5, min_blocks=1).pruned
    assert list(pruned) == ["conv/kernel", "layers/0/kernel", "layers/1/kernel"]


def test_paths_of_dicts_lists_and_tuples():
    w = leaf(4, 4)
    assert paths([w, (w, {"b": w, "a": [w]})]) == ["0", "1/0", "1/1/a/0", "1/1/b"]
    assert paths({"value": w, "x": {"value": w}}) == ["value", "x/value"]
    assert paths({"none": None, "w": w}) == ["w"]


def test_map_layers_hands_each_leaf_its_layer():
    params = {"a": jnp.ones((20, 20)), "b": [jnp.zeros(3), jnp.ones((2, 2))]}
    pruned = sapp.plan(params, block=2, sparsity=0.5).pruned
    seen = map_layers(lambda layer, x, y: (layer and layer.path, x.shape, y), params, pruned, {"a": 1, "b": [2, 3]})
    assert seen == {"a": ("a", (20, 20), 1), "b": [(None, (3,), 2), (None, (2, 2), 3)]}


# The table.


def test_the_table_shows_what_is_no_vector():
    result = plan_mlp(sparsity=0.95)
    summary, space, head, rule, *lines = str(result).splitlines()
    removed = 100 * 156_000 * 0.95 / 156_400
    assert summary == (
        f"1 of 2 kernels pruned; {removed:.2f}% of 156,400 kernel weights removed (2 scalars and vectors not shown)"
    )
    assert space == ""
    assert head.split() == ["path", "shape", "block", "grid", "blocks", "kept", "pruned"]
    assert set(rule) == {"-"}
    assert {line.split()[0]: line.split(maxsplit=6)[1:] for line in lines} == {
        "hidden/kernel": ["390×400", "20×20", "20×20", "400", "20", "95.0%"],
        "out/kernel": ["400×1", "20×20", "20×1", "20", "20", "no: fewer than 100 blocks"],
    }


def test_the_table_shows_each_leaf_if_asked():
    summary, _, _, _, *lines = plan_mlp(sparsity=0.95).table(all=True).splitlines()
    assert summary.endswith("kernel weights removed")
    assert [line.split()[0] for line in lines] == ["hidden/bias", "hidden/kernel", "out/bias", "out/kernel"]
    assert lines[0].split(maxsplit=6)[1:] == ["400", "-", "-", "-", "-", "no: not a kernel (1-D)"]
    assert len({line.index(cell) for line, cell in zip(lines, ["-", "20×20", "-", "20×20"], strict=True)}) == 1


def test_hidden_are_vectors_of_stacked_layers_too_and_nothing_else():
    stacked = {"l": {"kernel": leaf(3, 30, 40), "bias": leaf(3, 40)}, "n": {"scale": leaf(3, 40)}}
    others = {"embedding": leaf(5, 4), "six": leaf(1, 1, 1, 1, 2, 2, 2)}
    tree = stacked | others | {"count": 3, "name": "net", "key": jax.random.key(0)}
    shown = [line.split()[0] for line in str(sapp.plan(tree, block=2, sparsity=0.5)).splitlines()[4:]]
    assert shown == ["embedding", "l/kernel", "six"]
    training = {"opt_state": {"mu": leaf(20, 20)}, "w": leaf(20, 20)}
    assert [*sapp.plan(training, block=2, sparsity=0.5).pruned] == ["w"]


def test_the_table_of_resnet50():
    text = str(sapp.plan(RESNET50, block=16, sparsity=0.9))
    lines, kernels = text.splitlines(), sum(len(x.shape) > 1 for x in jax.tree.leaves(RESNET50))
    assert lines[4 + kernels :][0] == ""  # then the layers of too few blocks
    assert lines[-5].endswith("Conv_2/kernel keeps 25 blocks of 8×32: no weight for at least 112 of 512 outputs")
    assert re.fullmatch(r"and \d+ more", lines[-1])
    assert re.search(r"Dense_0/kernel +2048×1000 +16×16 +128×63 +8,064 +806 +90.0%", text)
    assert text.startswith("46 of 54 kernels pruned; 89.63% of 25,502,912 kernel weights removed (107 scalars")


def test_the_table_has_a_word_for_scalars():
    plan = sapp.plan({"t": leaf(), "w": leaf(20, 20)}, block=2, sparsity=0.5)
    assert re.search(r"t +scalar", plan.table(all=True))


def test_an_override_of_no_kernel_is_refused():
    with pytest.raises(
        ValueError, match=r"override '\*/bias' changes nothing, for hidden/bias stays dense: not a kernel"
    ):
        plan_mlp(overrides={"*/bias": {"sparsity": 0.5}})


def test_an_override_may_prune_a_small_kernel():
    result = plan_mlp(overrides={"out/kernel": {"sparsity": 0.5, "min_blocks": 1}})
    assert result.pruned["out/kernel"].kept == 10


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("embedding/kernel", "embedding"),
        ("transformer/wte/weight", "embedding"),
        ("Embed_0/table", "embedding"),
        ("encoder/pos_embed", "embedding"),
        ("attention/query/lora_a", "low-rank factor"),
        ("batch_stats/BatchNorm_0/mean", "not trained: batch_stats"),
        ("EmbeddingNet_0/Dense_0/kernel", ""),
        ("user_embedding_mlp/Dense_0/kernel", ""),
        ("explorer_a/kernel", ""),
        ("model.wte.weight", "embedding"),
        ("model.embed_tokens.weight", "embedding"),  # Llama
        ("decoder.embed_positions.weight", "embedding"),
        ("attn.relative_position_bias_table", "embedding"),  # Swin
        ("SelfAttention.relative_attention_bias.weight", "embedding"),  # T5
        ("model.embed_out.weight", ""),
        ("norm.bias", "bias"),
        ("attn/attention_biases", "bias"),  # LeViT
        ("attn/q_bias", "bias"),  # BEiT
        ("debiased/kernel", ""),
        ("bias_weight", ""),
        ("vit/reg_tokens", "embedding"),
        ("cls_token", "embedding"),
        ("token_mixer/kernel", ""),
    ],
)
def test_what_a_path_says_is_no_kernel(path, reason):
    tree = functools.reduce(lambda below, key: {key: below}, reversed(path.split("/")), leaf(64, 64))
    result = sapp.plan({**tree, "other": leaf(64, 64)}, block=4, sparsity=0.5)
    made = {layer.path: layer for layer in result.leaves}
    assert (made[path].skip_reason, path in result.pruned) == (reason, not reason)
    everything = sapp.plan(tree, block=4, sparsity=0.5, where=lambda path: True)
    assert list(everything.pruned) == [path]


def test_depthwise_kernels_stay_dense():
    params = {"depthwise": leaf(5, 5, 1, 512), "pointwise": leaf(1, 1, 512, 512)}
    for options in (
        {},
        {"where": lambda path: True},
        {"views": {"*": "h w i o -> (h w i) o"}},
        {"overrides": {"*": {"sparsity": 0.7}}},
    ):
        result = sapp.plan(params, block=4, sparsity=0.5, **options)
        assert list(result.pruned) == ["pointwise"]
        assert result.leaves[0].skip_reason == "depthwise kernel, or of one input channel"
    with pytest.raises(ValueError, match=r"'depth\*' changes nothing.*depthwise kernel.*give its path instead"):
        sapp.plan(params, block=4, sparsity=0.5, overrides={"depth*": {"sparsity": 0.7}})


@pytest.mark.parametrize(
    "options", [{"views": {"depthwise": "(h w i) o"}}, {"overrides": {"depthwise": {"block": (5, 4)}}}]
)
def test_a_depthwise_kernel_is_pruned_if_its_own_path_is_given(options):
    params = {"depthwise": leaf(5, 5, 1, 512), "pointwise": leaf(1, 1, 512, 512)}
    assert len(sapp.plan(params, block=4, sparsity=0.5, **options).pruned) == 2


def test_a_view_by_pattern_tells_what_shapes_do_not():
    params = {f"layer_{i}": {"to_keys": leaf(512, 1, 64)} for i in range(2)}
    with pytest.raises(ValueError, match=r"(?s)nothing to prune.*depthwise"):
        sapp.plan(params, block=8, sparsity=0.5)
    assert len(sapp.plan(params, block=8, sparsity=0.5, views={"*/to_keys": "d (h k)"}).pruned) == 2


def test_three_dimensional_kernels_of_one_head_are_no_depthwise_ones():
    assert list(sapp.plan({"key": leaf(512, 1, 64)}, block=8, sparsity=0.5).pruned) == ["key"]


def test_a_predicate_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"where must be a predicate on the path of a leaf.*got 'hidden'"):
        plan_mlp(where="hidden")


def test_an_algorithm_plans_each_tree_once():
    asked = []

    def where(path):
        asked.append(path)
        return path.endswith("kernel")

    sp = sapp.magnitude(block=4, sparsity=0.5, phases=sapp.phases.magnitude(10), min_blocks=1, where=where)
    small, large = {"kernel": jnp.ones((8, 8))}, {"kernel": jnp.ones((8, 16))}
    assert sp.plan(small) == sp.plan({"kernel": leaf(8, 8)})
    count = len(asked)
    sp.apply(*sp.init(small))
    assert len(asked) == count
    assert sp.plan(large).pruned["kernel"].blocks == 8
    with pytest.raises(TypeError, match="kernel has dtype int32"):  # the dtype is part of what is remembered
        sp.plan({"kernel": leaf(8, 8, dtype=jnp.int32)})
    assert set(sp.plan({"a": small}).pruned) == {"a/kernel"}


def test_remembered_plans_keep_no_array_alive():
    sp = sapp.magnitude(block=4, sparsity=0.5, phases=sapp.phases.magnitude(10), min_blocks=1)
    kernel = jnp.ones((8, 8))
    sp.plan({"kernel": kernel})
    alive = weakref.ref(kernel)
    del kernel
    gc.collect()
    assert alive() is None


# Layers of few blocks.

LENET = {"a": leaf(64, 96), "b": leaf(96, 64), "last": leaf(64, 10)}


def test_a_plan_that_cuts_outputs_off_is_said_once_with_the_numbers():
    make = planner(block=8, sparsity=0.95, min_blocks=17, min_kept=0)
    text = r"^outputs without any weight are constant: a keeps 4 blocks of 8×12: no weight for at least 64 of its 96 "
    text += r"outputs; b keeps 4 blocks of 12×8: .* 32 of its 64 outputs\. Set min_kept=\"outputs\" there"
    with pytest.warns(UserWarning, match=text) as warned:
        plan = make(LENET)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        assert make(LENET) is plan
    assert plan.pruned["a"].cut_off == (32, 64)
    assert "\na keeps 4 blocks of 8×12: no weight for at least 64 of 96 outputs\n" in str(plan)
    assert str(plan).endswith("b keeps 4 blocks of 12×8: no weight for at least 64 of 96 rows")


@pytest.mark.parametrize("init", [lambda sp: sp.init, lambda sp: jax.jit(sp.init)], ids=["plain", "jit"])
def test_the_warning_points_at_the_line_that_called_an_algorithm(init):
    sp = sapp.magnitude(block=8, sparsity=0.95, min_blocks=17, phases=sapp.phases.magnitude(10))
    params = {path: jnp.ones(x.shape) for path, x in LENET.items()}
    with pytest.warns(UserWarning, match="outputs without any weight are constant") as warned:
        init(sp)(params)
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_blocks_are_whole_rows_or_columns():
    for block in ((1, None), (None, 1)):
        sapp.plan({"w": leaf(40, 30), "v": leaf(30, 10)}, block=block, sparsity=0.9, min_blocks=10)


@hypothesis.given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    block=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    percent=st.integers(0, 99),
    min_kept=st.integers(0, 30) | st.just("outputs"),
)
def test_a_layer_keeps_what_it_is_to_keep_at_least(rows, cols, block, percent, min_kept):
    """And no output is cut off by `outputs`; what a mask can do at best, `cut_off` counts."""
    down, across = len(range(0, rows, block[0])), len(range(0, cols, block[1]))
    floor = down * across * (100 - percent) // 100
    least = across if min_kept == "outputs" else min(min_kept, down * across)
    hypothesis.assume(max(floor, least))
    options = {"block": block, "sparsity": float(f"0.{percent:02}"), "min_blocks": 1, "min_kept": min_kept}
    layer = sapp.plan({"w": leaf(rows, cols)}, **options).pruned["w"]
    assert layer.kept == max(floor, least)
    assert layer.sparsity == (options["sparsity"] if floor >= least else 1 - layer.kept / layer.blocks)
    widest = sorted((min(block[1], cols - j) for j in range(0, cols, block[1])), reverse=True)
    assert layer.cut_off[1] == (sum(widest[layer.kept :]) if down > 1 else 0)
    if min_kept == "outputs":
        assert layer.cut_off[1] == 0


def test_last_layers_keep_a_block_for_each_output():
    found = sapp.plan(LENET, block=(8, 4), sparsity=0.9, min_blocks=10).pruned
    assert {path: (layer.min_kept, layer.kept) for path, layer in found.items()} == {
        "a": (0, 19),
        "b": (0, 19),
        "last": ("outputs", 3),
    }
    assert found["last"].sparsity == 1 - 3 / 24
    others = sapp.plan(LENET, block=(8, 4), sparsity=0.9, min_blocks=10, overrides={"last": {"min_kept": 0}})
    assert (others.pruned["last"].kept, others.pruned["last"].sparsity) == (2, 0.9)
    for alone in ({"w": leaf(64, 10)}, {"w": leaf(64, 10), "back": leaf(10, 64)}):
        plan = sapp.plan(alone, block=(8, 4), sparsity=0.9, min_blocks=10)
        assert {layer.min_kept for layer in plan.pruned.values()} == {0}


@pytest.mark.parametrize("min_kept", [-1, 1.5, "rows", True])
def test_a_faulty_number_of_blocks_to_keep_is_refused(min_kept):
    with pytest.raises(ValueError, match=r'min_kept must be a number of blocks of at least 0, or "outputs", got'):
        sapp.plan(LENET, block=8, sparsity=0.5, min_blocks=1, min_kept=min_kept)
    with pytest.raises(ValueError, match=r"min_kept of override 'a' must be"):
        sapp.plan(LENET, block=8, sparsity=0.5, min_blocks=1, overrides={"a": {"min_kept": min_kept}})


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", ["rigl", "gradual_magnitude", "sequential_attention"])
def test_algorithms_keep_a_block_for_each_output(name, scope):
    """Though all others are larger; in each of the matrices of a stack, and while blocks are replaced."""
    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(size=(2, 24, 20)) * [[[1]], [[1e-2]]],
        "b": rng.normal(size=(20, 24)) * 10,
        "last": rng.normal(size=(24, 10)) * 1e-3 * (np.arange(10) < 6),
    }
    params = {path: jnp.asarray(x, jnp.float32) for path, x in params.items()}
    own = {"score": "effective"} if name == "sequential_attention" else {}
    own |= {"mask_every": 1, "fraction": 0.9} if name == "rigl" else {}
    phases = (sapp.phases.rigl if name == "rigl" else sapp.phases.finetune)(8)
    own |= {"block": 4, "sparsity": 0.8, "min_blocks": 1, "scope": scope, "overrides": {"a": {"min_kept": 7}}}
    sp = sapp.ALGORITHMS[name].make(phases=phases, views={"a": "[l] i o"}, **own)
    (trainable, prune), update = jax.jit(sp.init)(params), jax.jit(sp.update)
    for step in range(8):
        updates = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 1e-3, x.dtype), trainable)
        trainable, prune = update(trainable, prune, updates, updates)
        masks = {path: np.asarray(mask) for path, mask in prune.masks.items()}
        assert masks["last"].any(0).all(), step
        assert (masks["a"].sum((1, 2)) >= 7).all(), step
    assert sum(mask.sum() for mask in masks.values()) == sum(layer.kept for layer in sp.plan(params).pruned.values())
    if scope == "global" and name != "rigl":
        assert masks["last"].sum() == 3  # no more than one for each
