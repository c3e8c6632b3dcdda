"""Progress on a terminal, and none elsewhere."""

import io
import types

import jax.numpy as jnp
import numpy as np
import pytest

import sa_plus_plus as sapp
from sa_plus_plus import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True

    @property
    def lines(self):
        return [line.strip() for line in self.getvalue().split("\r") if line.strip()]

    @property
    def left(self):
        """What is on the line at last."""
        line = ""
        for text in self.getvalue().split("\r"):
            line = text + line[len(text) :]
        return line.strip()


@pytest.fixture
def terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=stream))
    monkeypatch.setattr(progress, "_INTERVAL", -1)  # every item is shown
    monkeypatch.delenv("SAPP_PROGRESS", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return stream


def test_items_are_shown_with_the_time_left(terminal, monkeypatch):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.doing("one_shot"):
        assert list(progress.each("ab", "layer")) == ["a", "b"]
    assert terminal.lines == ["one_shot: layer 1 of 2", "one_shot: layer 2 of 2, about 5 min left"]
    assert not terminal.left


def test_a_line_within_another_is_cut_to_the_terminal_and_erased_after_an_error(terminal):
    @progress.doing("outer")
    def fails():
        for part in progress.each([{}], "part"):
            with progress.doing("inner"):
                progress.say("x" * 100)
                part["missing"]

    with pytest.raises(KeyError):
        fails()
    first, second = terminal.lines
    assert first == "outer: part 1 of 1"
    assert second == ("outer: part 1 of 1 · inner: " + "x" * 100)[:79]
    assert not terminal.left
    progress.say("outside")
    assert terminal.lines == [first, second]


def pruned_network():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(16, 16)), jnp.float32) for name in "ab"}
    x = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
    return lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"], params, x


def everything():
    """All that takes long, once."""
    fn, params, x = pruned_network()
    options = {"block": 4, "min_blocks": 1}
    sapp.one_shot(fn, params, [x], sparsity=0.5, **options)
    found = sapp.sensitivity(fn, params, [(x, x)], lambda y, z: (y - z) ** 2, sparsities=(0.5,), **options)
    sapp.budget(found, share=0.8)
    costs = {path: [1.0, 0.5] for path in found.losses}
    sapp.budget(found, costs, share=0.8)
    sapp.specialize(lambda x: fn(params, x), x, mode="always")


def test_what_takes_long_says_how_far_it_is(terminal):
    everything()
    lines = [line.split(", about")[0] for line in terminal.lines]
    for name, part in (
        ("one_shot", "layer 2 of 2"),
        ("sensitivity", "layer 2 of 2"),
        ("sensitivity", "loss 2 of 2"),
        ("budget", "solving the integer program"),
        ("specialize", "tracing"),
    ):
        assert f"{name}: {part}" in lines
    assert not terminal.left


@pytest.mark.parametrize("how", ["no terminal", "switched off", "no stderr"])
def test_quiet(terminal, monkeypatch, how):
    if how == "no terminal":
        monkeypatch.setattr(terminal, "isatty", lambda: False)
    elif how == "switched off":
        monkeypatch.setenv("SAPP_PROGRESS", "0")
    else:
        monkeypatch.setattr(progress.sys, "stderr", None)
    with progress.doing("one_shot"):
        progress.say("tracing")
        assert list(progress.each([1, 2], "layer")) == [1, 2]
    assert not terminal.getvalue()
