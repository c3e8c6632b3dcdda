"""The training loop, the only one: any task, any algorithm, any mesh, one seed or several side by side."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import sa_plus_plus as sapp
from experiments.training.checkpoint import Checkpoints
from experiments.training.program import Program, next_batch, seed_argument, test_means, train_streams
from experiments.training.step import TrainState


class Row(NamedTuple):
    """Where a run stands after `step` steps. Arrays have one entry a seed.

    Attributes:
      step: steps done.
      phase: kind of phase of the next step.
      values: by name: `train_loss`, `sparsity` and the like, and `test_...` where it was evaluated.
      rate: steps per second since the last row.
      learning_rate: of the last step.
    """

    step: int
    phase: str
    values: dict[str, np.ndarray]
    rate: float
    learning_rate: float


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


class Preempted(Exception):
    """The run was stopped from outside after `step` steps and can be resumed."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after {step} steps")
        self.step = step


class Hooks(NamedTuple):
    """What happens around the loop.

    Attributes:
      on_start: called once with the steps done already: 0, or those of the checkpoint resumed from.
      on_row: called with each `Row`, in order.
      on_state: called at evaluations with `(step, state)`: for histograms and the like. The state is donated to the
        next step: take copies.
      checkpoints: where to save and to resume from; None for neither.
      on_step: called after each step, with the steps done; true to save and raise `Preempted`.
    """

    on_start: Callable[[int], None] = lambda step: None
    on_row: Callable[[Row], None] = lambda row: None
    on_state: Callable[[int, TrainState], None] = lambda step, state: None
    checkpoints: Checkpoints | None = None
    on_step: Callable[[int], bool] = lambda step: False


def train(program: Program, seeds: Sequence[int], hooks: Hooks | None = None) -> list[Outcome]:
    """Train and prune; resume from the newest intact checkpoint where there is one.

    Args:
      program: the compiled config.
      seeds: as many as it was compiled for; of initialisation, order of the data and random masks.
      hooks: what happens around the loop.

    Returns:
      An `Outcome` a seed. Where every seed's loss has become NaN or infinite the run ends there.

    Raises:
      Preempted: when `hooks.on_step` says so, after saving.
    """
    hooks = hooks or Hooks()
    config = program.setup.config
    if len(seeds) != program.seeds:
        raise ValueError(f"the program is compiled for {program.seeds} seeds, got {len(seeds)}")
    started, first_step_at = time.perf_counter(), float("nan")
    seed = seed_argument(seeds)
    streams = train_streams(program, seeds)
    state, first = _start(program, seed, streams, hooks.checkpoints)
    hooks.on_start(first)
    rows = _Rows(program, first, hooks.on_row)
    later_sparse = [p.start for p in program.phases.phases if p.kind == "sparse"][1:]  # with one before to differ from
    batch = next_batch(program, streams) if first < config.steps else None
    done = first
    for done in range(first + 1, config.steps + 1):
        state, means = program.functions.step(seed, state, batch)
        if done == first + 1:
            jax.block_until_ready(means)
            first_step_at = time.perf_counter()
        rows.write()  # of the step before, while the device is busy with the one just sent
        if rows.lost:
            break
        last = done == config.steps
        tests = last or done % config.eval_every == 0
        stopping = hooks.on_step(done)
        saves = hooks.checkpoints is not None and (last or stopping or done % config.checkpoint_every == 0)
        churn = means.pop("churn", None)
        if tests or done in later_sparse or done % config.log_every == 0:
            values = {f"train_{name}": x for name, x in means.items()} | program.status(state)
            if tests:
                values |= {f"test_{name}": x for name, x in test_means(program, seeds, state).items()}
                hooks.on_state(done, state)
            if done in later_sparse and churn is not None:
                values["churn"] = churn
            if "weight" in program.batch:
                values["skipped"] = np.array([stream.skipped for stream in streams])
            rows.add(done, values)
        if saves:
            rows.write()  # what is saved has its rows written
            if _none_finite(np.atleast_1d(means["loss"])):  # not worth keeping
                if not rows.lost:  # no row was due
                    rows.add(done, {"train_loss": means["loss"]} | program.status(state))
                break
            metric = rows.of(done).get(f"test_{program.setup.task.metric}")
            host = {"data": [stream.get_state() for stream in streams]}
            hooks.checkpoints.save(done, state, host, None if metric is None else float(np.mean(metric)))
        if stopping:
            if hooks.checkpoints is not None:
                hooks.checkpoints.wait()
            raise Preempted(done)
        if not last:
            batch = next_batch(program, streams)  # while the device computes
    rows.write()
    # Evaluated with the last row; again if that was written by an earlier session.
    ended = rows.all[-1].values if rows.all else _tested(program, seeds, state)
    missing = np.full(len(seeds), np.nan)
    test = {f"test_{name}": np.atleast_1d(ended.get(f"test_{name}", missing)) for name in program.outputs}
    losses = [row.values["train_loss"] for row in rows.all] + [test["test_loss"]]
    if hooks.checkpoints is not None:
        hooks.checkpoints.wait()
    seconds = (time.perf_counter() - started) / len(seeds)
    networks = program.functions.finalize(seed, state)
    if program.seeds > 1:
        split = [jax.tree.map(lambda x, n=n: x[n], networks) for n in range(program.seeds)]
    else:
        split = [networks]
    return [
        Outcome(
            seed=s,
            params=split[n][0],
            model_state=split[n][1],
            plan=program.setup.plan,
            phases=program.phases,
            steps=done,
            test={k: float(v[n]) for k, v in test.items()},
            rows=[row_of_seed(row, n) for row in rows.all],
            seconds=seconds,
            compile_seconds=program.compile_seconds,
            first_step_at=first_step_at,
            diverged=not all(np.isfinite(loss[n]) for loss in losses),
        )
        for n, s in enumerate(seeds)
    ]


class _Rows:
    """The rows of a session: added when they are dispatched, written when the device can be waited for."""

    def __init__(self, program: Program, first: int, on_row: Callable[[Row], None]) -> None:
        self.all: list[Row] = []
        self._phases, self._on_row = program.phases, on_row
        self._added: tuple[int, dict[str, jax.Array]] | None = None
        self._step, self._time = first, time.perf_counter()  # of the last row

    def add(self, done: int, values: dict[str, jax.Array]) -> None:
        self._added = done, values

    def write(self) -> None:
        """Wait for the row that was added, if any, and hand it over."""
        if self._added is None:
            return
        (done, values), self._added = self._added, None
        host = {name: np.atleast_1d(x) for name, x in values.items()}
        now = time.perf_counter()
        rate = (done - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = done, now
        learning_rate = float(host.pop("learning_rate")[0])
        self.all.append(Row(done, self._phases.at(done).kind, host, rate, learning_rate))
        self._on_row(self.all[-1])

    def of(self, done: int) -> dict[str, np.ndarray]:
        """What is written of a step; nothing where it has no row."""
        return self.all[-1].values if self.all and self.all[-1].step == done else {}

    @property
    def lost(self) -> bool:
        """Whether at the last row no seed's loss was finite any more."""
        return bool(self.all) and _none_finite(self.all[-1].values["train_loss"])


def _start(program: Program, seed: Any, streams: Any, checkpoints: Checkpoints | None) -> tuple[TrainState, int]:
    """The state to begin with and the steps it has done; the data streams are put where they belong."""
    restored = None if checkpoints is None else checkpoints.restore(program.state)
    if restored is None:
        return program.functions.init(seed), 0
    for stream, position in zip(streams, restored.host["data"], strict=True):
        stream.set_state(position)
    return restored.state, restored.step


def _tested(program: Program, seeds: Sequence[int], state: TrainState) -> dict[str, np.ndarray]:
    return {f"test_{name}": np.atleast_1d(x) for name, x in test_means(program, seeds, state).items()}


def _none_finite(losses: np.ndarray) -> bool:
    return not np.isfinite(losses).any()


def row_of_seed(row: Row, n: int) -> dict[str, Any]:
    """One seed's part of a row, flat, as `metrics.jsonl` has it: nothing of the clock, so that runs can be compared."""
    values = {name: float(x[n]) for name, x in row.values.items()}
    return {"step": row.step, "phase": row.phase, "learning_rate": row.learning_rate, **values}
