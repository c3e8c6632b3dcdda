"""A run as the loop needs it: all parts of its config checked, and its pure functions compiled."""

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
from experiments import building, data, evaluate, naming, sharding, tables, tasks

TASKS = ("classification", "click_prediction", "reconstruction")


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
      evaluate: `evaluate(seed, state, batch) -> ({name: sum over the batch's real examples, and weight}, ranked)`.
      finalize: `finalize(seed, state) -> (params, model_state)`: the pruned network.
    """

    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., tuple[dict[str, jax.Array], Any]]
    finalize: Callable[..., Any]


class Setup(NamedTuple):
    """The parts of a run that its config describes.

    Attributes:
      config: the config.
      mesh: the devices.
      task: what is trained.
      tx: the optimizer.
      schedule: learning rate against step.
      sparsifier: `sparsifier(seed) -> Sparsifier`; the seed may be traced, and matters to `random` alone.
      plan: what is pruned.
      table: the embedding table of which a step touches only the batch's rows; None for steps on all parameters.
    """

    config: ml_collections.ConfigDict
    mesh: Mesh
    task: tasks.Task
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    sparsifier: Callable[..., sapp.Sparsifier]
    plan: sapp.Plan
    table: tables.Table | None


class Program(NamedTuple):
    """A config's functions, compiled: for one seed at a time, or for several side by side.

    Attributes:
      setup: the parts of the run.
      phases: its schedule.
      seeds: how many seeds run side by side; with 1, arrays have no axis for them.
      functions: as `Functions`, compiled.
      status: `status(state)`: what the algorithm is doing, and the learning rate of the last step.
      outputs: names of what `test_means` gives.
      state: shapes, dtypes and shardings of a state.
      batch: shapes, dtypes and shardings of a training batch.
      test_sharding: of a test batch.
      compile_seconds: how long it took.
    """

    setup: Setup
    phases: sapp.Phases
    seeds: int
    functions: Functions
    status: Callable[[TrainState], dict[str, jax.Array]]
    outputs: tuple[str, ...]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    test_sharding: Any
    compile_seconds: float


def prepare(config: ml_collections.ConfigDict, mesh: Mesh | None = None, dataset: data.Dataset | None = None) -> Setup:
    """Build every part of a run but the compiled step, so that what is wrong with a config shows at once.

    Args:
      config: of the run. In the result, lengths in epochs are resolved to steps, and the learning rate to its batch.
      mesh: the devices; by default all of them, as `config.mesh` has it.
      dataset: what to train on, other than `config.data`.

    Raises:
      ValueError: if any part of the config is out of range, unknown or does not fit the others.
    """
    for name in ("batch_size", "eval_batch_size", "log_every", "eval_every", "checkpoint_every", "keep"):
        if config[name] < 1:
            raise ValueError(f"config.{name} must be at least 1, got {config[name]}")
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp)
    for name in ("batch_size", "eval_batch_size"):
        sharding.check_batch(config[name], mesh, f"config.{name}")
    make_task = getattr(tasks, naming.check(config.task, TASKS, "config.task"))
    task = make_task(config, dataset or tasks.dataset_of(config.data))
    examples = len(task.dataset.train)
    if config.batch_size > examples:
        raise ValueError(f"config.batch_size={config.batch_size} exceeds the {examples} training examples")
    config = _resolved(config, examples)
    tx, schedule = building.optimizer(config.optimizer, config.steps)
    epoch = max(1, round(examples / config.batch_size))
    sparsifier = functools.partial(building.sparsifier, config.sparsifier, config.steps, epoch)
    plan = sparsifier(config.seed).plan(jax.eval_shape(task.init, jax.random.key(0))[0])
    return Setup(config, mesh, task, tx, schedule, sparsifier, plan, _table(config.optimizer.rows, task))


def prepare_without_data(config: ml_collections.ConfigDict, sparsity: float | None = None) -> Setup:
    """As `prepare`, on one device and with blank examples where the data set's shapes are known beforehand."""
    config = config.copy_and_resolve_references()
    if sparsity is not None:
        config.sparsifier.sparsity = sparsity
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return prepare(config, mesh, data.declared(config.data.name, config.data.options.get("size")))


def _table(rows: str, task: tasks.Task) -> tables.Table | None:
    """The table that an optimizer for the rows of the batch alone works on."""
    if naming.check(rows, ["all", "batch"], "config.optimizer.rows") == "all":
        return None
    if task.table is None:
        raise ValueError('config.optimizer.rows="batch" is for models with an embedding table; this one has none')
    return task.table


def _resolved(config: ml_collections.ConfigDict, examples: int) -> ml_collections.ConfigDict:
    """The config with its lengths in steps and its learning rate as it applies."""
    config, optimizer = config.copy_and_resolve_references(), config.optimizer
    per_epoch = examples / config.batch_size
    if config.steps == 0:
        config.steps = round(config.epochs * per_epoch)
    if config.steps < 1:
        raise ValueError(f"config.steps, or else config.epochs, must be positive: got {config.steps}, {config.epochs}")
    if optimizer.warmup_steps == 0:
        config.optimizer.warmup_steps = round(optimizer.warmup_epochs * per_epoch)
    if optimizer.scale_batch:
        config.optimizer.learning_rate = optimizer.learning_rate * config.batch_size / optimizer.scale_batch
    return config


def functions(setup: Setup) -> Functions:
    """The pure functions of a run."""
    task, tx, make = setup.task, setup.tx, setup.sparsifier

    def init(seed: Any) -> TrainState:
        params, model_state = task.init(jax.random.key(seed))
        trainable, prune = make(seed).init(params)
        # Its own buffers: a state is donated leaf by leaf.
        sparse_masks = jax.tree.map(jnp.copy, prune.masks)
        return TrainState(trainable, prune, tx.init(trainable), model_state, sparse_masks)

    def step(
        seed: Any, state: TrainState, batch: Any, outputs_of: Callable[..., Any] = task.outputs
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        sp = make(seed)

        def mean_loss(trainable: sapp.Trainable) -> tuple[jax.Array, Any]:
            params = sp.apply(trainable, state.prune)
            outputs, model_state = outputs_of(params, state.model_state, batch, training=True)
            means = evaluate.mean(outputs, batch.get("weight"))
            return means["loss"], (means, model_state)

        grads, (means, model_state) = jax.grad(mean_loss, has_aux=True)(state.trainable)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable, boundary=state.prune.boundary)
        trainable, prune = sp.update(state.trainable, state.prune, updates)
        entered = prune.boundary & sp.phases.kind_in(["sparse"], prune.step)
        churn = list(sapp.metrics.churn(state.sparse_masks, prune.masks).values())
        sparse_masks = jax.tree.map(lambda new, old: jnp.where(entered, new, old), prune.masks, state.sparse_masks)
        state = TrainState(trainable, prune, opt_state, model_state, sparse_masks)
        return state, means | ({"churn": jnp.mean(jnp.stack(churn))} if churn else {})

    def evaluate_batch(seed: Any, state: TrainState, batch: Any) -> tuple[dict[str, jax.Array], Any]:
        params = make(seed).apply(state.trainable, state.prune)
        outputs, _ = task.outputs(params, state.model_state, batch, training=False)
        ranked = None
        if task.ranked:
            ranked = evaluate.Ranked(*(outputs[name] for name in task.ranked), batch["weight"])
        return evaluate.weighted_sums(outputs, batch["weight"]), ranked

    def finalize(seed: Any, state: TrainState) -> Any:
        return make(seed).finalize(state.trainable, state.prune), state.model_state

    return Functions(init, _on_rows(step, setup.table) if setup.table else step, evaluate_batch, finalize)


def _on_rows(step: Callable[..., Any], table: tables.Table) -> Callable[..., Any]:
    """The same step with the table cut down to the rows of the batch, which are then put back."""
    path = table.path

    def step_on_rows(seed: Any, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        rows, positions = tables.taken(table.rows(batch), table.length)
        opt_state = tables.fresh_at(state.prune.boundary, path, state.opt_state)
        small = state._replace(
            trainable=tables.take(path, state.trainable, rows), opt_state=tables.take(path, opt_state, rows)
        )
        outputs_of = table.outputs(rows.shape[0])
        small, means = step(seed, small, batch | {"positions": positions}, outputs_of)
        return small._replace(
            trainable=tables.put_back(path, state.trainable, small.trainable, rows),
            opt_state=tables.put_back(path, opt_state, small.opt_state, rows),
        ), means

    return step_on_rows


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


def compiled(setup: Setup, seeds: int = 1) -> Program:
    """Compile a run for `seeds` seeds side by side."""
    started = time.perf_counter()
    config, mesh = setup.config, setup.mesh
    fns = functions(setup) if seeds == 1 else over_seeds(functions(setup))
    seed = seed_argument(range(seeds))
    shapes = jax.eval_shape(fns.init, seed)
    layout = sharding.of_state(shapes, mesh)
    state = sharding.abstract(shapes, layout)
    whole = sharding.replicated(mesh)
    test_sharding = sharding.of_batch(mesh)
    batch = _batch_shapes(
        setup, config.batch_size, sharding.of_batch(mesh, example_axis=int(seeds > 1)), (seeds,) if seeds > 1 else ()
    )
    test = _batch_shapes(setup, config.eval_batch_size, test_sharding)
    test["weight"] = jax.ShapeDtypeStruct((config.eval_batch_size,), np.float32, sharding=test_sharding)
    status = jax.jit(functools.partial(_status, setup=setup, over_seeds=seeds > 1), out_shardings=whole)
    return Program(
        setup=setup,
        phases=setup.sparsifier(config.seed).phases,
        seeds=seeds,
        functions=Functions(
            init=jax.jit(fns.init, out_shardings=layout),
            step=jax.jit(fns.step, donate_argnums=1, out_shardings=(layout, whole)).lower(seed, state, batch).compile(),
            evaluate=jax.jit(fns.evaluate, out_shardings=whole).lower(seed, state, test).compile(),
            finalize=jax.jit(fns.finalize, out_shardings=whole),
        ),
        status=status.lower(state).compile(),
        outputs=_output_names(setup, jax.eval_shape(fns.evaluate, seed, state, test)[0]),
        state=state,
        batch=batch,
        test_sharding=test_sharding,
        compile_seconds=time.perf_counter() - started,
    )


def seed_argument(seeds: Sequence[int]) -> np.ndarray:
    """One seed as a scalar, several as a vector."""
    return np.asarray(seeds if len(seeds) > 1 else seeds[0], np.int32)


def train_streams(program: Program, seeds: Sequence[int]) -> list[data.TrainIterator]:
    """This host's part of the training batches, a stream a seed."""
    hosts = jax.process_index(), jax.process_count()
    source, size = program.setup.task.dataset.train, program.setup.config.batch_size
    workers = program.setup.config.data.workers
    return [data.train_iterator(source, size, s, *hosts, workers=workers) for s in seeds]


def next_batch(program: Program, streams: Sequence[data.TrainIterator]) -> Any:
    """The next training batch, where the step wants it; those of several seeds along a new leading axis."""
    parts = [next(stream) for stream in streams]
    batch = parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.stack(x), *parts)
    return sharding.place(batch, next(iter(program.batch.values())).sharding)


def test_means(program: Program, seeds: Sequence[int], state: TrainState) -> dict[str, Any]:
    """What the task reports of the test set: the mean of each output, left on the device, and more."""
    hosts = jax.process_index(), jax.process_count()
    source, size = program.setup.task.dataset.test, program.setup.config.eval_batch_size
    workers = program.setup.config.data.workers
    batches = (sharding.place(b, program.test_sharding) for b in data.eval_batches(source, size, *hosts, workers))
    seed = seed_argument(seeds)
    means = evaluate.means(lambda batch: program.functions.evaluate(seed, state, batch), batches)
    return program.setup.task.finish(means)


def _output_names(setup: Setup, sums: dict[str, Any]) -> tuple[str, ...]:
    means = jax.eval_shape(setup.task.finish, {name: x for name, x in sums.items() if name != "weight"})
    return (*means, *(["auc"] if setup.task.ranked else []))


def _batch_shapes(setup: Setup, size: int, layout: Any, lead: tuple[int, ...] = ()) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch."""
    example = setup.task.dataset.example
    return {k: jax.ShapeDtypeStruct((*lead, size, *x.shape[1:]), x.dtype, sharding=layout) for k, x in example.items()}


def _status(state: TrainState, setup: Setup, over_seeds: bool) -> dict[str, jax.Array]:
    """Sparsity of all kernels; mean entropy and largest of the attention weights; learning rate of the last step."""

    def one(masks: Any, trainable: sapp.Trainable) -> dict[str, jax.Array]:
        values = {"sparsity": sapp.metrics.kernel_sparsity(masks, setup.plan)}
        attention = list(sapp.metrics.attention(trainable).values())
        if attention:
            values["attention_entropy"] = jnp.mean(jnp.stack([a["entropy"] for a in attention]))
            values["attention_max"] = jnp.max(jnp.stack([a["max"] for a in attention]))
        return values

    values = (jax.vmap(one) if over_seeds else one)(state.prune.masks, state.trainable)
    # Here, since a schedule evaluated outside a compiled function takes as long as a step.
    return values | {"learning_rate": jnp.asarray(setup.schedule(state.prune.step - 1), jnp.float32)}
