"""The examples in the library's docstrings give what they say."""

import doctest
import importlib
import pathlib

import pytest

import sa_plus_plus

ROOT = pathlib.Path(sa_plus_plus.__file__).parent
FILES = sorted(file for file in ROOT.rglob("*.py") if ">>>" in file.read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_examples(file):
    module = ".".join(("sa_plus_plus", *file.relative_to(ROOT).with_suffix("").parts))
    ran = doctest.testmod(importlib.import_module(module))
    assert ran.attempted > 0
    assert ran.failed == 0
