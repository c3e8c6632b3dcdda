"""The campaign on sentence embeddings: on a tiny encoder, from training to the page, and what is exact about it."""

import importlib
import json

import commands
import jax
import numpy as np
import pytest

from benchmarks.minilm import contenders, networks, picture
from experiments.models import sentences
from sa_plus_plus import load, todense

pytest.importorskip("tokenizers")
tiny_encoder = importlib.import_module("tiny_encoder")  # which needs that package
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.long
def test_all_stages_by_command(tmp_path):
    """Only some of the networks are trained. A second call trains and measures nothing again."""
    only = ["one_shot", "picture/fewer_layers_2"]
    model = tiny_encoder.write(tmp_path)
    (tmp_path / "lines.txt").write_text("\n".join(tiny_encoder.LINES))
    pairs = zip(tiny_encoder.LINES[:40], tiny_encoder.LINES[40:80], strict=True)
    (tmp_path / "pairs.tsv").write_text("\n".join("\t".join(pair) for pair in pairs))
    directory, output = tmp_path / "campaign" / "smoke", tmp_path / "output"
    flags = [f"--model={model}", f"--text={tmp_path / 'lines.txt'}", f"--pairs={tmp_path / 'pairs.tsv'}"]
    flags += [
        f"--directory={directory.parent}",
        f"--output={output}",
        "--scale=smoke",
        "--noengines",
        f"--only={','.join(only)}",
    ]
    done = commands.run("benchmarks.minilm", *flags)
    assert done.returncode == 0, done.output
    found = json.loads((output / "minilm.json").read_text())
    trained = [c for c in contenders.contenders(contenders.SCALES["smoke"]) if any(o in str(c.folder) for o in only)]
    names = {"published"} | {str(each.folder) for each in trained}
    assert {row["folder"] for row in found["networks"]} == names
    in_picture = {n for n in names if n.startswith(("picture", "published"))}
    assert {row["network"] for row in found["speed"]["rows"]} == in_picture
    assert (output / "minilm.png").stat().st_size > 10_000
    by_folder = {row["folder"]: row for row in found["networks"]}
    assert by_folder["published"]["quality"]["float32"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert by_folder["published"]["quality"]["ours int8"]["cosine"] > 0.98
    for each in trained:
        if not each.units:  # whose zeros are gone from the other kernel too
            kept = load(directory / each.folder / "pruned.safetensors")["params"]
            assert by_folder[str(each.folder)]["weights"] == nonzero(todense(kept))
    before = {file: file.stat().st_mtime_ns for file in directory.rglob("*.json")}
    done = commands.run("benchmarks.minilm", *flags, "--stages=train,quality,page")
    assert done.returncode == 0, done.output
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert json.loads((output / "minilm.json").read_text()) == found


def nonzero(params):
    """Nonzero weights in the layers' kernels."""
    layers = [layer for name, layer in params.items() if name.startswith("layer")]
    return sum(np.count_nonzero(part["kernel"]) for layer in layers for part in layer.values() if "kernel" in part)


def test_hidden_units_without_weights_are_removed_exactly(tmp_path):
    encoder = sentences.load(tiny_encoder.write(tmp_path))
    params, rng = jax.tree.map(np.array, encoder.params), np.random.default_rng(0)
    for i in range(4):
        units = rng.permutation(32)[:20]
        params[f"layer{i + 1}"]["up"]["kernel"][:, units[:15]] = 0
        params[f"layer{i + 1}"]["down"]["kernel"][units[10:]] = 0
    model, small = networks.narrowed(encoder.model, params)
    assert model.hidden == 12
    assert small["layer1"]["down"]["kernel"].shape == (12, 16)
    tokens, real = rng.integers(4, 30, (5, 9)), np.array([9, 3, 1, 5, 8])
    want = sentences.embed(encoder.model, params, tokens, real)
    np.testing.assert_allclose(sentences.embed(model, small, tokens, real), want, atol=1e-6)
    params["layer2"]["up"]["kernel"][0] = 1
    with pytest.raises(ValueError, match="keep different numbers of hidden units"):
        networks.narrowed(encoder.model, params)


def test_networks_that_are_timed_have_the_sizes_of_the_trained_ones(tmp_path):
    path, scale = tiny_encoder.write(tmp_path), contenders.SCALES["smoke"]
    every = [each for each in contenders.contenders(scale) if each.group == "picture"]
    whole = nonzero(sentences.load(path).params)
    found = networks.untrained(every, scale, str(path))
    assert [each.folder for each in found] == [str(each.folder) for each in every]
    for network, each in zip(found, every, strict=True):
        share = network.model.layers / 4 * (1 if network.dense else 1 - each.changes["sparsifier.sparsity"])
        if each.units:
            assert network.model.hidden == 16  # half
        else:
            assert nonzero(network.params) == share * whole


def test_seeds_are_shown_together():
    about = {"family": "f", "label": "l", "weights": 2e6}
    rows = [about | {"quality": {"float32": {"mrr": mrr}}} for mrr in (0.7, 0.8, 0.9)]
    rows.insert(1, about | {"family": "once", "quality": {"float32": {"mrr": 0.5}}})
    want = {"network": "f, l", "seeds": "3", "weights": "2.00 M", "mrr": "0.800 ± 0.100"}
    assert picture.repeated(rows) == [want]
    scale = contenders.SCALES["smoke"]
    every = contenders.contenders(scale)
    repeated = [each for each in every if each.group == "repeated"]
    assert {each.seed for each in repeated} == {1}
    for each in repeated:
        (first,) = (c for c in every if (c.group, c.family, c.label) == ("picture", each.family, each.label))
        configs = [contenders.config_of(c, scale, {}).to_dict() for c in (first, each)]
        assert [config.pop("seed") for config in configs] == [0, 1]
        assert configs[0] == configs[1]
    assert len({each.folder for each in every}) == len(every)


def test_every_network_is_shown_in_its_fastest_engine():
    times = {"ours float32": (3, 9), "openvino float32": (4, 8), "openvino int8": (2, 2), "ours int8": (1, 5)}
    about = {"network": "a", "batch": 1, "length": 32}
    times["onnxruntime int8"] = 1, 1
    rows = [about | {"engine": e, "warm": {"median": w}, "cold": {"median": c}} for e, (w, c) in times.items()]
    quality = {"float32": {"mrr": 0.7}, "openvino int8": {"mrr": 0.695}}  # ours in int8 was not measured
    quality["onnxruntime int8"] = {"mrr": 0.68}  # which loses too much
    network = {"folder": "a", "family": "f", "label": "l", "dense": True, "quality": quality}
    found = {(p["precision"], p["when"]): p for p in picture.points([network], rows, contenders.Setting(1, 32))}
    assert {key: (p["engine"], p["ms"]["median"], p["quality"]["mrr"]) for key, p in found.items()} == {
        ("float32", "warm"): ("ours float32", 3, 0.7),
        ("float32", "cold"): ("openvino float32", 8, 0.7),
        ("int8", "warm"): ("openvino int8", 2, 0.695),
        ("int8", "cold"): ("openvino int8", 2, 0.695),
    }
