"""The pages say what the library does: each public name is described, errors are quoted, the first example runs."""

import builtins
import importlib
import inspect
import pickle
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import readme_test

import sa_plus_plus as sapp
from benchmarks import page
from docs import layout
from sa_plus_plus import convex

DOCS = readme_test.ROOT / "docs"
CONVEX = [f"convex.{name}" for name in convex.__all__ if inspect.ismodule(getattr(convex, name))]
CONTRIB = ["contrib.keras", "contrib.torch"]
MODULES = ["blocks", "metrics", "phases", "select", "sparse.files.serve", "sparse", "views", *CONTRIB, *CONVEX]


def public(module):
    """`{name: function or class}` of a module: those that it exports or, where it does not say, those made in it."""
    named = getattr(module, "__all__", None)
    members = {n: o for n, o in vars(module).items() if callable(o) and not n.startswith("_")}
    if named is not None:
        return {name: members[name] for name in named if name in members}
    own = {n: o for n, o in members.items() if getattr(o, "__module__", None) == module.__name__}
    return {n: o for n, o in own.items() if inspect.isclass(o) or inspect.isroutine(inspect.unwrap(o))}


def described():
    for module in (sapp, *(importlib.import_module(f"sa_plus_plus.{name}") for name in MODULES)):
        yield from ((f"{module.__name__}.{name}", found) for name, found in public(module).items())


def lacking(found):
    """What is missing from the docstring of a function or class; "" if nothing is."""
    text = inspect.getdoc(found)
    if not text:
        return "there is none"
    if inspect.isclass(found):
        methods = {n: m for n, m in vars(found).items() if inspect.isfunction(m) and n == m.__name__}
        silent = [n for n, m in methods.items() if not n.startswith("_") and not m.__doc__]
        return f"methods have none: {silent}" if silent else ""
    if not (taken := list(inspect.signature(found).parameters)):
        return ""
    section = re.search(r"^Args:\n((?:  .*\n?|\n)*)", text, flags=re.M)
    if not section:
        return "it has no section Args"
    told, words = re.findall(r"^  \*{0,2}(\w+):", section[1], flags=re.M), re.findall(r"\w+", section[1])
    return "" if set(told) <= set(taken) <= set(words) else f"the arguments are {taken}, it describes {told}"


def test_public_names_have_docstrings():
    found = dict(described())
    assert len(found) > 150
    assert not {name: reason for name, each in found.items() if (reason := lacking(each))}


def test_lacking_docstrings_are_noticed():
    def function(x, y):
        """Sums.

        Args:
          x: a number.
          z: another.
        """

    class Silent:
        """A class."""

        def method(self):
            pass

    assert lacking(function) == "the arguments are ['x', 'y'], it describes ['x', 'z']"
    assert lacking(lambda x: x) == "there is none"
    assert lacking(Silent) == "methods have none: ['method']"
    function.__doc__ = "Sums."
    assert lacking(function) == "it has no section Args"


def test_the_reference_has_every_public_name():
    text = "".join(file.read_text() for file in (DOCS / "api").glob("*.rst"))
    for name in sapp.__all__:
        assert re.search(rf":: sa_plus_plus\.{name}$", text, flags=re.M) or inspect.ismodule(getattr(sapp, name)), name
    for name in sapp.sparse.__all__:
        described = re.search(rf":: sa_plus_plus\.(sparse\.)?{name}$", text, flags=re.M)
        assert described or inspect.ismodule(getattr(sapp.sparse, name)), f"sparse.{name}"
    for name in set(MODULES) - {"sparse"}:
        assert f".. automodule:: sa_plus_plus.{name}\n" in text, name


def test_the_page_of_benchmarks_is_that_of_the_results():
    assert page.main(["--check"]) == 0, "run `python -m benchmarks.page`"


def test_the_map_lists_every_file_with_what_it_is():
    assert layout.main(["--check"]) == 0, "run `python -m docs.layout`"
    silent = [line for line in layout.listing().splitlines() if line.endswith("|  |")]
    assert not silent, "each file begins with a sentence that says what it is"


@pytest.mark.usefixtures("standard_promotion")
def test_the_first_example_needs_the_library_alone(monkeypatch):
    imported, usual = set(), builtins.__import__

    def noting(name, globals=None, locals=None, fromlist=(), level=0):
        if (globals or {}).get("__name__", "").startswith(("sa_plus_plus", "page")):
            imported.add(name.partition(".")[0])
        return usual(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", noting)
    namespace = {"__name__": "page"}
    for snippet in readme_test.snippets_of((DOCS / "getting_started.md").read_text()):
        exec(compile(snippet, "getting_started.md", "exec"), namespace)
    assert imported - set(sys.stdlib_module_names) <= {"jax", "jaxlib", "optax", "numpy", "sa_plus_plus"}
    assert np.mean(np.asarray(namespace["params"]["in"]) == 0) == pytest.approx(0.9, abs=0.01)
    assert namespace["loss_fn"](namespace["params"]) < 0.5 * jnp.var(namespace["y"])


def messages(act):
    """What an act raises and warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            act()
        except (ValueError, TypeError, NotImplementedError) as error:
            return [str(error)]
    return [str(warning.message) for warning in caught]


def test_troubleshooting_quotes_what_the_library_says():
    params, x = {"in": jnp.ones((64, 96))}, jnp.ones((2, 64))
    phases = sapp.phases.magnitude(100)
    sp = sapp.magnitude(block=4, sparsity=0.9, phases=phases)
    fast = sapp.specialize(lambda x: x @ params["in"], x, mode="never")
    acts = (
        lambda: sp.init({"in": params["in"].at[0, 0].set(jnp.nan)}),
        lambda: sapp.check_pruned({"in": params["in"].at[7].set(jnp.nan)}, sp.plan(params)),
        lambda: sapp.check_pruned(params, sp.plan(params)),
        lambda: sp.finalize(*sp.init(params)),
        lambda: sapp.plan(params, block=16, sparsity=0.9),
        lambda: sapp.plan(params, block=4, sparsity=0.95),
        lambda: sapp.sparsify(optax.contrib.prodigy(), sp).init(params),
        lambda: sapp.specialize(lambda w, x: x @ w, params["in"], x),
        lambda: sapp.specialize(lambda x: x + 1, x),
        lambda: jax.vmap(fast)(x),
        lambda: jax.grad(lambda x: pickle.loads(pickle.dumps(fast))(x).sum())(x),
        lambda: sapp.magnitude(block=4, sparsty=0.9, phases=phases),
        lambda: sapp.magnitude(block=4, sparsity=0.9, phases=100),
        lambda: sp.init({**params, "activation": readme_test.snippets_of}),
    )
    quoted = re.findall(r"```text\n(.*?)\n```", (DOCS / "troubleshooting.md").read_text(), flags=re.S)
    assert [message for act in acts for message in messages(act)] == quoted
