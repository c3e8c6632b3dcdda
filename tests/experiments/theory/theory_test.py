"""The theory page from results that are stored; what it computes is tested in convex_solvers_test.py."""

import json

import commands
import jax
import pytest

from experiments.theory import __main__ as theory
from experiments.theory import one_group, page
from experiments.theory.instances import QUICK

STORED = commands.ROOT / "benchmarks" / "results" / "theory.json"
pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_edges():
    with jax.enable_x64(True):
        edges = one_group.edges(QUICK)
    assert all(0 < e < 1 for values in edges.values() for e in values)


def test_page_of_the_stored_results(tmp_path):
    content = json.loads(STORED.read_text())
    assert theory.failures(content) == []
    page.write(tmp_path, content)
    names = {"theory.md", "theory.json", "theory_one_group.png", "theory_replacement.png", "theory_recovery.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    text = (tmp_path / "theory.md").read_text()
    assert text.count("| power(0.5) |") == 2
    content["lemmas"][0]["above 1e-8"] = 3
    content["theorem_1_1"][0]["found lower"] = 1
    assert [line.split(":")[0] for line in theory.failures(content)] == [
        "Lemma Hoff, least squares",
        "Theorem 1.1, absolute, least squares",
    ]


def test_an_earlier_page_is_kept(tmp_path):
    (tmp_path / "theory.md").write_text("earlier")
    done = commands.run("experiments.theory", f"--output={tmp_path}", real=True)
    assert done.returncode == 2
    assert "choose another --output or pass --overwrite" in done.stderr
    assert "Traceback" not in done.stderr
