"""The site's sources: every public name is documented and on a page, and the page of benchmarks is up to date."""

import importlib
import inspect
import pathlib
import re

import pytest

import sa_plus_plus as sapp
from benchmarks import page

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
CONVEX = "constants greedy group_lasso groups least_squares_path masked penalised penalties problems"
MODULES = (
    *("blocks", "metrics", "phases", "select", "serve", "sparse", "views", "contrib.keras"),
    *(f"convex.{name}" for name in CONVEX.split()),
)


def public():
    """Callables by their name: those of the package, and those that its public modules define."""
    for name in sapp.__all__:
        if callable(value := getattr(sapp, name)):
            yield name, value
    for module in MODULES:
        try:
            found = importlib.import_module(f"sa_plus_plus.{module}")
        except ImportError:  # an optional package
            continue
        for name in getattr(found, "__all__", vars(found)):
            value = getattr(found, name)
            if callable(value) and not name.startswith("_") and value.__module__.startswith(f"sa_plus_plus.{module}"):
                yield f"{module}.{name}", value


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    assert text
    assert not text.startswith(f"{getattr(value, '__name__', '')}("), "a docstring of its own"
    if inspect.isclass(value):
        return
    parameters = [p for p in inspect.signature(value).parameters if not p.startswith("_")]
    if len(parameters) > 1:
        assert "Args:" in text or all(re.search(rf"`{p}`|\b{p}\b", text) for p in parameters), parameters


def test_every_public_name_is_on_a_page_of_the_reference():
    pages = {path.stem: path.read_text() for path in (DOCS / "api").glob("*.md")}
    told = " ".join(pages.values())
    for name in sapp.__all__:
        if inspect.ismodule(getattr(sapp, name)):
            assert name in pages, f"docs/api/{name}.md"
        elif name != "Phases":  # which is with its module
            assert re.search(rf":: {name}$|`{name}`", told, flags=re.M), name
    index = pages.pop("index")
    assert all(stem in index for stem in pages)


def test_the_page_of_benchmarks_is_what_the_script_writes():
    """After a measurement: `python -m benchmarks.page`."""
    assert page.PAGE.read_text() == page.page()
