"""The command that prunes published transformers: what comes out, in whose hands, resuming, and bad input."""

import json
import pathlib
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
from published_models import KERNELS, LAYER, LAYERS, LINES, WIDTH

from sa_plus_plus.contrib.prune import files, page, training

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One size of batches, timed once."""
    monkeypatch.setattr(page, "BATCHES", (1,))
    monkeypatch.setattr(
        page.timing, "alternate", lambda calls, rounds: {name: [1e-3, call() is None] for name, call in calls.items()}
    )


def prune(folder, output, *options, sparsity=0.5, block="4,4"):
    main(["prune", str(folder), f"--output={output}", f"--sparsity={sparsity}", f"--block={block}", *map(str, options)])
    return output


def text(folder, lines=LINES):
    file = folder / "lines.txt"
    file.write_text("\n".join(lines))
    return f"--text={file}"


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
    options = ["--steps=0"] if kind == "vit" else ["--steps=40", "--learning-rate=1e-2", "--length=12", text(tmp_path)]
    pruned = prune(dense, tmp_path / "deep" / "pruned", *options)
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
    names = {"bert": "cosine to the dense network", "gpt2": "perplexity", "vit": None}
    assert [measure["name"] for measure in result["quality"]][:1] == [n for n in [names[kind]] if n]
    assert sum(result["kept"].values()) * 2 == sum(result["blocks"].values())
    if kind != "vit":
        assert "step 40 of 40: 50.0% pruned" in said
    rng = np.random.default_rng(1)
    if kind == "vit":
        inputs = (rng.normal(size=(1, 8, 8, 3)).astype(np.float32),)
    else:
        inputs = (rng.integers(4, 30, (1, 12), np.int32), np.array([9], np.int32))[: 1 + (kind == "bert")]
    got, want = np.asarray(sapp.serve.load(new / page.SERVED)(*inputs)), torch_output(kind, pruned, inputs)
    real = slice(9) if kind == "bert" else slice(None)
    np.testing.assert_allclose(got[:, real], want[:, real], atol=2e-5)


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


def test_training_keeps_more_than_magnitude(tmp_path): ...


@pytest.mark.parametrize("steps", [0, 12])
def test_the_same_command_goes_on(steps, tmp_path, monkeypatch, capsys):
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
    assert ("going on from step 5 of 12" if steps else "going on after 5 of 12 kernels") in said
    assert (pruned / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
