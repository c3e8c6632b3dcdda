"""ResNet-50 pruned beside smaller dense ResNets: what is read from the results, and the page."""

import json

import pytest

from benchmarks import resnets, tables, timing


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    rows = [
        (1, "onnxruntime float32", "float32", 9.0),
        (1, "openvino float32", "float32", 8.0),
        (1, "ours float32 0%", "float32", 8.5),
        (1, "ours float32 80% blocks 16", "float32", 3.0),
        (1, "ours float32 80% blocks 32", "float32", 2.0),
        (1, "ours float32 90% blocks 16", "float32", 1.0),
        (1, "ours int8 80% blocks 16", "int8", 0.5),
        (32, "ours float32 0%", "float32", 0.1),
    ]
    keys = ("batch", "name", "precision", "ms")
    content = {"rows": [dict(zip(keys, (*row, {"median": ms}), strict=True)) for *row, ms in rows]}
    (tmp_path / "serve_engines_resnet50.json").write_text(json.dumps(content))


def test_milliseconds_are_of_the_fastest_engine_or_of_the_pruned_network(results):
    dense, pruned = resnets.Network("dense", 76.0, "ResNet50"), resnets.Network("pruned", 73.0, "ResNet50", 0.8)
    assert resnets.milliseconds(dense, 1, "float32") == 8.0
    assert resnets.milliseconds(pruned, 1, "float32") == 3.0
    assert resnets.milliseconds(pruned, 1, "int8") == 0.5
    assert resnets.milliseconds(dense, 1, "int8") is None
    assert resnets.milliseconds(resnets.Network("dense", 70.0, "ResNet18"), 1, "float32") is None


def test_the_page_is_that_of_the_results():
    """But for the counts of weights and multiply-adds, which take long."""
    page = resnets.PAGE.read_text()
    found = json.loads((timing.RESULTS / "serve_resnets.json").read_text())["rows"]
    for name, lines in (("resnets together", resnets.together(found)), ("resnets against", resnets.against(found))):
        assert f"<!-- {name} -->\n{tables.markdown(lines)}\n<!-- end of {name} -->" in page
    _, _, rest = page.partition("<!-- resnet50 -->")
    first, _, _ = rest.partition("<!-- end of resnet50 -->")
    for network in resnets.networks():
        (line,) = [line for line in first.splitlines() if line.startswith(f"| {network.name} | {network.top1:.1f} |")]
        assert line.removesuffix(" |").split(" | ")[4:] == list(resnets.timed(network).values())


def test_networks_that_took_turns_are_compared_by_round():
    def row(network, engine, rounds):
        ms = dict(zip(("q25", "median", "q75"), sorted(rounds), strict=True))
        precision = engine.split()[1]
        return {"network": network, "engine": engine, "precision": precision, "ms": ms, "rounds": rounds}

    found = []
    for pruned, dense in resnets.PAIRS:
        for precision in resnets.PRECISIONS:
            found += [row(dense, f"onnxruntime {precision}", [8.0, 6.0, 4.0])]
            found += [row(dense, f"ours {precision}", [9.0, 7.0, 4.0]), row(pruned, f"ours {precision}", [4, 2, 1])]
    assert resnets.against(found)[0] == {
        "pruned": "ResNet-50, 16 × 16, 80%",
        "against": "dense ResNet-34",
        "float32": "3.00 [2.50, 3.50]",
        "int8": "3.00 [2.50, 3.50]",
    }
    lines = {line["network"]: line for line in resnets.together(found)}
    assert lines["dense ResNet-34"]["int8"] == "6.0 [4.0, 8.0] onnxruntime"
    assert lines["ResNet-50, 16 × 16, 90%"]["float32"] == "2.0 [1.0, 4.0] ours"
    assert lines["dense MobileNetV2"]["top-1, %"] == "71.9"
