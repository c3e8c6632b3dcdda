"""Python snippets run: of the README and of the pages that follow it in one namespace, of other pages by themselves."""

import re

import numpy as np
import pytest
from commands import ROOT

import sa_plus_plus as sapp

README = ROOT / "README.md"
NAMES = ("training", "inference", "algorithms", "theory", "one_shot")
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
APART = (
    "what_to_prune",
    "trained_weights",
    "devices",
    "own_algorithm",
    "own_data",
    "commands",
)  # getting_started: docs_test.py
FRAMEWORKS = (ROOT / "docs" / "frameworks.md").read_text()


def snippets_of(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


@pytest.mark.usefixtures("standard_promotion")
def test_snippets_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    snippets = [(page.name, snippet) for page in PAGES for snippet in snippets_of(page.read_text())]
    assert {name for name, _ in snippets} == {page.name for page in PAGES}
    losses, namespace = {}, {"__name__": "readme"}
    try:
        for name, snippet in snippets:
            exec(compile(snippet, name, "exec"), namespace)
            for way, trained in (("one line", "params"), ("explicit", "pruned")):
                if trained in namespace and way not in losses:
                    losses[way] = float(namespace["loss_fn"](namespace[trained]))
    finally:
        sapp.ALGORITHMS.pop("largest_weight", None)  # not for the tests that come after
    assert str(namespace["sp"].plan(namespace["params"])) in README.read_text()
    of_zero = np.square(np.sin(namespace["x"][:, :16]).sum(-1)).mean()  # the loss of the output 0
    # That both ways train alike is tested in contract_test.py: over as many steps, rounding tips which blocks are kept.
    assert losses.keys() == {"one line", "explicit"}
    assert max(losses.values()) < 0.25 * of_zero


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", APART)
def test_a_page_by_itself(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page, namespace = ROOT / "docs" / f"{name}.md", {"__name__": "page"}
    known = set(sapp.ALGORITHMS)
    try:
        for snippet in snippets_of(page.read_text()):
            exec(compile(snippet, page.name, "exec"), namespace)
    finally:
        for added in set(sapp.ALGORITHMS) - known:
            del sapp.ALGORITHMS[added]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("section", re.findall(r"^## (.*)$", FRAMEWORKS, flags=re.M))
def test_each_framework_on_its_page(section, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    snippets = snippets_of(FRAMEWORKS.partition(f"## {section}\n")[2].partition("\n## ")[0])
    for package in re.findall(r"^(?:import|from) (\w+)", snippets[0], flags=re.M):
        pytest.importorskip(package)
    namespace = {"__name__": "page"}
    for snippet in snippets:
        exec(compile(snippet, f"docs/frameworks.md, {section}", "exec"), namespace)
    assert list(tmp_path.iterdir())  # a file was written
    assert namespace["fast"].choices


def test_links_between_pages_lead_somewhere():
    pages = [README, *(ROOT / "docs").glob("*.md")]
    assert len(README.read_text().splitlines()) <= 150
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
