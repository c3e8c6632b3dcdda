"""The training loop, the only one: any task, any algorithm, any mesh, one seed or several side by side."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

import sa_plus_plus as sapp
from experiments import building, data, evaluate, naming, sharding, tasks
from experiments.checkpoint import Checkpoints

TASKS = ("classification", "reconstruction")


class TrainState(NamedTuple):
    """All that a step changes. The number of steps done is `prune.step`.

    Attributes:
      trainable: weights and logits.
      prune: masks, step, phase boundary.
      opt_state: the optimizer's.
      model_state: what the model carries itself, such as running averages; may be empty.
      sparse_masks: those of the latest sparse phase: what the next one's churn is measured against.
    """

    trainable: sapp.Trainable
    prune: sapp.PruneState
    opt_state: optax.OptState
    model_state: Any
    sparse_masks: dict[str, jax.Array]


class Functions(NamedTuple):
    """The pure functions of a run. `seed` is an integer or a tracer, so that they can be mapped over seeds.

    Attributes:
      init: `init(seed) -> state`.
      step: `step(seed, state, batch) -> (state, {name: mean over the batch, and churn})`.
      evaluate: `evaluate(seed, state, batch) -> {name: sum over the batch's real examples, and weight}`.
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
      steps: steps done.
      test: mean of each output over the test set, by the pruned network; NaN where the run ended early.
      rows: its rows of this session, each value a float.
      seconds: training and evaluation, shared evenly where seeds ran together; since the last restart.
      compile_seconds: of the program that it ran in.
      diverged: whether a loss was not finite.
    """

    seed: int
    params: Any
    plan: sapp.Plan
    phases: sapp.Phases
    steps: int
    test: dict[str, float]
    rows: list[dict[str, Any]]
    seconds: float
    compile_seconds: float
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


def task_of(config: ml_collections.ConfigDict) -> tasks.Task:
    """The task that a config names."""
    return getattr(tasks, naming.check(config.task, TASKS, "config.task"))(config)


def steps_per_epoch(config: ml_collections.ConfigDict, task: tasks.Task) -> int:
    return max(1, round(len(task.dataset.train) / config.batch_size))


def check(config: ml_collections.ConfigDict, mesh: Mesh | None = None) -> sapp.Plan:
    """The plan of a run, after building all of it but the compiled step: so that what is wrong shows at once.

    Raises:
      ValueError: if any part of the config is out of range, unknown or does not fit the others.
    """
    for name in ("steps", "batch_size", "eval_batch_size", "log_every", "eval_every", "checkpoint_every", "keep"):
        if config[name] < 1:
            raise ValueError(f"config.{name} must be at least 1, got {config[name]}")
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp)
    for name in ("batch_size", "eval_batch_size"):
        sharding.check_batch(config[name], mesh, f"config.{name}")
    task = task_of(config)
    if config.batch_size > len(task.dataset.train):
        raise ValueError(
            f"config.batch_size={config.batch_size} exceeds the {len(task.dataset.train)} training examples"
        )
    building.optimizer(config.optimizer, config.steps)
    sp = building.sparsifier(config.sparsifier, config.steps, steps_per_epoch(config, task))
    return sp.plan(jax.eval_shape(task.init, jax.random.key(0))[0])


def functions(config: ml_collections.ConfigDict, task: tasks.Task) -> Functions:
    """The pure functions that a config describes."""
    tx, _ = building.optimizer(config.optimizer, config.steps)
    make = functools.partial(building.sparsifier, config.sparsifier, config.steps, steps_per_epoch(config, task))

    def init(seed: Any) -> TrainState:
        params, model_state = task.init(jax.random.key(seed))
        trainable, prune = make(seed).init(params)
        # Its own buffers: a state is donated leaf by leaf.
        sparse_masks = jax.tree.map(jnp.copy, prune.masks)
        return TrainState(trainable, prune, tx.init(trainable), model_state, sparse_masks)

    def step(seed: Any, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        sp = make(seed)

        def mean_loss(trainable: sapp.Trainable) -> tuple[jax.Array, Any]:
            params = sp.apply(trainable, state.prune)
            outputs, model_state = task.outputs(params, state.model_state, batch, training=True)
            means = jax.tree.map(jnp.mean, outputs)
            return means["loss"], (means, model_state)

        grads, (means, model_state) = jax.grad(mean_loss, has_aux=True)(state.trainable)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable, boundary=state.prune.boundary)
        trainable, prune = sp.update(state.trainable, state.prune, updates)
        entered = prune.boundary & sp.phases.kind_in(["sparse"], prune.step)
        churn = list(sapp.metrics.churn(state.sparse_masks, prune.masks).values())
        sparse_masks = jax.tree.map(lambda new, old: jnp.where(entered, new, old), prune.masks, state.sparse_masks)
        state = TrainState(trainable, prune, opt_state, model_state, sparse_masks)
        return state, means | ({"churn": jnp.mean(jnp.stack(churn))} if churn else {})

    def evaluate_batch(seed: Any, state: TrainState, batch: Any) -> dict[str, jax.Array]:
        params = make(seed).apply(state.trainable, state.prune)
        outputs, _ = task.outputs(params, state.model_state, batch, training=False)
        return evaluate.weighted_sums(outputs, batch["weight"])

    def finalize(seed: Any, state: TrainState) -> Any:
        return make(seed).finalize(state.trainable, state.prune)

    return Functions(init, step, evaluate_batch, finalize)


def over_seeds(fns: Functions) -> Functions:
    """The same for several seeds at once: every argument and result gains a leading axis, but for the test batch.

    The step counter and the phase are the same for all seeds and stay scalars, so that the choice of masks remains a
    branch: mapped over, it would be computed at every step.
    """
    axes = TrainState(0, sapp.PruneState(step=None, boundary=None, masks=0), 0, 0, 0)
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
      functions: as `Functions`, compiled.
      status: `status(state)`: what the algorithm is doing.
      outputs: names of the task's outputs.
      state: shapes, dtypes and shardings of a state.
      train_sharding: of a training batch.
      test_sharding: of a test batch.
      compile_seconds: how long it took.
    """

    config: ml_collections.ConfigDict
    task: tasks.Task
    sp: sapp.Sparsifier
    plan: sapp.Plan
    seeds: int
    functions: Functions
    status: Callable[[TrainState], dict[str, jax.Array]]
    outputs: tuple[str, ...]
    state: TrainState
    train_sharding: Any
    test_sharding: Any
    compile_seconds: float


def compiled(config: ml_collections.ConfigDict, seeds: int = 1, mesh: Mesh | None = None) -> Program:
    """Compile a config for `seeds` seeds side by side; on a mesh of all devices unless another is given."""
    started = time.perf_counter()
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp)
    task, plan = task_of(config), check(config, mesh)
    fns = functions(config, task) if seeds == 1 else over_seeds(functions(config, task))
    seed = _seed_argument(range(seeds))
    shapes = jax.eval_shape(fns.init, seed)
    layout = sharding.of_state(shapes, mesh)
    state = sharding.abstract(shapes, layout)
    whole = sharding.replicated(mesh)
    train_sharding = sharding.of_batch(mesh, example_axis=int(seeds > 1))
    test_sharding = sharding.of_batch(mesh)
    batch = _batch_shapes(next(_streams(config, task, [0] * seeds)[0]), config.batch_size, seeds, train_sharding)
    test = _batch_shapes(next(iter(_test_batches(config, task))), config.eval_batch_size, 1, test_sharding)
    status = jax.jit(functools.partial(_status, plan=plan, over_seeds=seeds > 1), out_shardings=whole)
    return Program(
        config=config,
        task=task,
        sp=building.sparsifier(config.sparsifier, config.steps, steps_per_epoch(config, task)),
        plan=plan,
        seeds=seeds,
        functions=Functions(
            init=jax.jit(fns.init, out_shardings=layout),
            step=jax.jit(fns.step, donate_argnums=1, out_shardings=(layout, whole)).lower(seed, state, batch).compile(),
            evaluate=jax.jit(fns.evaluate, out_shardings=whole).lower(seed, state, test).compile(),
            finalize=jax.jit(fns.finalize, out_shardings=whole),
        ),
        status=status.lower(state).compile(),
        outputs=tuple(name for name in jax.eval_shape(fns.evaluate, seed, state, test) if name != "weight"),
        state=state,
        train_sharding=train_sharding,
        test_sharding=test_sharding,
        compile_seconds=time.perf_counter() - started,
    )


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
    config, sp, fns = program.config, program.sp, program.functions
    if len(seeds) != program.seeds:
        raise ValueError(f"the program is compiled for {program.seeds} seeds, got {len(seeds)}")
    _, schedule = building.optimizer(config.optimizer, config.steps)
    seed = _seed_argument(seeds)
    streams = _streams(config, program.task, seeds)
    state, first = _start(program, seed, streams, hooks.checkpoints)
    hooks.on_start(first)
    rows: list[Row] = []
    since = started = time.perf_counter()
    since_step = first

    def tested(state: TrainState) -> dict[str, jax.Array]:
        batches = (sharding.place(batch, program.test_sharding) for batch in _test_batches(config, program.task))
        means = evaluate.means(lambda batch: fns.evaluate(seed, state, batch), batches)
        return {f"test_{name}": x for name, x in means.items()}

    def report(done: int, values: dict[str, jax.Array]) -> None:
        nonlocal since, since_step
        host = {name: np.atleast_1d(np.asarray(x)) for name, x in values.items()}  # waits for the device
        now = time.perf_counter()
        rate = (done - since_step) / max(now - since, 1e-9)
        since, since_step = now, done
        rows.append(Row(done, sp.phases.at(done).kind, host, rate, float(schedule(done - 1))))
        hooks.on_row(rows[-1])

    later_sparse = [p.start for p in sp.phases.phases if p.kind == "sparse"][1:]  # the first has nothing to differ from
    pending: tuple[int, dict[str, jax.Array]] | None = None
    batch = _stacked(streams, program) if first < config.steps else None
    done, means = first, None
    for done in range(first + 1, config.steps + 1):
        state, means = fns.step(seed, state, batch)
        if pending is not None:  # read while the device is busy with the step just sent
            report(*pending)
            pending = None
            if _lost(rows[-1].values["train_loss"]):
                break
        last = done == config.steps
        tests = last or done % config.eval_every == 0
        if tests or done in later_sparse or done % config.log_every == 0:
            churn = means.pop("churn", None)
            values = {f"train_{name}": x for name, x in means.items()} | program.status(state)
            if tests:
                values |= tested(state)
                hooks.on_state(done, state)
            if done in later_sparse and churn is not None:
                values["churn"] = churn
            pending = done, values
        stopping = hooks.on_step(done)
        if hooks.checkpoints is not None and (last or stopping or done % config.checkpoint_every == 0):
            if pending is not None:  # what is saved has its rows written
                report(*pending)
                pending = None
            if _lost(np.atleast_1d(np.asarray(means["loss"]))):  # not worth keeping
                if not rows or rows[-1].step != done:
                    report(done, {"train_loss": means["loss"]} | program.status(state))
                break
            metric = rows[-1].values.get(f"test_{program.task.metric}") if rows and rows[-1].step == done else None
            host = {"data": [stream.get_state() for stream in streams]}
            hooks.checkpoints.save(done, state, host, None if metric is None else float(np.mean(metric)))
        if stopping:
            if hooks.checkpoints is not None:
                hooks.checkpoints.wait()
            raise Preempted(done)
        if not last:
            batch = _stacked(streams, program)  # while the device computes
    if pending is not None:
        report(*pending)
    diverged = [bool(rows) and any(not np.isfinite(r.values["train_loss"][n]) for r in rows) for n in range(len(seeds))]
    # Evaluated with the last row; again if that was written by an earlier session.
    ended = rows[-1].values if rows else tested(state)
    names = [f"test_{name}" for name in program.outputs]
    test = {name: np.atleast_1d(np.asarray(ended.get(name, np.full(len(seeds), np.nan)))) for name in names}
    diverged = [d or not np.isfinite(test["test_loss"][n]) for n, d in enumerate(diverged)]
    if hooks.checkpoints is not None:
        hooks.checkpoints.wait()
    seconds = (time.perf_counter() - started) / len(seeds)
    params = fns.finalize(seed, state)
    return [
        Outcome(
            seed=s,
            params=jax.tree.map(lambda x, n=n: x[n], params) if program.seeds > 1 else params,
            plan=program.plan,
            phases=sp.phases,
            steps=done,
            test={k: float(v[n]) for k, v in test.items()},
            rows=[row_of_seed(row, n) for row in rows],
            seconds=seconds,
            compile_seconds=program.compile_seconds,
            diverged=diverged[n],
        )
        for n, s in enumerate(seeds)
    ]


def _start(program: Program, seed: Any, streams: Any, checkpoints: Checkpoints | None) -> tuple[TrainState, int]:
    """The state to begin with and the steps it has done; the data streams are put where they belong."""
    restored = None if checkpoints is None else checkpoints.restore(program.state)
    if restored is None:
        return program.functions.init(seed), 0
    for stream, position in zip(streams, restored.host["data"], strict=True):
        stream.set_state(position)
    return restored.state, restored.step


def _lost(losses: np.ndarray) -> bool:
    """Whether no seed's loss is finite any more."""
    return not np.isfinite(losses).any()


def _seed_argument(seeds: Sequence[int]) -> np.ndarray:
    """One seed as a scalar, several as a vector."""
    return np.asarray(seeds if len(seeds) > 1 else seeds[0], np.int32)


def _streams(config: ml_collections.ConfigDict, task: tasks.Task, seeds: Sequence[int]) -> list[Any]:
    """This host's part of the training batches, a stream a seed."""
    hosts = jax.process_index(), jax.process_count()
    return [data.train_iterator(task.dataset.train, config.batch_size, s, *hosts) for s in seeds]


def _test_batches(config: ml_collections.ConfigDict, task: tasks.Task) -> Any:
    return data.eval_batches(task.dataset.test, config.eval_batch_size, jax.process_index(), jax.process_count())


def _stacked(streams: Sequence[Any], program: Program) -> Any:
    """The next batch on the devices; those of several seeds along a new leading axis."""
    parts = [next(stream) for stream in streams]
    batch = parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.stack(x), *parts)
    return sharding.place(batch, program.train_sharding)


def _batch_shapes(example: Any, size: int, seeds: int, layout: Any) -> Any:
    """Shapes of a global batch, from one host's."""
    lead = (seeds,) if seeds > 1 else ()
    return {k: jax.ShapeDtypeStruct((*lead, size, *x.shape[1:]), x.dtype, sharding=layout) for k, x in example.items()}


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


def row_of_seed(row: Row, n: int) -> dict[str, Any]:
    """One seed's part of a row, flat, as `metrics.jsonl` has it: nothing of the clock, so that runs can be compared."""
    values = {name: float(x[n]) for name, x in row.values.items()}
    return {"step": row.step, "phase": row.phase, "learning_rate": row.learning_rate, **values}
