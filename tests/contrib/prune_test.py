"""The command that prunes published transformers: what comes out, in whose hands, resuming, and bad input."""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import sa_plus_plus as sapp
from sa_plus_plus.__main__ import main

pytest.importorskip("tokenizers")
import published_models
from published_models import KERNELS, LAYER, LAYERS, LINES

from sa_plus_plus.contrib.prune import files, page, pipeline, training
from sa_plus_plus.contrib.transformers import directories, images

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One size of batches, and nothing is timed."""
    monkeypatch.setattr(page, "BATCHES", (1,))
    monkeypatch.setattr(page.timing, "alternate", lambda calls, rounds: {name: [1e-3] for name in calls})
    monkeypatch.setattr(page.sapp, "specialize", functools.partial(sapp.specialize, mode="always"))


def prune(folder, output, *options, sparsity=0.5, block="4,4"):
    main(["prune", str(folder), f"--output={output}", f"--sparsity={sparsity}", f"--block={block}", *map(str, options)])
    return output


def text(folder):
    file = folder / "lines.txt"
    file.write_text("\n".join(LINES))
    return f"--text={file}"


def draw(folder):
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (30, 11, 13, 3)).astype(np.uint8)):
        image.fromarray(pixels).save(folder / f"{number}.png")
    return f"--images={folder}"


def read(folder):
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a dict


def kept_blocks(matrix, side=4):
    rows, columns = matrix.shape
    return np.abs(matrix.reshape(rows // side, side, columns // side, side)).max((1, 3)) > 0


def check_tensors(kind, before, after):
    """Half of the blocks of each kernel are left, and what is no part of a layer is as it was."""
    (old, metadata), (new, new_metadata) = read(before), read(after)
    assert metadata == new_metadata == {"format": "pt"}
    assert {n: (x.shape, x.dtype) for n, x in old.items()} == {n: (x.shape, x.dtype) for n, x in new.items()}
    for name in old:
        if not any(name.startswith(LAYER[kind].format(i)) for i in range(LAYERS)):
            np.testing.assert_array_equal(new[name], old[name], name)
    for i in range(LAYERS):
        for name in KERNELS[kind]:
            kernel = new[f"{LAYER[kind].format(i)}{name}.weight"].astype(np.float32)
            parts = np.split(kernel, 3, 1) if name == "attn.c_attn" else [kernel]
            assert [kept_blocks(part).mean() for part in parts] == [0.5] * len(parts), name


def torch_output(kind, folder, served_inputs):
    """What transformers or sentence-transformers computes with the pruned directory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        if kind == "vit":
            model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
            return model(torch.tensor(served_inputs[0].transpose(0, 3, 1, 2))).logits.numpy()
        tokens = torch.tensor(served_inputs[0].astype(np.int64))
        if kind == "gpt2":
            return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()(tokens).logits.numpy()
        mask = torch.arange(tokens.shape[1])[None] < torch.tensor(served_inputs[1])[:, None]
        model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
        return model(tokens, attention_mask=mask.long()).last_hidden_state.numpy()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_what_comes_out(kind, tmp_path, capsys):
    dense = published_models.write(tmp_path / "dense", kind, **({"dtype": np.float16} if kind == "bert" else {}))
    (dense / "README.md").write_text("A model.")
    (dense / "onnx").mkdir()
    (dense / "onnx" / "model.onnx").write_bytes(b"dense weights")
    options = [draw(tmp_path / "images")] if kind == "vit" else ["--length=12", text(tmp_path)]
    pruned = prune(dense, tmp_path / "deep" / "pruned", "--steps=40", "--learning-rate=1e-2", *options)
    said = capsys.readouterr().out
    check_tensors(kind, dense, pruned)
    assert (pruned / "README.md").read_text() == "A model."
    assert (pruned / "config.json").read_bytes() == (dense / "config.json").read_bytes()
    assert not (pruned / "onnx" / "model.onnx").exists()
    assert not files.unfinished(pruned).exists()
    new = pruned / files.REPORT
    assert all((new / name).read_bytes()[:4] == b"\x89PNG" for name in (page.BLOCKS, page.SPEED))
    report, result = (new / page.PAGE).read_text(), json.loads((new / "result.json").read_text())
    assert "onnx/model.onnx" in report
    assert "50% of the blocks of 4 × 4 removed" in report
    assert f"python -m sa_plus_plus prune {dense} --output={pruned}" in report
    assert {"bert": "how many of each row are real", "gpt2": "12 tokens a row", "vit": "images"}[kind] in report
    names = {"bert": "cosine to the dense network", "gpt2": "perplexity", "vit": "same class"}
    assert result["quality"][0]["name"] == names[kind]
    assert sum(result["kept"].values()) * 2 == sum(result["blocks"].values())
    assert "step 40 of 40: 50.0% pruned" in said
    rng = np.random.default_rng(1)
    if kind == "vit":
        inputs = (rng.normal(size=(1, 8, 8, 3)).astype(np.float32),)
    else:
        inputs = (rng.integers(4, 30, (1, 12), np.int32), np.array([9], np.int32))[: 1 + (kind == "bert")]
    got, want = np.asarray(sapp.serve.load(new / page.SERVED)(*inputs)), torch_output(kind, pruned, inputs)
    real = slice(9) if kind == "bert" else slice(None)
    np.testing.assert_allclose(got[:, real], want[:, real], atol=2e-5)


def test_vit_without_images_keeps_the_largest_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "served", lambda *_: [page.Speed(1, 2.0, 1.0)])
    dense = published_models.write(tmp_path / "dense", "vit")
    pruned = prune(dense, tmp_path / "pruned", "--steps=0")
    check_tensors("vit", dense, pruned)
    (old, _), (new, _) = read(dense), read(pruned)
    name = f"{LAYER['vit'].format(0)}intermediate.dense.weight"
    norms = np.linalg.norm(old[name].reshape(8, 4, 4, 4), axis=(1, 3))
    np.testing.assert_array_equal(kept_blocks(new[name]), norms >= np.sort(norms.ravel())[16])
    assert "Not measured: no examples were given" in (pruned / files.REPORT / page.PAGE).read_text()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_transformers_load_it(pooling, tmp_path):
    dense = published_models.write(tmp_path / "dense", "bert", pooling=pooling)
    pruned = prune(dense, tmp_path / "pruned", "--steps=0", text(tmp_path))
    check_tensors("bert", dense, pruned)
    result = json.loads((pruned / files.REPORT / "result.json").read_text())
    assert [m["name"][:6] for m in result["quality"]] == ["cosine", "cosine", "the 10"]
    library = pytest.importorskip("sentence_transformers")
    want = library.SentenceTransformer(str(pruned), device="cpu").encode(["a b c d", LINES[8]])
    network = sapp.serve.load(pruned / files.REPORT / page.SERVED)
    tokenizer = published_models.tokenizers.Tokenizer.from_file(str(pruned / "tokenizer.json"))
    tokenizer.enable_truncation(12)
    for line, embedding in zip(["a b c d", LINES[8]], want, strict=True):
        ids = tokenizer.encode(line).ids
        tokens = np.zeros((1, 12), np.int32)
        tokens[0, : len(ids)] = ids
        np.testing.assert_allclose(network(tokens, np.array([len(ids)], np.int32))[0], embedding, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 12])
def test_the_same_command_goes_on(steps, tmp_path, monkeypatch, capsys):
    for what in ("quality", "_report"):  # not what is tested here
        monkeypatch.setattr(pipeline, what, lambda *_: [])
    monkeypatch.setattr(page, "served", lambda *_: [page.Speed(1, 2.0, 1.0)])
    dense = published_models.write(tmp_path / "dense", "bert", pooling="mean")
    options = [f"--steps={steps}", text(tmp_path)]
    whole = prune(dense, tmp_path / "whole", *options)
    monkeypatch.setattr(training, "SHOWN_EVERY", 0)
    monkeypatch.setattr(training, "SAVED_EVERY", -1)
    save, saved = sapp.save, []

    def interrupted(*arguments):
        save(*arguments)
        saved.append(arguments)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.sapp, "save", interrupted)
    with pytest.raises(SystemExit, match="130"):
        prune(dense, tmp_path / "pruned", *options)
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "pruned").exists()
    with pytest.raises(SystemExit, match="2"):
        prune(dense, tmp_path / "pruned", *options, sparsity=0.75)
    assert "has unfinished work with --sparsity 0.5, and this is with 0.75" in capsys.readouterr().err
    pruned = prune(dense, tmp_path / "pruned", *options)
    said = capsys.readouterr().out
    assert ("going on from step 5 of 12" if steps else "going on after 5 of 6 kernels") in said
    assert (pruned / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def refused(capsys, *arguments):
    """What the command says, in one sentence, before anything is made."""
    with pytest.raises(SystemExit, match="2"):
        main(["prune", *map(str, arguments)])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_what_is_not_supported_is_said(tmp_path, capsys):
    lines, image = text(tmp_path), tmp_path / "images" / "one.png"
    image.parent.mkdir()
    image.write_bytes(b"no image")
    output = tmp_path / "new"
    fixed = [f"--output={output}", "--sparsity=0.5", "--block=4", "--steps=10"]
    bert, vit = (published_models.write(tmp_path / kind, kind) for kind in ("bert", "vit"))

    def changed(kind="bert", **changes):
        return published_models.write(tmp_path / "-".join(changes), kind, **changes)

    def without(name, source=bert, write=None):
        copy = tmp_path / f"without {name}"
        shutil.copytree(source, copy)
        (copy / name).unlink()
        if write:
            (copy / write).write_text("{}")
        return copy

    empty, single = tmp_path / "empty.txt", tmp_path / "single.txt"
    empty.write_text("\n\n")
    single.write_text("a b\na b\n")
    dense = published_models.write(tmp_path / "other", "bert", pooling="mean")
    modules = json.loads((dense / "modules.json").read_text())
    (dense / "modules.json").write_text(json.dumps([*modules, {"path": "3_Dense", "type": "models.Dense"}]))
    weighted = published_models.write(tmp_path / "weighted", "bert", pooling="mean")
    (weighted / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    small = published_models.write(tmp_path / "small", "bert", vocab_size=7)
    deep, wrong = published_models.write(tmp_path / "deep", "bert", layers=2, num_hidden_layers=1), []
    for arguments, said in (
        ([tmp_path / "nowhere", lines], "nowhere is no directory"),
        ([image.parent, lines], "is no directory of a published transformer: it has no file config.json"),
        ([without("config.json"), lines], "has no file config.json"),
        ([without("model.safetensors", write="pytorch_model.bin"), lines], "has its weights in PyTorch's format alone"),
        ([without("tokenizer.json"), lines], "has no tokenizer: there is no file tokenizer.json"),
        ([changed(model_type="roberta"), lines], "has model_type 'roberta'; the architectures that are supported are"),
        ([changed(hidden_act="relu"), lines], "has hidden_act 'relu'; only 'gelu' or"),
        ([changed(position_embedding_type="relative_key"), lines], "only 'absolute' is supported"),
        ([changed("gpt2", activation_function="silu"), lines], "has activation_function 'silu'"),
        ([changed(hidden_size="wide"), lines], "has no number 'hidden_size'"),
        ([deep, lines], "has more layers than the model, which has 1"),
        ([changed(intermediate_size=36), lines], "layer1/down/kernel of the model, (36, 16)"),
        ([dense, lines], "modules.json has a module Dense; those that are supported are Transformer, Pooling"),
        ([weighted, lines], "asks for the pooling pooling_mode_weightedmean_tokens; supported are the mean"),
        ([small, lines], "tokenizer.json has 30 different tokens, and the network 7"),
        ([bert], "--text is missing"),
        ([bert, "--text=nowhere.txt"], "nowhere.txt cannot be read as text"),
        ([bert, f"--text={empty}"], "has no lines with text"),
        ([bert, f"--text={single}"], "has 1 example, and two are needed"),
        ([bert, lines, "--length=17"], "a length of 17 tokens is out of range: the context of the network in"),
        ([bert, lines, "--images=x"], "is of no use for a network of text"),
        ([bert, lines, "--sparsity=1.5"], "must be in [0, 1), got 1.5"),
        ([bert, lines, "--block=16", "--sparsity=0.9"], "leaves no block of the 2 in layer1"),
        ([bert, lines, "--block=4,a"], "argument --block: invalid block value: '4,a'"),
        ([bert, lines, "--steps=-1"], "argument --steps: invalid number value"),
        ([bert, lines, "--steps=1"], "steps"),
        ([bert, lines, f"--output={bert}"], "is the directory of the dense network or in it"),
        ([bert, lines, f"--output={bert / 'new'}"], "is the directory of the dense network or in it"),
        ([bert, lines, f"--output={tmp_path}"], "is already there"),
        ([bert, lines, "--output=/proc/new"], "/proc/new.unfinished"),
        ([vit, lines], "is of no use for ViT, whose inputs are images"),
        ([vit], "--images is missing: a folder of images to learn from; or --steps=0"),
        ([vit, f"--images={bert}"], "has no images"),
        ([vit, f"--images={image.parent}"], f"{image} cannot be read as an image"),
    ):
        options = [one for one in fixed if not any(str(a).startswith(one.split("=")[0] + "=") for a in arguments)]
        found = refused(capsys, *arguments, *options)
        if said not in found or output.exists() or files.unfinished(output).exists():
            wrong.append((said, found))
    assert not wrong


def test_unfinished_work_of_another_version_or_process_is_said(tmp_path, capsys):
    dense, output = published_models.write(tmp_path / "dense", "vit"), tmp_path / "new"
    work = files.unfinished(output)
    work.mkdir()
    for content, said in (
        ('{"format": 99}', "run.json is of another version of this command: delete"),
        ("{", "run.json cannot be read"),
    ):
        (work / "run.json").write_text(content)
        options = [f"--output={output}", "--sparsity=0.5", "--block=4", "--steps=0"]
        assert said in refused(capsys, dense, *options)
    with files.working(tmp_path / "other", {}), pytest.raises(ValueError, match="another process is at work in"):
        files.working(tmp_path / "other", {}).__enter__()
    (work / "run.json").rename(work / "notes.txt")
    assert "is already there: delete" in refused(capsys, dense, *options)
    assert (work / "notes.txt").exists()


def test_a_missing_package_is_named_before_anything_is_read(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    said = refused(capsys, tmp_path, f"--output={tmp_path / 'new'}", "--sparsity=0.5")
    assert "the packages matplotlib are missing: pip install matplotlib" in said
    code = "import sys; sys.modules['flax'] = None; from sa_plus_plus.__main__ import main; main(['prune', '--help'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Optimal Brain Surgeon" in run.stdout


def test_images_are_prepared_as_transformers_does(tmp_path):
    transformers, image = pytest.importorskip("transformers"), pytest.importorskip("PIL.Image")
    vit = published_models.write(tmp_path / "vit", "vit")
    draw(tmp_path / "images")
    published, drawn = directories.read(vit), images.files_in(tmp_path / "images")
    found = images.pixels(drawn, published.image, images.preparation(published).resample)
    got = images.preparation(published)(found)
    processor = transformers.ViTImageProcessor.from_pretrained(vit)
    want = processor([image.open(file) for file in drawn], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(got, want.transpose(0, 2, 3, 1), atol=0.02)
