"""A specialised network says whether it was worth it; times are injected, never measured."""

import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_plus_plus as sapp
from sa_plus_plus.sparse import Choice, comparison
from sa_plus_plus.sparse.comparison import Comparison, difference, notes
from sa_plus_plus.sparse.compiler import autotune, measure
from sa_plus_plus.sparse.compiler.ir import Variable

MS = 1e-3


def layer(traced, compiled, runs, block=(16, 16), density=0.2, note=""):
    times = {"traced_seconds": traced * MS, "compiled_seconds": compiled * MS}
    return Choice("dense", (64, 64), 8, block, density if block else 1.0, **times, runs=runs, note=note)


GROUPED = Choice("convolution 3×3", (3, 3, 1, 64), 8, None, 1.0, note="a grouped convolution")
REASONS = {  # choices of networks that take 10 ms, and what is said
    "nothing is pruned": ([layer(5, 4, "dense", None)], "no kernel has blocks of zeros"),
    "mostly other operations": (
        [layer(2, 1, "sparse"), GROUPED, GROUPED],
        "90% of the time is outside the layers that could be compiled: a grouped convolution (2 times)",
    ),
    "mostly unpruned layers": (
        [layer(2, 1, "sparse"), layer(9, 8, "dense", None)],
        "80% of the time is in layers without blocks of zeros",
    ),
    "dense enough to be faster in full": (
        [layer(7, 9, "traced", density=0.9), layer(2, 1, "sparse", density=0.5)],
        "70% of the time is in pruned layers that are faster in full, as traced; "
        "pruned layers keep 70% of their weights in blocks",
    ),
    "many blocks left": (
        [layer(10, 9, "sparse", density=0.8)],
        "90% of the time is in the pruned layers already; pruned layers keep 80% of their weights in blocks",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_why_it_was_not_worth_it(name):
    choices, why = REASONS[name]
    *_, last = notes(Comparison(10.5 * MS, 10 * MS, 0.0), choices)
    assert last == f"not worth it: 1.05 times as fast; {why}"
    *_, last = notes(Comparison(11.1 * MS, 10 * MS, 0.0), choices)
    assert last == "1.11 times as fast"
    *_, last = notes(Comparison(8 * MS, 10 * MS, 0.0), choices)
    assert last.startswith("not worth it: 0.80 times as fast")


def network(batch=2, times=None):
    """Twice the same layer, one of another number of blocks, and one without zeros."""
    rng = np.random.default_rng(0)

    def kernel(kept):
        mask = np.zeros(64)
        mask[:kept] = 1
        blocks = np.kron(rng.permutation(mask).reshape(8, 8), np.ones((4, 4)))
        return jnp.asarray(blocks * rng.normal(size=(32, 32)), jnp.float32)

    weights = [kernel(kept) for kept in (20, 21, 50, 64)]

    def fn(x):
        for w in weights:
            x = jnp.tanh(x @ w)
        return x

    return fn, jnp.asarray(rng.normal(size=(batch, 32)), jnp.float32)


@pytest.fixture
def injected(monkeypatch):
    """Records what is measured instead of measuring it: layers take 2 s and 1 s, networks 5 s and 4 s."""
    measured = []

    def of_group(program, group, network_bytes):
        measured.extend((len(contenders), network_bytes) for contenders in group)
        return [(2.0, 1.0)] * len(group)

    monkeypatch.setattr(autotune, "seconds_of", of_group)
    monkeypatch.setattr(comparison, "alternated", lambda timers, _: np.array([[5.0, 3.0], [5.0, 4.0], [9.0, 4.0]]))
    return measured


def test_equal_layers_are_measured_once_and_the_whole_network_beside_the_function(injected):
    fn, x = network()
    fast = sapp.specialize(fn, x)
    kernels = 4 * 32 * 32 * 4
    assert injected == [(2, kernels)] * (2 if sapp.sparse.native.unavailable_reason() else 3)
    assert fast.whole[:2] == (5.0, 4.0)
    assert fast.whole.on_example
    want, got = np.asarray(jax.jit(fn)(x), np.float64), np.asarray(fast(x), np.float64)
    assert fast.whole.difference == pytest.approx(np.abs(want - got).max() / np.abs(want).max())
    lines = str(fast).splitlines()
    assert lines[-4].split() == ["whole", "network", "5,000,000", "4,000,000"]
    most = f"{fast.whole.difference:.1e} of the largest result" if fast.whole.difference else "0"
    assert lines[-2] == f"largest difference on the example: {most}"
    assert lines[-1] == "1.25 times as fast"
    if sapp.sparse.native.unavailable_reason() is None:
        assert lines[-3].endswith(f"; compiled for {sapp.sparse.native.target(np.float32).name} (float32)")


def test_only_autotuned_networks_are_compared(injected):
    fn, x = network()
    for mode in ("always", "never"):
        fast = sapp.specialize(fn, x, mode=mode)
        assert fast.whole is None
        assert "whole network" not in str(fast)
    assert not injected
    keys = jax.eval_shape(lambda: jax.random.key(0))  # has no value that could be made up
    fast = sapp.specialize(lambda x, key: fn(x) + jax.random.normal(key, x.shape), x, keys)
    assert fast.whole is None
    said = []
    fast = sapp.specialize(lambda x: (jax.debug.callback(said.append, x[0, 0]), fn(x))[1], x)
    assert fast.whole is None
    jax.effects_barrier()
    assert not said  # a function with side effects is not run
    fast = sapp.specialize(lambda n: fn(jnp.ones((2, 32)) * n.astype(jnp.float32)), jax.ShapeDtypeStruct((), jnp.int32))
    assert not fast.whole.on_example
    assert "on random inputs" in str(fast)


@pytest.mark.parametrize(
    ("difference", "in_float32", "warns"),
    [(4.9, True, True), (np.nan, True, True), (1e-3, True, False), (4.9, False, False), (np.inf, True, False)],
)
def test_a_network_that_gives_other_results_warns(monkeypatch, difference, in_float32, warns):
    whole = Comparison(1.0, 1.0, difference, in_float32=in_float32)
    module = sys.modules["sa_plus_plus.sparse.specialize"]  # the name is the function's
    monkeypatch.setattr(module, "compared", lambda fn, network, examples: whole)
    kernel = jnp.eye(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sapp.specialize(lambda x: x @ kernel, jnp.ones((2, 8)))
    messages = [str(w.message) for w in caught if "largest difference from jax.jit(fn)" in str(w.message)]
    assert len(messages) == warns
    if warns:
        assert f"is {difference:.1e} of the largest result" in messages[0]


def test_differences_are_relative_to_the_largest_result():
    want = [np.float32([1, -4]), np.int32([3]), np.zeros((0, 2), np.float32), jax.random.key(0)]
    assert difference(want, [np.float32([1, -4.5]), np.int32([3]), want[2], want[3]]) == 0.125
    assert difference(want, want) == 0
    assert difference([np.float32([np.inf, 2, np.nan])], [np.float32([np.inf, 1, np.nan])]) == 0.5
    assert difference([np.float32([0])], [np.float32([1])]) == np.inf
    assert np.isnan(difference([np.float32([1])], [np.float32([np.nan])]))
    assert difference([], []) == 0


def test_a_program_runs_a_step_as_often_as_it_is_told():
    """Each run sees the one before: 1 + the first entry, at most 1, of the previous result."""
    w = jnp.asarray([[0.5]])
    program = jax.jit(measure.repeated(lambda inputs, weights: inputs[0] @ weights + inputs[1]))
    for count in (0, 1, 2, 3):
        x, y = 2.0, 0.0
        for _ in range(count):
            x = min(max(y, 0.0), 1.0)
            y = x * 0.5 + 0.25
        assert program(count, (jnp.asarray([[2.0]]), jnp.asarray([[0.25]])), w) == y


def contender(x_shape, dtype, weights, run):
    return measure.Contender(run, lambda drawn: [drawn(Variable(1, x_shape, np.dtype(dtype)))], weights)


def test_a_program_runs_the_contender_that_it_is_told():
    """Of any shape and type, with inputs that no other contender takes."""
    shapes = [
        ((3, 5), "float32"),
        ((0, 4), "float32"),
        ((2, 3, 7), "bfloat16"),
        ((1 << 16,), "uint8"),
        ((70000,), "f4"),
    ]
    contenders = [
        contender(shape, dtype, jnp.asarray(float(i)), lambda inputs, w: inputs[0].astype(jnp.float32) * 0 + w)
        for i, (shape, dtype) in enumerate(shapes)
    ]
    program = measure.lowered([contenders[:2], contenders[2:]]).compile()
    noise, weights = measure.normal(1 << 16), [one.weights for one in contenders]
    for which, (shape, _) in enumerate(shapes):
        got = [float(program(np.int32(which), np.int32(count), noise, weights)) for count in (0, 1, 3)]
        assert got == [0.0, which if 0 not in shape else 0.0, which if 0 not in shape else 0.0]


def test_inputs_are_normal_values_that_repeat():
    seen = contender((70000,), "float32", (), lambda inputs, _: inputs[0])
    values = seen.inputs(lambda v: measure._drawn(measure.normal(1 << 16), v))[0]
    np.testing.assert_array_equal(values, measure.normal(70000))
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02


def test_steps_share_a_program_up_to_its_size(monkeypatch):
    monkeypatch.setattr(measure, "TOGETHER", 4)
    monkeypatch.setattr(measure, "TOGETHER_BYTES", 100)
    sizes = [5, 5, 5, 20, 5, 30, 1]  # floats of each of two contenders
    steps = [[contender((1,), "float32", np.zeros(n, np.float32), None)] * 2 for n in sizes]
    groups = measure.together(steps)
    assert [[len(step[0].weights) for step in group] for group in groups] == [[5, 5], [5], [20], [5], [30], [1]]
    assert measure.together([]) == []


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [
        ([[4.0] * 9, [1.0] * 9], measure.CLEAR_ROUNDS),  # clear at once
        ([[1.0, 1.1, 1.2, 9.0, 1.3], [1.0] * 9], measure.ROUNDS),
        ([[4.0, 1.0, 4.0, 4.0, 4.0], [1.0, 4.0, 1.0, 1.0, 1.0]], measure.ROUNDS),
    ],
)
def test_clear_cases_are_measured_in_fewer_rounds(seconds, rounds):
    asked = []

    def timer(number):
        values = iter(seconds[number])

        def seconds_of(count):
            asked.append((number, count))
            return next(values) if len(asked) > 4 else 1.0  # two calls each to find out how many runs a round has

        return seconds_of

    got = measure.alternated([timer(0), timer(1)])
    np.testing.assert_array_equal(got, np.transpose([each[:rounds] for each in seconds]))
    assert len(asked) == 4 + 2 * rounds
