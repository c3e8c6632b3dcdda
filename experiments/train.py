"""The training loop, the only one: any task, any algorithm, one seed or several side by side."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import sa_plus_plus as sapp
from experiments import building, data, naming, tasks

TASKS = ("classification",)


class TrainState(NamedTuple):
    """All that a step changes."""

    trainable: sapp.Trainable
    prune: sapp.PruneState
    opt_state: optax.OptState


class Functions(NamedTuple):
    """The pure functions of a run. `seed` is an integer or a tracer, so that they can be mapped over seeds.

    Attributes:
      init: `init(seed) -> state`.
      step: `step(seed, state, batch) -> (state, {name: mean over the batch})`.
      evaluate: `evaluate(seed, state, batch) -> {name: sum over the batch's real examples}`.
      finalize: `finalize(seed, state) -> params`.
    """

    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., dict[str, jax.Array]]
    finalize: Callable[..., Any]


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
      plan: what was to be pruned.
      phases: the schedule.
      test: mean of each output over the test set, by the pruned network; NaN where the run ended early.
      rows: its rows, each value a float.
      seconds: training and evaluation, shared evenly where seeds ran together.
      compile_seconds: of the program that it ran in.
      diverged: whether a loss was not finite.
    """

    seed: int
    params: Any
    plan: sapp.Plan
    phases: sapp.Phases
    test: dict[str, float]
    rows: list[dict[str, Any]]
    seconds: float
    compile_seconds: float
    diverged: bool


def task_of(config: ml_collections.ConfigDict) -> tasks.Task:
    """The task that a config names."""
    return getattr(tasks, naming.check(config.task, TASKS, "config.task"))(config)


def check(config: ml_collections.ConfigDict) -> sapp.Plan:
    """The plan of a run, after building all of it but the compiled step: so that what is wrong shows at once.

    Raises:
      ValueError: if any part of the config is out of range, unknown or does not fit the others.
    """
    for name in ("steps", "batch_size", "eval_batch_size", "log_every", "eval_every"):
        if config[name] < 1:
            raise ValueError(f"config.{name} must be at least 1, got {config[name]}")
    task = task_of(config)
    building.optimizer(config.optimizer, config.steps)
    next(data.batches(task.dataset.train, config.batch_size, config.seed))
    sp = building.sparsifier(config.sparsifier, config.steps, steps_per_epoch(config, task))
    return sp.plan(jax.eval_shape(task.init, jax.random.key(0)))


def steps_per_epoch(config: ml_collections.ConfigDict, task: tasks.Task) -> int:
    return max(1, round(data.arrays.size(task.dataset.train) / config.batch_size))


def functions(config: ml_collections.ConfigDict, task: tasks.Task) -> Functions:
    """The pure functions that a config describes."""
    tx, _ = building.optimizer(config.optimizer, config.steps)
    make = functools.partial(building.sparsifier, config.sparsifier, config.steps, steps_per_epoch(config, task))

    def init(seed: Any) -> TrainState:
        trainable, prune = make(seed).init(task.init(jax.random.key(seed)))
        return TrainState(trainable, prune, tx.init(trainable))

    def step(seed: Any, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        sp = make(seed)

        def mean_loss(trainable: sapp.Trainable) -> tuple[jax.Array, dict[str, jax.Array]]:
            means = jax.tree.map(jnp.mean, task.outputs(sp.apply(trainable, state.prune), batch))
            return means["loss"], means

        grads, means = jax.grad(mean_loss, has_aux=True)(state.trainable)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable, boundary=state.prune.boundary)
        trainable, prune = sp.update(state.trainable, state.prune, updates)
        return TrainState(trainable, prune, opt_state), means

    def evaluate(seed: Any, state: TrainState, batch: Any) -> dict[str, jax.Array]:
        outputs = task.outputs(make(seed).apply(state.trainable, state.prune), batch)
        return jax.tree.map(lambda x: jnp.sum(x * batch["weight"]), outputs)

    def finalize(seed: Any, state: TrainState) -> Any:
        return make(seed).finalize(state.trainable, state.prune)

    return Functions(init, step, evaluate, finalize)


def over_seeds(fns: Functions) -> Functions:
    """The same for several seeds at once: every argument and result gains a leading axis, but for the test batch.

    The step counter and the phase are the same for all seeds and stay scalars, so that the choice of masks remains a
    branch: mapped over, it would be computed at every step.
    """
    axes = TrainState(0, sapp.PruneState(step=None, boundary=None, masks=0), 0)
    return Functions(
        init=jax.vmap(fns.init, out_axes=axes),
        step=jax.vmap(fns.step, in_axes=(0, axes, 0), out_axes=(axes, 0)),
        evaluate=jax.vmap(fns.evaluate, in_axes=(0, axes, None)),
        finalize=jax.vmap(fns.finalize, in_axes=(0, axes)),
    )


class Program(NamedTuple):
    """A config's functions, compiled: for one seed at a time, or for several side by side.

    Attributes:
      config: the run's config.
      task: its task.
      sp: its algorithm.
      plan: what that prunes.
      seeds: how many seeds run side by side; with 1, arrays have no axis for them.
      functions: as `Functions`, compiled; `init` runs eagerly for one seed.
      status: `status(state)`: what the algorithm is doing.
      test: batches of the test set, on the device.
      compile_seconds: how long it took.
    """

    config: ml_collections.ConfigDict
    task: tasks.Task
    sp: sapp.Sparsifier
    plan: sapp.Plan
    seeds: int
    functions: Functions
    status: Callable[[TrainState], dict[str, jax.Array]]
    test: list[Any]
    compile_seconds: float


def compiled(config: ml_collections.ConfigDict, seeds: int = 1) -> Program:
    """Compile a config for `seeds` seeds side by side."""
    task, plan = task_of(config), check(config)
    started = time.perf_counter()
    fns = functions(config, task) if seeds == 1 else over_seeds(functions(config, task))
    test = [jax.device_put(batch) for batch in data.padded_batches(task.dataset.test, config.eval_batch_size)]
    seed = _seed_argument(range(seeds))
    state = jax.eval_shape(fns.init, seed)
    batch = _stacked([data.batches(task.dataset.train, config.batch_size, 0)] * seeds)
    status = jax.jit(functools.partial(_status, plan=plan, over_seeds=seeds > 1))
    return Program(
        config=config,
        task=task,
        sp=building.sparsifier(config.sparsifier, config.steps, steps_per_epoch(config, task)),
        plan=plan,
        seeds=seeds,
        functions=Functions(
            # Eagerly for one seed: there the algorithm can look at the kernels' values and refuse NaN.
            init=fns.init if seeds == 1 else jax.jit(fns.init),
            step=jax.jit(fns.step, donate_argnums=1).lower(seed, state, batch).compile(),
            evaluate=jax.jit(fns.evaluate).lower(seed, state, test[0]).compile(),
            finalize=jax.jit(fns.finalize),
        ),
        status=status.lower(state).compile(),
        test=test,
        compile_seconds=time.perf_counter() - started,
    )


def train(program: Program, seeds: Sequence[int], on_row: Callable[[Row], None] = lambda row: None) -> list[Outcome]:
    """Train and prune.

    Args:
      program: the compiled config.
      seeds: as many as it was compiled for; of initialisation, order of the data and random masks.
      on_row: called with each `Row`, every `config.log_every` steps and at evaluations.

    Returns:
      An `Outcome` a seed. Where every seed's loss has become NaN or infinite the run ends there.
    """
    config, sp, fns = program.config, program.sp, program.functions
    if len(seeds) != program.seeds:
        raise ValueError(f"the program is compiled for {program.seeds} seeds, got {len(seeds)}")
    _, schedule = building.optimizer(config.optimizer, config.steps)
    examples = data.arrays.size(program.task.dataset.test)
    seed = _seed_argument(seeds)
    streams = [data.batches(program.task.dataset.train, config.batch_size, s) for s in seeds]
    state = fns.init(seed)
    rows: list[Row] = []
    since = started = time.perf_counter()

    def tested(state: TrainState) -> dict[str, jax.Array]:
        sums = [fns.evaluate(seed, state, batch) for batch in program.test]
        return {f"test_{name}": sum(s[name] for s in sums) / examples for name in sums[0]}

    def report(done: int, values: dict[str, jax.Array]) -> None:
        nonlocal since
        host = {name: np.atleast_1d(np.asarray(x)) for name, x in values.items()}  # waits for the device
        per_second = (done - (rows[-1].step if rows else 0)) / max(time.perf_counter() - since, 1e-9)
        since = time.perf_counter()
        rows.append(Row(done, sp.phases.at(done).kind, host, per_second, float(schedule(done - 1))))
        on_row(rows[-1])

    enters_sparse = {p.start for p in sp.phases.phases if p.kind == "sparse"}
    sparse_masks: Any = None
    pending: tuple[int, dict[str, jax.Array]] | None = None
    for done in range(1, config.steps + 1):
        state, means = fns.step(seed, state, _stacked(streams))
        if pending is not None:  # read while the device is busy with the step just sent
            report(*pending)
            pending = None
            if not any(np.isfinite(rows[-1].values["train_loss"])):
                break
        is_test = done == config.steps or done % config.eval_every == 0
        if is_test or done in enters_sparse or done % config.log_every == 0:
            values = {f"train_{name}": x for name, x in means.items()} | program.status(state)
            if is_test:
                values |= tested(state)
            if done in enters_sparse:
                before, sparse_masks = sparse_masks, jax.tree.map(np.asarray, state.prune.masks)
                if before is not None:
                    values["churn"] = _churn(before, sparse_masks, over_seeds=program.seeds > 1)
            pending = done, values
    if pending is not None:
        report(*pending)
    seconds = (time.perf_counter() - started) / len(seeds)
    params = fns.finalize(seed, state)
    last = rows[-1].values  # without results on the test set, if the run ended early
    tests = {f"test_{name}": last.get(f"test_{name}", np.full(len(seeds), np.nan)) for name in means}
    return [
        Outcome(
            seed=s,
            params=jax.tree.map(lambda x, n=n: x[n], params) if program.seeds > 1 else params,
            plan=program.plan,
            phases=sp.phases,
            test={name: float(x[n]) for name, x in tests.items()},
            rows=[row_of_seed(row, n) for row in rows],
            seconds=seconds,
            compile_seconds=program.compile_seconds,
            diverged=not np.isfinite([tests["test_loss"][n], *(row.values["train_loss"][n] for row in rows)]).all(),
        )
        for n, s in enumerate(seeds)
    ]


def _seed_argument(seeds: Sequence[int]) -> np.ndarray:
    """One seed as a scalar, several as a vector."""
    return np.asarray(seeds if len(seeds) > 1 else seeds[0], np.int32)


def _stacked(streams: Sequence[Iterator[data.arrays.Batch]]) -> Any:
    """The next batch; those of several seeds along a new leading axis."""
    parts = [next(stream) for stream in streams]
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.stack(x), *parts)


def _status(state: TrainState, plan: sapp.Plan, over_seeds: bool) -> dict[str, jax.Array]:
    """What the algorithm is doing: sparsity of all kernels; mean entropy and largest of the attention weights."""

    def one(masks: Any, trainable: sapp.Trainable) -> dict[str, jax.Array]:
        values = {"sparsity": sapp.metrics.kernel_sparsity(masks, plan)}
        attention = list(sapp.metrics.attention(trainable).values())
        if attention:
            values["attention_entropy"] = jnp.mean(jnp.stack([a["entropy"] for a in attention]))
            values["attention_max"] = jnp.max(jnp.stack([a["max"] for a in attention]))
        return values

    return (jax.vmap(one) if over_seeds else one)(state.prune.masks, state.trainable)


def _churn(before: Any, after: Any, over_seeds: bool) -> jax.Array:
    """Mean over the layers of how far the masks of two sparse phases differ."""
    fn = jax.vmap(sapp.metrics.churn) if over_seeds else sapp.metrics.churn
    return jnp.mean(jnp.stack(list(fn(before, after).values())), axis=0)


def row_of_seed(row: Row, n: int) -> dict[str, Any]:
    """One seed's part of a row, flat, as `metrics.jsonl` has it."""
    values = {name: float(x[n]) for name, x in row.values.items()}
    return {"step": row.step, "phase": row.phase, "learning_rate": row.learning_rate, **values, "steps_per_s": row.rate}
