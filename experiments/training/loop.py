"""The training loop, the only one: any task, any algorithm, any mesh, one seed or several side by side."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import sa_plus_plus as sapp
from experiments import data
from experiments.training.checkpoint import Checkpoints
from experiments.training.program import Program, next_batch, seed_argument, test_means, train_streams
from experiments.training.reordering import Reordering, reordered
from experiments.training.rows import Row, Rows, none_finite
from experiments.training.step import TrainState


class Outcome(NamedTuple):
    """A finished run of one seed.

    Attributes:
      seed: its seed.
      params: the pruned network.
      model_state: what the model carries besides, such as running averages; may be empty.
      plan: what was to be pruned.
      phases: the schedule.
      steps: steps done.
      test: mean of each output over the test set, by the pruned network; NaN where the run ended early.
      rows: its rows of this session, each value a float.
      seconds: training and evaluation, shared evenly where seeds ran together; since the last restart.
      compile_seconds: of the program that it ran in.
      first_step_at: when this session's first step was done, on the clock of `time.perf_counter`; NaN without steps.
      diverged: whether a loss was not finite.
      reorderings: what was done to the order of its units, if anything.
    """

    seed: int
    params: Any
    model_state: Any
    plan: sapp.Plan
    phases: sapp.Phases
    steps: int
    test: dict[str, float]
    rows: list[dict[str, Any]]
    seconds: float
    compile_seconds: float
    first_step_at: float
    diverged: bool
    reorderings: Sequence[Reordering] = ()


class Preempted(Exception):
    """The run was stopped from outside after `step` steps and can be resumed."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after {step} steps")
        self.step = step


class Hooks(NamedTuple):
    """Callbacks of the loop.

    Attributes:
      on_start: called once with the steps done already: 0, or those of the checkpoint resumed from.
      on_row: called with each `Row`, in order.
      on_state: called at evaluations with `(step, state)`: for histograms and the like. The state is donated to the
        next step: take copies.
      on_step: called after each step, with the steps done; true to save and raise `Preempted`.
    """

    on_start: Callable[[int], None] = lambda step: None
    on_row: Callable[[Row], None] = lambda row: None
    on_state: Callable[[int, TrainState], None] = lambda step, state: None
    on_step: Callable[[int], bool] = lambda step: False


def train(
    program: Program, seeds: Sequence[int], hooks: Hooks | None = None, checkpoints: Checkpoints | None = None
) -> list[Outcome]:
    """Train and prune; resume from the newest intact checkpoint where there is one.

    Args:
      program: the compiled config.
      seeds: as many as it was compiled for; of initialisation, order of the data and random masks.
      hooks: what happens around the loop.
      checkpoints: where to save and to resume from; None for neither.

    Returns:
      An `Outcome` a seed. Where every seed's loss has become NaN or infinite the run ends there.

    Raises:
      Preempted: when `hooks.on_step` says so, after saving.
    """
    if len(seeds) != program.seeds:
        raise ValueError(f"the program is compiled for {program.seeds} seeds, got {len(seeds)}")
    started, hooks = time.perf_counter(), hooks or Hooks()
    streams = train_streams(program, seeds)
    state, first, reorderings = _start(program, seeds, streams, checkpoints)
    hooks.on_start(first)
    rows = Rows(program.phases, first, hooks.on_row)
    session = _Session(program, seeds, streams, rows, hooks, checkpoints, reorderings)
    state, done, first_step_at = _steps(session, state, first)
    session.rows.write()
    test = _last_test(session, state)
    if checkpoints is not None:
        checkpoints.wait()
    seconds = (time.perf_counter() - started) / len(seeds)
    return _outcomes(session, state, test, done, seconds, first_step_at)


class _Session(NamedTuple):
    """One call of `train`: its arguments, and what it feeds and fills."""

    program: Program
    seeds: Sequence[int]
    streams: Sequence[data.TrainIterator]
    rows: Rows
    hooks: Hooks
    checkpoints: Checkpoints | None
    reorderings: list[list[Reordering]]  # a list a seed


def _start(
    program: Program, seeds: Sequence[int], streams: Sequence[data.TrainIterator], checkpoints: Checkpoints | None
) -> tuple[TrainState, int, list[list[Reordering]]]:
    """The state to begin with, the steps it has done and the reorderings; data streams are put where they belong."""
    restored = None if checkpoints is None else checkpoints.restore(program.state)
    if restored is None:
        state, reorderings = program.functions.init(seed_argument(seeds)), [list[Reordering]() for _ in seeds]
        return _reordered(program, state, 0, reorderings), 0, reorderings
    for stream, position in zip(streams, restored.host["data"], strict=True):
        stream.set_state(position)
    saved = restored.host.get("reorderings") or [[] for _ in seeds]  # older checkpoints have none
    reorderings = [[Reordering(*each) for each in seed] for seed in saved]
    return restored.state, restored.step, reorderings


def _reordered(program: Program, state: TrainState, done: int, reorderings: list[list[Reordering]]) -> TrainState:
    """The state after `done` steps, in another order if that is due."""
    if done not in program.setup.reorder:
        return state
    state, found = reordered(program, state, done)
    for seed, each in zip(reorderings, found, strict=True):
        seed.append(each)
    return state


def _steps(session: _Session, state: TrainState, first: int) -> tuple[TrainState, int, float]:
    """The steps after the first `first`: the last state, the steps done, and when the first of these was done."""
    program, rows = session.program, session.rows
    total = program.setup.config.steps
    done, first_step_at = first, float("nan")
    batch = next_batch(program, session.streams) if first < total else None
    for done in range(first + 1, total + 1):
        state, means = program.functions.step(state, batch)
        if done == first + 1:
            jax.block_until_ready(means)
            first_step_at = time.perf_counter()
        rows.write()  # the previous step's row, while the device works on the one just sent
        if rows.lost:
            break
        state = _reordered(program, state, done, session.reorderings)
        stopping = session.hooks.on_step(done)
        _measure(session, done, state, means)
        if _save_is_due(session, done, stopping) and not _save(session, done, state, means):
            break
        if stopping:
            if session.checkpoints is not None:
                session.checkpoints.wait()
            raise Preempted(done)
        if done < total:
            batch = next_batch(program, session.streams)  # while the device computes
    return state, done, first_step_at


def _measure(session: _Session, done: int, state: TrainState, means: dict[str, jax.Array]) -> None:
    """Add the row of a step, if one is due."""
    program, config = session.program, session.program.setup.config
    sparse = [phase.start for phase in program.phases.phases if phase.kind == "sparse"]
    enters = done in sparse[1:]  # with a sparse phase before, which its masks differ from
    tests = done == config.steps or done % config.eval_every == 0
    if not (tests or enters or done % config.log_every == 0):
        return
    values: dict[str, jax.Array | np.ndarray] = {f"train_{n}": x for n, x in means.items() if n != "churn"}
    values |= program.status(state)
    if tests:
        values |= _tested(session, state)
        session.hooks.on_state(done, state)
    if enters and "churn" in means:
        values["churn"] = means["churn"]
    if "weight" in program.batch:
        values["skipped"] = np.array([stream.skipped for stream in session.streams])
    session.rows.add(done, values)


def _tested(session: _Session, state: TrainState) -> dict[str, jax.Array]:
    means = test_means(session.program, state)
    return {f"test_{name}": x for name, x in means.items()}


def _save_is_due(session: _Session, done: int, stopping: bool) -> bool:
    config = session.program.setup.config
    due = stopping or done == config.steps or done % config.checkpoint_every == 0
    return due and session.checkpoints is not None


def _save(session: _Session, done: int, state: TrainState, means: dict[str, jax.Array]) -> bool:
    """Save after a step; or end with a row where no seed's loss is finite: that is not worth keeping. True if saved."""
    program, rows = session.program, session.rows
    rows.write()  # what is saved has its rows written
    if none_finite(np.atleast_1d(means["loss"])):
        if not rows.lost:  # no row was due
            rows.add(done, {"train_loss": means["loss"]} | program.status(state))
        return False
    host = {"data": [stream.get_state() for stream in session.streams], "reorderings": session.reorderings}
    assert session.checkpoints is not None  # else no save is due
    session.checkpoints.save(done, state, host, _metric(session, done))
    return True


def _metric(session: _Session, done: int) -> float | None:
    """What makes a checkpoint the best, higher for a better one: the headline metric, or minus it. None where it was
    not measured, or on a network that is not as sparse as it is to be: dense, it would be better for that alone."""
    setup, phases = session.program.setup, session.program.phases
    metric = session.rows.of(done).get(f"test_{setup.task.metric}")
    if metric is None or (setup.plan.pruned and not phases.reached(done)):
        return None
    return float(np.mean(metric)) * (-1 if setup.task.lower_is_better else 1)


def _last_test(session: _Session, state: TrainState) -> dict[str, np.ndarray]:
    """The last row's evaluation, or another if that row was written by an earlier session; NaN where there was none."""
    rows, missing = session.rows.all, np.full(len(session.seeds), np.nan)
    values = rows[-1].values if rows else _tested(session, state)
    names = [f"test_{name}" for name in session.program.outputs]
    return {name: np.atleast_1d(values.get(name, missing)) for name in names}


def _outcomes(
    session: _Session,
    state: TrainState,
    test: dict[str, np.ndarray],
    done: int,
    seconds: float,
    first_step_at: float,
) -> list[Outcome]:
    """The result of each seed."""
    program, rows = session.program, session.rows.all
    networks = program.functions.finalize(state)
    losses = np.array([*(row.values["train_loss"] for row in rows), test["test_loss"]])
    outcomes = []
    for n, seed in enumerate(session.seeds):
        params, model_state = jax.tree.map(lambda x, n=n: x[n], networks) if program.seeds > 1 else networks
        outcomes.append(
            Outcome(
                seed=seed,
                params=params,
                model_state=model_state,
                plan=program.setup.plan,
                phases=program.phases,
                steps=done,
                test={name: float(x[n]) for name, x in test.items()},
                rows=[row.of_seed(n) for row in rows],
                seconds=seconds,
                compile_seconds=program.compile_seconds,
                first_step_at=first_step_at,
                diverged=not np.isfinite(losses[:, n]).all(),
                reorderings=session.reorderings[n],
            )
        )
    return outcomes
