"""Schedules against the paper's table, typed in here once more, and against a plain walk through the steps."""

import itertools
import re
from fractions import Fraction

import hypothesis
import jax
import jax.numpy as jnp
import matplotlib.colors
import numpy as np
import problems
import pytest
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from sa_plus_plus import phases
from sa_plus_plus.phases import Phases

D, RISING, S = "dense", "sparsification", "sparse"

# Percent of the run (section 4.2; `finetune` and `gradual` are not the paper's).
TABLE = {
    ("dense", "imagenet"): [(D, "100")],
    ("dense", "criteo"): [(D, "100")],
    ("random", "imagenet"): [(S, "100")],
    ("random", "criteo"): [(S, "100")],
    ("magnitude", "imagenet"): [(D, "85"), (S, "15")],
    ("magnitude", "criteo"): [(D, "80"), (S, "20")],
    ("powerpropagation", "imagenet"): [(D, "85"), (S, "15")],
    ("powerpropagation", "criteo"): [(D, "80"), (S, "20")],
    ("gradual_magnitude", "imagenet"): [(D, "10"), (RISING, "75"), (S, "15")],
    ("gradual_magnitude", "criteo"): [(D, "20"), (RISING, "60"), (S, "20")],
    ("acdc", "imagenet"): [(D, "10"), *[(S, "5"), (D, "5")] * 6, (S, "5"), (D, "10"), (S, "15")],
    ("acdc", "criteo"): [(D, "20"), *[(S, "3"), (D, "3")] * 10, (S, "20")],
    ("sequential_attention", "imagenet"): [
        (D, "10"),
        *[(RISING, "10/3"), (S, "10/3"), (D, "10/3")] * 6,
        (RISING, "15"),
        (S, "15"),
    ],
    ("sequential_attention", "criteo"): [
        (D, "20"),
        *[(RISING, "2"), (S, "2"), (D, "2")] * 9,
        (RISING, "6"),
        (S, "20"),
    ],
    ("dense", "finetune"): [(D, "100")],
    ("random", "finetune"): [(S, "100")],
    ("magnitude", "finetune"): [(S, "100")],
    ("powerpropagation", "finetune"): [(S, "100")],
    ("gradual_magnitude", "finetune"): [(RISING, "50"), (S, "50")],
    ("acdc", "finetune"): [*[(S, "5"), (D, "5")] * 5, (S, "50")],
    ("sequential_attention", "finetune"): [(RISING, "50"), (S, "50")],
    ("gradual_magnitude", "gradual"): [(D, "10"), (RISING, "30"), (S, "60")],
    ("sequential_attention", "gradual"): [(D, "10"), (RISING, "30"), (S, "60")],
}
TABLE |= {(name, "gradual"): TABLE[name, "imagenet"] for name in ("dense", "random", "magnitude", "acdc")}
TABLE |= {("movement", recipe): TABLE["gradual_magnitude", recipe] for recipe in phases.RECIPES}
TABLE |= {(n, recipe): TABLE["magnitude", recipe] for n in ("group_lasso", "d_gating") for recipe in phases.RECIPES}
TABLE |= {(name, recipe): [(S, "100")] for name in ("rigl", "sparse_evolutionary") for recipe in phases.RECIPES}
# Several names have the same schedule: tests of schedules as values take each once.
DISTINCT = {getattr(phases, name)(1200, recipe=recipe): (name, recipe) for name, recipe in reversed(TABLE)}
distinct = pytest.mark.parametrize(("name", "recipe"), DISTINCT.values(), ids=map("-".join, DISTINCT.values()))


def percentages(text):
    """`"10/3"` as a share of the run, exactly."""
    return Fraction(text) / 100


def on(method, steps, *args):
    """A method of a schedule at each of many steps, one at a time."""
    return np.asarray(jax.vmap(lambda step: method(step, *args))(jnp.asarray(steps, jnp.int32)))


def curve(schedule, steps):
    """Share of the target sparsity at each step, by the formula of section 3.1 in float64."""
    c, values = schedule.exponent, []
    for step in steps:
        kind, start, stop = next(p for p in schedule.phases if step < p[2] or p == schedule.phases[-1])
        t = min((step - start) / (stop - start), 1.0)
        rising = (1 - np.exp(-c * t)) / (1 - np.exp(-c))
        values.append({D: 0.0, S: 1.0, RISING: rising}[kind])
    return np.asarray(values)


@hypothesis.given(total=st.integers(100, 10**7))
@hypothesis.example(total=100)
@hypothesis.example(total=112_590)
@hypothesis.example(total=150)
def test_named_schedules_follow_the_table(total):
    for (name, recipe), rows in TABLE.items():
        schedule = getattr(phases, name)(total, recipe=recipe)
        stops = [round(end * total) for end in itertools.accumulate(percentages(share) for _, share in rows)]
        expected = [(kind, *limits) for (kind, _), limits in zip(rows, itertools.pairwise([0, *stops]), strict=True)]
        assert [tuple(phase) for phase in schedule.phases] == expected, (name, recipe)
        assert all(start < stop for _, start, stop in expected), (name, recipe)
        assert stops[-1] == schedule.total_steps == total, (name, recipe)


def test_named_schedules_of_short_runs_are_refused_or_whole():
    for (name, recipe), rows in TABLE.items():
        refused = 0
        for total in range(1, 100):
            try:
                schedule = getattr(phases, name)(total, recipe=recipe)
            except ValueError as error:
                assert re.search(rf"phase \w+ \[(\d+), \1\) of {total} steps has no step", str(error))  # noqa: PT017
                refused += 1
            else:
                assert len(schedule.phases) == len(rows), (name, recipe)
                assert all(p.stop > p.start for p in schedule.phases), (name, recipe)
        assert refused or len(rows) == 1, (name, recipe)


def test_the_default_recipe_is_imagenet():
    for name, recipe in TABLE:
        same = getattr(phases, name)(1200) == getattr(phases, name)(1200, recipe=recipe)
        assert same == (TABLE[name, recipe] == TABLE[name, "imagenet"])


@hypothesis.given(total=st.integers(100, 200_000))
def test_without_sparsification_sequential_attention_alternates_like_acdc(total):
    for recipe in ("imagenet", "criteo"):
        schedule = phases.sequential_attention(total, recipe=recipe, sparsification=False)
        assert schedule.phases == phases.acdc(total, recipe=recipe).phases


def test_finetune_takes_its_sparse_share_and_exponent():
    assert phases.finetune(400) == phases.sequential_attention(400, recipe="finetune")
    schedule = phases.finetune(1000, sparse=0.35, exponent=2)
    assert schedule.phases == ((RISING, 0, 650), (S, 650, 1000))
    assert schedule.exponent == phases.gradual_magnitude(1000, recipe="finetune", exponent=2).exponent == 2
    for sparse in (0, 1, -0.1, 20, float("nan")):
        with pytest.raises(ValueError, match=f"between 0 and 1, such as 0.5; got {sparse}"):
            phases.finetune(100, sparse=sparse)
    with pytest.raises(ValueError, match=r"sparsification \[0, 0\) of 1 steps has no step"):
        phases.finetune(1, sparse=0.9)


def test_gradual_takes_its_shares_and_exponent():
    schedule = phases.gradual(1000, dense=0.2, sparse=0.35, exponent=2)
    assert [tuple(p) for p in schedule.phases] == [(D, 0, 200), (RISING, 200, 650), (S, 650, 1000)]
    assert schedule.exponent == phases.sequential_attention(1000, recipe="gradual", exponent=2).exponent == 2
    for shares in ({"dense": -0.1}, {"sparse": 0.0}, {"dense": 0.5, "sparse": 0.5}, {"dense": float("nan")}):
        with pytest.raises(ValueError, match="shares of the run with a sum below 1; got"):
            phases.gradual(100, **shares)


def test_the_exponent_reaches_the_schedule():
    assert phases.sequential_attention(100).exponent == 4
    assert phases.sequential_attention(100, exponent=2).exponent == 2
    assert phases.gradual_magnitude(100, exponent=8).exponent == 8


@st.composite
def schedules(draw):
    """Up to five phases of any kinds in any order, of 1 to 15 steps each."""
    rows = draw(st.lists(st.tuples(st.sampled_from([D, RISING, S]), st.integers(1, 15)), min_size=1, max_size=5))
    exponent = draw(st.sampled_from([0.01, 1.0, 4.0, 8.0, 50.0]))
    return phases.custom(sum(n for _, n in rows), rows, exponent=exponent)


STEPS = np.arange(80)  # beyond the end of any of these


@hypothesis.given(schedule=schedules())
def test_fraction_follows_the_curve(schedule):
    due = on(schedule.fraction, STEPS)
    assert due.dtype == np.float32
    np.testing.assert_allclose(due, curve(schedule, STEPS), atol=2e-6)
    for kind, start, stop in schedule.phases:
        inside = due[start:stop]
        if kind == RISING:
            assert inside[0] == 0
            assert (np.diff(inside) >= 0).all()
            assert (inside <= 1).all()
        else:
            np.testing.assert_array_equal(inside, 1 if kind == S else 0)
    np.testing.assert_array_equal(due[schedule.total_steps :], 0 if schedule.phases[-1].kind == D else 1)


@distinct
@problems.examples(5)
@hypothesis.given(total=st.integers(100, 1_000_000), seed=st.integers(0, 99))
def test_fraction_of_named_schedules(name, recipe, total, seed):
    schedule = getattr(phases, name)(total, recipe=recipe)
    edges = [edge for p in schedule.phases for edge in (p.start, p.stop - 1)]
    inside = np.random.default_rng(seed).integers(0, total, 150 - len(edges))  # one shape, compiled once
    steps = np.concatenate([edges, inside, [total, total + 5]])
    np.testing.assert_allclose(on(schedule.fraction, steps), curve(schedule, steps), atol=2e-6)


@pytest.mark.parametrize("c", [2.0, 4.0, 8.0])
def test_points_of_the_curve(c):
    schedule = phases.custom(8, [(RISING, 8)], exponent=c)
    half = (1 - np.exp(-c / 2)) / (1 - np.exp(-c))
    np.testing.assert_allclose(on(schedule.fraction, [0, 4, 8]), [0, half, 1], atol=1e-6)
    assert half > {2.0: 0.73, 4.0: 0.88, 8.0: 0.98}[c]  # the larger, the earlier


def walk(schedule, every):
    """What is due at each step from 0 to the last, by walking through the schedule as a training loop would."""
    rows, before = [], None
    for step in range(schedule.total_steps + 1):
        over = step == schedule.total_steps
        now = schedule.phases[-1] if over else next(p for p in schedule.phases if p[1] <= step < p[2])
        enters = now is not before and step > 0
        was, is_ = (before or now)[0], now[0]
        selects = enters and not was == is_ == S  # on entering a phase, unless sparse follows sparse
        if is_ == RISING:
            selects |= over or (step - now[1]) % every == 0  # inside it, and at the end of the run
        ends_rising = enters and was == RISING and is_ == S
        rows.append(
            {
                "is_boundary": enters,
                "selects": selects,
                "narrows": ends_rising or (is_ == RISING and step > now[1]),
                "reached": is_ == S or (over and is_ == RISING),
                "dense": is_ == D,
            }
        )
        before = now
    return {key: np.asarray([row[key] for row in rows]) for key in rows[0]}


@hypothesis.given(schedule=schedules(), every=st.sampled_from([1, 2, 3, 7, 100]))
def test_a_walk_through_the_steps(schedule, every):
    want = walk(schedule, every)
    end = schedule.total_steps + 1
    for name in ("is_boundary", "narrows", "reached"):
        np.testing.assert_array_equal(on(getattr(schedule, name), STEPS)[:end], want[name], err_msg=name)
    np.testing.assert_array_equal(on(schedule.selects, STEPS, every)[:end], want["selects"], err_msg="selects")
    np.testing.assert_array_equal(on(lambda step: schedule.kind_in([D], step), STEPS)[:end], want["dense"])


@hypothesis.given(schedule=schedules(), every=st.sampled_from([1, 3]))
def test_nothing_happens_after_the_run(schedule, every):
    after = STEPS[schedule.total_steps + 1 :]
    assert not on(schedule.is_boundary, STEPS)[after].any()
    assert not on(schedule.selects, STEPS, every)[after].any()
    np.testing.assert_array_equal(on(schedule.reached, STEPS)[after], schedule.phases[-1].kind != D)


@distinct
def test_a_walk_through_the_named_schedules(name, recipe):
    schedule = getattr(phases, name)(217, recipe=recipe)
    want = walk(schedule, 5)
    for key in ("is_boundary", "narrows", "reached"):
        np.testing.assert_array_equal(on(getattr(schedule, key), np.arange(218)), want[key], err_msg=key)
    np.testing.assert_array_equal(on(schedule.selects, np.arange(218), 5), want["selects"])


def test_methods_take_scalars_arrays_and_traced_steps():
    schedule = phases.sequential_attention(60)
    steps = np.arange(64)
    methods = [
        schedule.fraction,
        schedule.is_boundary,
        schedule.reached,
        schedule.narrows,
        lambda step: schedule.selects(step, 2),
        lambda step: schedule.kind_in([D, S], step),
    ]
    for method in methods:
        want = on(method, steps)
        np.testing.assert_array_equal(np.asarray([method(int(step)) for step in steps[::7]]), want[::7])
        np.testing.assert_array_equal(jax.jit(method)(jnp.asarray(13, jnp.int32)), want[13])
        np.testing.assert_array_equal(method(steps), want)
        np.testing.assert_array_equal(jax.jit(method)(jnp.asarray(steps.reshape(8, 8))), want.reshape(8, 8))


def test_methods_work_with_64_bit_types():
    schedule = phases.sequential_attention(60)
    with jax.enable_x64(True):
        for step in (13, jnp.asarray(13, jnp.int32)):
            np.testing.assert_allclose(schedule.fraction(step), curve(schedule, [13])[0], atol=1e-6)
            assert bool(schedule.is_boundary(step)) == bool(walk(schedule, 2)["is_boundary"][13])
            assert bool(schedule.selects(step, 2)) == bool(walk(schedule, 2)["selects"][13])


@hypothesis.given(schedule=schedules(), step=st.integers(0, 90))
def test_at_finds_the_phase(schedule, step):
    phase = schedule.at(step)
    assert phase.start <= step
    assert step < phase.stop or phase is schedule.phases[-1]


def test_schedules_are_values():
    assert phases.acdc(100) == phases.acdc(100)
    assert phases.acdc(100) != phases.acdc(101)
    assert hash(phases.acdc(100)) == hash(phases.acdc(100))
    assert Phases(9, ((D, 0, 4), (S, 4, 9))).phases[1].kind == S


# Custom schedules.

STAGES = [(D, 0, 200), (RISING, 200, 500), (S, 500, 1000)]


@pytest.mark.parametrize(
    "durations",
    [
        (200, 300, 500),
        (0.2, 0.3, 0.5),
        ("20%", "30%", "50%"),
        ("200 steps", "300steps", "500 steps"),
        ("4 epochs", "6 epochs", "10epochs"),
        ("20.0%", np.int64(300), "10.0 epochs"),
        (Fraction(1, 5), Fraction(3, 10), Fraction(1, 2)),
        ((0, 200), (200, 500), (500, 1000)),
        ((0, 0.2), ("20%", "10 epochs"), "500 steps"),
        (" 200 steps ", (0.2, "500 steps"), ("50 %", 1.0)),
    ],
    ids=repr,
)
def test_custom_reads_durations(durations):
    rows = [(row[0], *d) if isinstance(d, tuple) else (row[0], d) for row, d in zip(STAGES, durations, strict=True)]
    assert list(phases.custom(1000, rows, steps_per_epoch=50).phases) == STAGES


def test_one_step_and_one_epoch():
    rows = [(D, "1 step"), (S, "1 epoch"), (D, "2.5 epochs")]
    assert phases.custom(36, rows, steps_per_epoch=10).phases == ((D, 0, 1), (S, 1, 11), (D, 11, 36))


@hypothesis.given(total=st.integers(40, 10**6), cuts=st.sets(st.integers(1, 99), min_size=1, max_size=4))
def test_custom_rounds_boundaries_not_durations(total, cuts):
    """Rounding errors do not add up: each boundary is the step nearest to its own exact place."""
    edges = [0, *sorted(cuts), 100]
    kinds = itertools.cycle([D, RISING, S])
    shares = [b - a for a, b in itertools.pairwise(edges)]
    hypothesis.assume(min(shares) * total >= 200)  # at least two steps each
    rows = list(zip(kinds, shares, strict=False))
    for unit in (lambda share: f"{share}%", lambda share: share / 100, lambda share: Fraction(share, 100)):
        schedule = phases.custom(total, [(kind, unit(share)) for kind, share in rows])
        assert [p.stop for p in schedule.phases] == [round(Fraction(edge * total, 100)) for edge in edges[1:]]


def test_an_integer_is_steps_and_a_float_is_a_share_of_the_run():
    assert phases.custom(10, [(D, 9), (S, 1)]).phases[1] == (S, 9, 10)
    assert phases.custom(10, [(S, 1.0)]).phases[0] == (S, 0, 10)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(D, 0, 40), (S, 50, 100)], r"sparse \[50, 100\).*gap.*ends at step 40"),
        ([(D, 7, 100)], r"dense \[7, 100\).*gap.*ends at step 0"),
        ([(D, 0, 60), (S, 50, 100)], r"sparse \[50, 100\) overlaps.*ends at step 60"),
        ([(D, 50), (RISING, "20%"), (S, 0.2)], r"cover 90 steps, the run has 100"),
        ([(D, 50), (S, 60)], r"cover 110 steps, the run has 100"),
        ([], r"cover 0 steps, the run has 100"),
        ([(D, 0), (S, 100)], r"dense \[0, 0\) of 100 steps has no step"),
        ([(D, "99.6%"), (S, "0.4%")], r"sparse \[100, 100\) of 100 steps has no step"),
        ([(D, 60), (RISING, 60, 60), (S, 40)], r"sparsification \[60, 60\).*no step"),
        ([(D, 60, 40)], r"dense \[60, 40\).*no step"),
        ([(D, -5)], r"dense \[0, -5\).*no step"),
        ([(D, 50), ("spares", 50)], r"kind of phase 'spares'.*dense, sparsification, sparse"),
        ([(None, 100)], r"kind of phase None"),
        ([(D, "ten")], r"duration 'ten'"),
        ([(D, "10 minutes")], r"duration '10 minutes'"),
        ([(D, "-10%")], r"duration '-10%'"),
        ([(D, "50%%")], r"duration '50%%'"),
        ([(D, "")], r"duration ''"),
        ([(D, None)], r"duration None"),
        ([(D, True)], r"duration True"),
        ([(D, [1, 2])], r"duration \[1, 2\]"),
        ([(D, 1.5)], r"in \[0, 1\]; got 1.5"),
        ([(D, -0.25)], r"in \[0, 1\]; got -0.25"),
        ([(D, float("nan"))], r"in \[0, 1\]; got nan"),
        ([(D, "2.5 epochs")], r"'2.5 epochs' is in epochs: pass steps_per_epoch"),
        ([(D,)], r"got \('dense',\)"),
        ([(D, 0, 50, 100)], r"got \('dense', 0, 50, 100\)"),
    ],
    ids=problems.without_addresses,
)
def test_faulty_schedules_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        phases.custom(100, rows)


def test_phases_checks_what_it_is_given():
    with pytest.raises(ValueError, match=r"sparse \[6, 9\).*gap.*4"):
        Phases(9, ((D, 0, 4), (S, 6, 9)))
    with pytest.raises(ValueError, match=r"cover 9 steps, the run has 10"):
        Phases(10, ((D, 0, 4), (S, 4, 9)))


@pytest.mark.parametrize("total", [0, -3])
def test_a_run_without_steps_is_refused(total):
    with pytest.raises(ValueError, match=str(total)):
        phases.custom(total, [])
    with pytest.raises(ValueError, match=str(total)):
        phases.dense(total)


@pytest.mark.parametrize("exponent", [0, -1.5, 1e-50, float("inf"), float("nan")])
def test_exponents_out_of_range(exponent):
    with pytest.raises(ValueError, match=f"exponent must be between .* got {exponent}"):
        phases.sequential_attention(100, exponent=exponent)


def test_unknown_recipes_are_refused():
    for name, _ in TABLE:
        with pytest.raises(ValueError, match="unknown recipe 'mnist'; choose from imagenet, criteo, finetune, gradual"):
            getattr(phases, name)(100, recipe="mnist")


# What people look at.


@distinct
def test_the_table_has_a_line_for_each_phase(name, recipe):
    schedule = getattr(phases, name)(1200, recipe=recipe)
    head, *lines = str(schedule).splitlines()
    assert head.split()[:4] == ["phase", "from", "to", "share"]
    assert len(lines) == len(schedule.phases)
    for line, (kind, start, stop) in zip(lines, schedule.phases, strict=True):
        cells = line.split()
        assert cells[:3] == [kind, str(start), str(stop)]
        assert cells[3] == f"{100 * (stop - start) / 1200:.1f}%"
        assert " ".join(cells[4:]) == {D: "0", S: "1", RISING: "0 → 1 (c = 4)"}[kind]


def test_a_phase_prints_its_steps():
    assert str(phases.magnitude(100).phases[0]) == "dense [0, 85)"


@pytest.fixture
def axes():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


@pytest.mark.parametrize("name", ["sequential_attention", "acdc"])
def test_plot_draws_the_curve(name, axes):
    schedule = getattr(phases, name)(120)
    assert schedule.plot(sparsity=0.9, ax=axes) is axes
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xdata(), np.arange(121))
    np.testing.assert_allclose(line.get_ydata(), 0.9 * curve(schedule, np.arange(121)), atol=1e-5)
    assert line.get_drawstyle() == "steps-post"
    assert axes.get_xlim() == (0, 120)


def test_plot_shades_the_phases(axes):
    schedule = phases.sequential_attention(120)
    schedule.shade(axes)
    spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    np.testing.assert_allclose(spans, [(p.start, p.stop) for p in schedule.phases])
    colours = [matplotlib.colors.to_hex(patch.get_facecolor()) for patch in axes.patches]
    by_kind = {p.kind: colour for p, colour in zip(schedule.phases, colours, strict=True)}
    assert len(set(by_kind.values())) == 3
    assert colours == [by_kind[p.kind] for p in schedule.phases]
    assert sorted(axes.get_legend_handles_labels()[1]) == [D, S, RISING]


def test_plot_makes_its_own_axes():
    ax = phases.magnitude(20).plot()
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [0] * 17 + [1] * 4)
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {D, S}
    plt.close(ax.figure)
