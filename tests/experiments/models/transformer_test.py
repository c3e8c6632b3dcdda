"""Transformers: shapes, what each position sees, loops over layers, dropout, what is pruned; published weights."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import sa_plus_plus as sapp
from experiments.models import Decoder, LeNet300, ViT, costs
from sa_plus_plus.contrib.transformers import checkpoints
from sa_plus_plus.contrib.transformers.encoder import Bert

SIZES = {"layers": 2, "width": 16, "hidden": 24, "heads": 2}
DECODER = Decoder(vocabulary=50, context=12, **SIZES)
BERT = Bert(vocabulary=50, context=12, classes=3, **SIZES)
VIT = ViT(classes=3, patch=4, **SIZES)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))
TYPES = np.random.default_rng(1).integers(0, 2, (2, 12))
REAL = np.arange(12)[None] < np.array([[12], [7]])
IMAGES = np.random.default_rng(2).standard_normal((2, 8, 12, 3)).astype(np.float32)


@functools.cache
def apply(model):
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


def shapes(model, *inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def drawn(model, *inputs):
    """Parameters that are nowhere zero."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes(model, *inputs))


def scanned(params):
    """The same with the layers' parameters stacked."""
    layers = [params[f"layer{i + 1}"] for i in range(SIZES["layers"])]
    rest = {name: value for name, value in params.items() if not name.startswith("layer")}
    return {**rest, "layers": jax.tree.map(lambda *x: np.stack(x), *layers)}


@pytest.mark.usefixtures("standard_promotion")  # flax computes statistics of bfloat16 in float32
def test_the_outputs_have_the_shapes_that_are_said():
    for model, inputs, shape in (
        (DECODER.clone(dtype="bfloat16", tied=False), (TOKENS,), (2, 12, 50)),
        (BERT.clone(dtype="bfloat16"), (TOKENS, TYPES, REAL), (2, 3)),
        (BERT.clone(classes=0), (TOKENS,), (2, 12, 16)),
        (VIT.clone(dtype="bfloat16", class_token=False, scan=True), (IMAGES,), (2, 3)),
    ):
        variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
        result = jax.eval_shape(model.apply, variables, *inputs)
        assert (result.shape, result.dtype) == (shape, jnp.float32)


def test_a_later_token_changes_no_earlier_logit():
    params = drawn(DECODER, TOKENS)
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = (np.asarray(apply(DECODER)(params, tokens)) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(axis=(0, 2)).all()


@pytest.mark.parametrize(("model", "inputs"), [(DECODER, TOKENS), (VIT, IMAGES)], ids=["Decoder", "ViT"])
def test_a_loop_over_layers_computes_what_the_layers_do(model, inputs):
    looped, params = model.clone(scan=True), drawn(model, inputs)
    chex.assert_trees_all_equal_shapes(scanned(params), shapes(looped, inputs))
    chex.assert_trees_all_close(apply(looped)(scanned(params), inputs), apply(model)(params, inputs), atol=1e-5)
    one = inputs[:1]
    each, stacked = (costs.multiply_adds(m, {"params": shapes(m, one)}, one) for m in (model, looped))
    assert stacked["layers/up/kernel"] == 2 * each["layer1/up/kernel"]
    assert sum(stacked.values()) == sum(each.values())


def test_the_layers_of_a_loop_begin_differently():
    up = jax.jit(DECODER.clone(scan=True).init)(jax.random.key(0), TOKENS)["params"]["layers"]["up"]["kernel"]
    assert up.shape == (2, 16, 24)
    assert not np.any(up[0] == up[1])


def test_dropout_is_for_training():
    model, params = DECODER.clone(dropout=0.5), drawn(DECODER, TOKENS)

    @jax.jit
    def trained(key):
        return model.apply({"params": params}, TOKENS, training=True, rngs={"dropout": key})

    first, second = (np.asarray(trained(jax.random.key(i))) for i in range(2))
    assert np.any(first != second)
    np.testing.assert_array_equal(first, trained(jax.random.key(0)))
    np.testing.assert_array_equal(apply(model)(params, TOKENS), apply(DECODER)(params, TOKENS))


def test_the_kernels_of_the_layers_are_pruned_and_embeddings_are_not():
    phases = sapp.phases.magnitude(100)
    for model, inputs in ((DECODER, TOKENS), (BERT, TOKENS), (VIT, IMAGES)):
        plan = sapp.magnitude(block=4, sparsity=0.5, phases=phases, min_blocks=5).plan(shapes(model, inputs))
        names = ("query", "key", "value", "out", "up", "down")
        kernels = [f"layer{i}/{name}/kernel" for i in (1, 2) for name in names]
        pooler = ["pooler/kernel"] if model is BERT else []
        assert sorted(plan.pruned) == sorted(kernels + pooler)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (DECODER.clone(context=11), TOKENS, "a sequence of 12 tokens is longer than the model's context of 11"),
        (DECODER.clone(heads=3), TOKENS, "must be a multiple of the number of heads, got width=16, heads=3"),
        (VIT.clone(patch=5), IMAGES, "patches of 5 pixels do not tile images of 8 x 12"),
    ],
)
def test_sizes_that_do_not_fit_are_said(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        shapes(model, inputs)


# Published weights: random ones in Hugging Face's layout, and forward passes written with NumPy alone.


def tensors(wanted):
    """A tensor for each name and shape: near 1 where layer normalisation multiplies by it."""
    rng = np.random.default_rng(4)
    near = {name: 1.0 if re.search(r"(ln_.|[Nn]orm\w*)\.(weight|gamma)", name) else 0.0 for name in wanted}
    return {name: rng.normal(near[name], 0.3, shape).astype(np.float32) for name, shape in wanted.items()}


def layer_shapes(prefix, names, outputs_first=True):
    result = {}
    for name, (inputs, outputs) in names.items():
        kernel = (outputs, inputs) if outputs_first else (inputs, outputs)
        result |= {f"{prefix}{name}.weight": kernel, f"{prefix}{name}.bias": (outputs,)}
    return result


def norm_shapes(*names, ends=("weight", "bias")):
    return {f"{name}.{end}": (SIZES["width"],) for name in names for end in ends}


@functools.cache
def gpt2():
    wanted = {"wte.weight": (50, 16), "wpe.weight": (12, 16), **norm_shapes("ln_f")}
    for i in range(2):
        dense = {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 24), "mlp.c_proj": (24, 16)}
        wanted |= layer_shapes(f"h.{i}.", dense, outputs_first=False) | norm_shapes(f"h.{i}.ln_1", f"h.{i}.ln_2")
        wanted[f"h.{i}.attn.bias"] = (1, 1, 12, 12)  # a mask, of which the model has no need
    return tensors(wanted)


@functools.cache
def bert():
    e = "bert.embeddings."
    wanted = {f"{e}word_embeddings.weight": (50, 16), f"{e}position_embeddings.weight": (12, 16)}
    wanted |= {f"{e}token_type_embeddings.weight": (2, 16), **norm_shapes(f"{e}LayerNorm", ends=("gamma", "beta"))}
    for i in range(2):
        dense = {f"attention.self.{name}": (16, 16) for name in ("query", "key", "value")}
        dense |= {"attention.output.dense": (16, 16), "intermediate.dense": (16, 24), "output.dense": (24, 16)}
        wanted |= layer_shapes(f"bert.encoder.layer.{i}.", dense)
        wanted |= norm_shapes(*(f"bert.encoder.layer.{i}.{n}.LayerNorm" for n in ("attention.output", "output")))
    return tensors(wanted | layer_shapes("", {"bert.pooler.dense": (16, 16), "classifier": (16, 3)}))


@functools.cache
def vit():
    e = "vit.embeddings."
    wanted = {f"{e}cls_token": (1, 1, 16), f"{e}position_embeddings": (1, 7, 16)}
    wanted |= {f"{e}patch_embeddings.projection.weight": (16, 3, 4, 4), f"{e}patch_embeddings.projection.bias": (16,)}
    for i in range(2):
        dense = {f"attention.attention.{name}": (16, 16) for name in ("query", "key", "value")}
        dense |= {"attention.output.dense": (16, 16), "intermediate.dense": (16, 24), "output.dense": (24, 16)}
        wanted |= layer_shapes(f"vit.encoder.layer.{i}.", dense)
        wanted |= norm_shapes(*(f"vit.encoder.layer.{i}.layernorm_{n}" for n in ("before", "after")))
    wanted |= norm_shapes("vit.layernorm") | {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    return tensors(wanted)


def normalised(x, scale, bias, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias


def mixed(q, k, v, seen):
    """Attention by two heads of one example; `seen[i, j]`: whether i sees j."""
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(8)) * seen
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
    return np.concatenate(heads, axis=-1)


def exact_gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def gpt2_by_hand(t, tokens):
    x = t["wte.weight"][tokens] + t["wpe.weight"]
    for i in range(2):
        p = {name.removeprefix(f"h.{i}."): a for name, a in t.items()}
        y = normalised(x, p["ln_1.weight"], p["ln_1.bias"], 1e-5) @ p["attn.c_attn.weight"] + p["attn.c_attn.bias"]
        y = mixed(y[:, :16], y[:, 16:32], y[:, 32:], np.tri(12))
        x = x + y @ p["attn.c_proj.weight"] + p["attn.c_proj.bias"]
        y = normalised(x, p["ln_2.weight"], p["ln_2.bias"], 1e-5) @ p["mlp.c_fc.weight"] + p["mlp.c_fc.bias"]
        y = y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
        x = x + y @ p["mlp.c_proj.weight"] + p["mlp.c_proj.bias"]
    return normalised(x, t["ln_f.weight"], t["ln_f.bias"], 1e-5) @ t["wte.weight"].T


def bert_by_hand(t, tokens, types, real):
    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    e = "bert.embeddings."
    x = t[f"{e}word_embeddings.weight"][tokens] + t[f"{e}position_embeddings.weight"]
    x = x + t[f"{e}token_type_embeddings.weight"][types]
    x = normalised(x, t[f"{e}LayerNorm.gamma"], t[f"{e}LayerNorm.beta"], 1e-12)
    for i in range(2):
        here = f"bert.encoder.layer.{i}."
        q, k, v = (dense(x, f"{here}attention.self.{name}") for name in ("query", "key", "value"))
        x = x + dense(mixed(q, k, v, np.tile(real, (12, 1))), f"{here}attention.output.dense")
        norm = f"{here}attention.output.LayerNorm"
        x = normalised(x, t[f"{norm}.weight"], t[f"{norm}.bias"], 1e-12)
        x = x + dense(exact_gelu(dense(x, f"{here}intermediate.dense")), f"{here}output.dense")
        x = normalised(x, t[f"{here}output.LayerNorm.weight"], t[f"{here}output.LayerNorm.bias"], 1e-12)
    return dense(np.tanh(dense(x[0], "bert.pooler.dense")), "classifier")


def vit_by_hand(t, image):
    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        return normalised(x, t[f"{name}.weight"], t[f"{name}.bias"], 1e-12)

    e = "vit.embeddings."
    patches = [image[r : r + 4, c : c + 4].transpose(2, 0, 1).ravel() for r in (0, 4) for c in (0, 4, 8)]
    kernel = t[f"{e}patch_embeddings.projection.weight"].reshape(16, -1)
    x = np.stack(patches) @ kernel.T + t[f"{e}patch_embeddings.projection.bias"]
    x = np.concatenate([t[f"{e}cls_token"][0], x]) + t[f"{e}position_embeddings"][0]
    for i in range(2):
        here = f"vit.encoder.layer.{i}."
        y = norm(x, f"{here}layernorm_before")
        q, k, v = (dense(y, f"{here}attention.attention.{name}") for name in ("query", "key", "value"))
        x = x + dense(mixed(q, k, v, np.ones((7, 7))), f"{here}attention.output.dense")
        y = exact_gelu(dense(norm(x, f"{here}layernorm_after"), f"{here}intermediate.dense"))
        x = x + dense(y, f"{here}output.dense")
    return dense(norm(x, "vit.layernorm")[0], "classifier")


PUBLISHED = {
    "GPT-2": (DECODER, gpt2, gpt2_by_hand, (TOKENS,), "transformer."),
    "BERT": (BERT, bert, bert_by_hand, (TOKENS, TYPES, REAL), "bert."),
    "ViT": (VIT, vit, vit_by_hand, (IMAGES,), "vit."),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_give_what_a_plain_forward_pass_does(name, tmp_path):
    model, stored, by_hand, inputs, prefix = PUBLISHED[name]
    path, bare = tmp_path / "model.safetensors", {n.removeprefix(prefix): a for n, a in stored().items()}
    save_file(bare, path)
    params = checkpoints.load(path, model, shapes(model, *inputs))
    double = {name: a.astype(np.float64) for name, a in stored().items()}
    want = np.stack([by_hand(double, *example) for example in zip(*inputs, strict=True)])
    np.testing.assert_allclose(apply(model)(params, *inputs), want, atol=2e-5)
    looped = checkpoints.load(path, model, shapes(model.clone(scan=True), *inputs))
    chex.assert_trees_all_equal(looped, scanned(params))
    save_file({(n if n.startswith("classifier") else prefix + n): a for n, a in bare.items()}, path)
    chex.assert_trees_all_equal(checkpoints.load(path, model, params), params)


@pytest.mark.parametrize("name", PUBLISHED)
def test_changed_parameters_are_written_back(name, tmp_path):
    model, stored, _, inputs, prefix = PUBLISHED[name]
    source, new = tmp_path / "model.safetensors", tmp_path / "new.safetensors"
    bare = {n.removeprefix(prefix): a.astype(np.float16) for n, a in stored().items()} | {"other": np.arange(3)}
    save_file(bare, source, {"format": "pt"})
    params = checkpoints.load(source, model, shapes(model, *inputs))
    layers = {n: jax.tree.map(lambda x: x / 2, part) for n, part in params.items() if n.startswith("layer")}
    checkpoints.save(new, source, model, layers)
    chex.assert_trees_all_equal(checkpoints.load(new, model, params), params | layers)
    with safe_open(new, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert found.keys() == bare.keys()
    halved = re.compile(r"(h|encoder\.layer)\.\d\.(?!attn\.bias)")  # GPT-2's mask is no parameter
    for n, before in bare.items():
        np.testing.assert_array_equal(found[n], before / np.float16(2) if halved.match(n) else before, n)
    content = new.read_bytes()
    checkpoints.save(new, source, model, {"layers": scanned(layers)["layers"]})
    assert new.read_bytes() == content


def test_a_file_that_does_not_fit_is_said(tmp_path):
    path, like = tmp_path / "model.safetensors", shapes(DECODER, TOKENS)

    def refused(stored, message, model=DECODER, params=like):
        save_file(stored, path)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            checkpoints.load(path, model, params)
        assert str(path) in str(caught.value) or model is not DECODER

    without = {name: a for name, a in gpt2().items() if name != "h.1.mlp.c_fc.bias"}
    refused(
        without,
        "has no tensor h.1.mlp.c_fc.bias: layer2/up/bias of the model, (24,), takes one of shape (24,)",
    )
    refused(
        gpt2() | {"h.0.attn.c_attn.weight": np.zeros((16, 51), np.float32)},
        "has a tensor h.0.attn.c_attn.weight of shape (16, 51): layer1/key/kernel of the model, (16, 16), takes one of "
        "shape (16, 48)",
    )
    refused(gpt2(), "has more layers than the model, which has 1", DECODER.clone(layers=1))
    untied = DECODER.clone(tied=False)
    refused(gpt2(), "has no tensor for it: head/bias of the model, (50,)", untied, shapes(untied, TOKENS))
    refused(gpt2(), "no published weights are known for LeNet300, only for Decoder, Bert, ViT", LeNet300())
    path.write_bytes(b"nothing")
    for wrong in (path, tmp_path / "nowhere.safetensors"):
        with pytest.raises(ValueError, match=f"{wrong} cannot be read as a safetensors file"):
            checkpoints.load(wrong, DECODER, like)
