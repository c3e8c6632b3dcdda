"""The README's Python snippets run, in order, in one namespace."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.usefixtures("standard_promotion")
def test_snippets_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(snippets) >= 3
    namespace = {"__name__": "readme"}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), namespace)
