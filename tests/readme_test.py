"""The README's Python snippets run, in order, in one namespace."""

import pathlib
import re

import numpy as np
import pytest

import sa_plus_plus as sapp

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.usefixtures("standard_promotion")
def test_snippets_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(snippets) >= 3
    losses, namespace = {}, {"__name__": "readme"}
    try:
        for snippet in snippets:
            exec(compile(snippet, str(README), "exec"), namespace)
            for way, trained in (("one line", "params"), ("explicit", "pruned")):
                if trained in namespace and way not in losses:
                    losses[way] = float(namespace["loss_fn"](namespace[trained]))
    finally:
        sapp.ALGORITHMS.pop("largest_weight", None)  # not for the tests that come after
    assert str(namespace["sp"].plan(namespace["params"])) in README.read_text()
    assert losses["one line"] < 0.25 * np.square(np.sin(namespace["x"][:, :16]).sum(-1)).mean()  # of the output 0
    assert losses["explicit"] == pytest.approx(losses["one line"], rel=0.1)  # rounding apart; contract_test.py is exact
