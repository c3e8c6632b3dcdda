"""ResNet-50 pruned beside smaller dense ResNets: what is read from the results, and the page."""

import json

import pytest

from benchmarks import resnets, timing


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
    page = resnets.PAGE.read_text()
    for network in resnets.networks():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {network.name} | {network.top1:.1f} |")]
        assert line.split(" | ")[4:] == [
            *list(resnets.timed(network).values())[:-1],
            f"{[*resnets.timed(network).values()][-1]} |",
        ]
