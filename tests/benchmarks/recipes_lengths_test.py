"""The comparison of recipes at several lengths: which runs are in it, and what it says of them."""

import json

import numpy as np
import pytest

from benchmarks import recipes_lengths


def row(variant, steps, values, block=16):
    return {"data": "bytes", "block": block, "sparsity": 0.9, "variant": variant, "steps": steps, "values": values}


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Results in two files; one variant has one length only, and another one length on each of two cells."""
    long = [row("rigl", 90, [2.0, 3.0]), row("new", 90, [1.0, 3.0]), row("movement", 90, [1.0, 1.0])]
    short = [row("new", 30, [4.0, 4.0]), row("rigl", 30, [3.0, 3.0]), row("movement", 30, [0.0, 0.0], block=32)]
    short.append(row("random", 30, [5.0, 5.0]))
    for name, some in (("recipes_bytes", short), ("recipes_bytes_90", long), ("recipes", [row("rigl", 1, [0.0, 0.0])])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"choosing": some, "confirming": some[:1]}))
    monkeypatch.setattr(recipes_lengths.timing, "RESULTS", tmp_path)
    return recipes_lengths.rows()


def test_variants_with_several_lengths_on_a_cell_are_compared(found):
    assert [(r["variant"], r["steps"]) for r in found] == [("new", 30), ("rigl", 30), ("rigl", 90), ("new", 90)]
    short, long = "16 × 16, 90%, 30 steps", "16 × 16, 90%, 90 steps"
    assert recipes_lengths.table(found) == [
        {"variant": "RigL", short: "**3.000 ± 0.000**", long: "2.500 ± 0.500"},
        {"variant": "new", short: "4.000 ± 0.000", long: "**2.000 ± 1.000**"},
    ]


def test_runs_to_confirm_have_a_table_of_their_own(found):
    assert [(r["variant"], r["steps"]) for r in recipes_lengths.read("confirming")] == [("new", 30), ("rigl", 90)]
    lines = recipes_lengths.table(recipes_lengths.read("confirming"))
    assert lines[0] == {"variant": "RigL", "16 × 16, 90%, 30 steps": "-", "16 × 16, 90%, 90 steps": "**2.500 ± 0.500**"}


def test_the_picture_has_the_means_and_their_standard_errors(found):
    (axis,) = recipes_lengths.plot(found).axes
    lines = {bars.get_label(): bars for bars in axis.containers}
    assert list(lines) == ["RigL", "new"]
    points, _, (errors,) = lines["new"]
    np.testing.assert_allclose(points.get_xydata(), [[30, 4], [90, 2]])
    np.testing.assert_allclose(errors.get_segments()[1], [[90, 1], [90, 3]])
