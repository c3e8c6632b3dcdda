"""A run's functions compiled, with the batches that they take."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sa_plus_plus as sapp
from experiments import data
from experiments.training import evaluation, sharding
from experiments.training.setup import Setup
from experiments.training.step import Functions, TrainState, functions, over_seeds


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


def compiled(setup: Setup, seeds: int = 1) -> Program:
    """Compile a run for `seeds` seeds side by side."""
    started = time.perf_counter()
    config, mesh = setup.config, setup.mesh
    fns = functions(setup) if seeds == 1 else over_seeds(functions(setup))
    shapes = jax.eval_shape(fns.init, seed_argument(range(seeds)), setup.start)
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
        phases=setup.phases,
        seeds=seeds,
        functions=Functions(
            init=functools.partial(jax.jit(fns.init, out_shardings=layout), start=setup.start),
            step=_step(setup, jax.jit(fns.step, donate_argnums=0, out_shardings=(layout, whole)), state, batch),
            evaluate=jax.jit(fns.evaluate, out_shardings=whole).lower(state, test).compile(),
            finalize=jax.jit(fns.finalize, out_shardings=whole),
        ),
        status=status.lower(state).compile(),
        outputs=_output_names(setup, jax.eval_shape(fns.evaluate, state, test)[0]),
        state=state,
        batch=batch,
        test_sharding=test_sharding,
        compile_seconds=time.perf_counter() - started,
    )


def side_by_side_pays(plan: sapp.Plan) -> bool:
    """Whether one program vmapped over the seeds is faster than running them in turn.

    On a CPU it is not for convolutions: each seed's kernel becomes a separate group, and grouped convolutions took 3 to
    5 times as long there (ConvNet, 3 seeds, two cores).
    """
    return jax.default_backend() != "cpu" or all(len(layer.shape) <= 2 for layer in plan.leaves)


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


def test_means(program: Program, state: TrainState) -> dict[str, Any]:
    """What the task reports of the test set: the mean of each output, left on the device, and more."""
    hosts = jax.process_index(), jax.process_count()
    source, size = program.setup.task.dataset.test, program.setup.config.eval_batch_size
    workers = program.setup.config.data.workers
    batches = (sharding.place(b, program.test_sharding) for b in data.eval_batches(source, size, *hosts, workers))
    means = evaluation.means(lambda batch: program.functions.evaluate(state, batch), batches)
    return program.setup.task.finish(means)


def _output_names(setup: Setup, sums: dict[str, Any]) -> tuple[str, ...]:
    means = jax.eval_shape(setup.task.finish, {name: x for name, x in sums.items() if name != "weight"})
    return (*means, *(["auc"] if setup.task.ranked else []))


def _step(setup: Setup, step: Any, state: TrainState, batch: Any) -> Callable[..., Any]:
    """The step compiled; with a teacher, which is placed on the devices once, split over them as the state is.

    It is an argument and not a constant of the program, which would hold it another time.
    """
    if setup.teacher is None:
        return step.lower(state, batch).compile()
    teacher = jax.device_put(setup.teacher, sharding.of_state(setup.teacher, setup.mesh))
    taught = step.lower(state, batch, teacher).compile()
    return lambda state, batch: taught(state, batch, teacher)


def _batch_shapes(setup: Setup, size: int, layout: Any, lead: tuple[int, ...] = ()) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch."""
    example = setup.task.dataset.example
    return {k: jax.ShapeDtypeStruct((*lead, size, *x.shape[1:]), x.dtype, sharding=layout) for k, x in example.items()}


def _status(state: TrainState, setup: Setup, over_seeds: bool) -> dict[str, jax.Array]:
    """Sparsity of all kernels; mean entropy and largest of the attention weights; learning rate of the last step."""

    def one(masks: Any, trainable: sapp.Trainable) -> dict[str, jax.Array]:
        values = {"sparsity": sapp.metrics.kernel_sparsity(masks, setup.plan)}
        if attention := list(sapp.metrics.attention(trainable).values()) if setup.sparsifier.attention else []:
            values["attention_entropy"] = jnp.mean(jnp.stack([a["entropy"] for a in attention]))
            values["attention_max"] = jnp.max(jnp.stack([a["max"] for a in attention]))
        return values

    values = (jax.vmap(one) if over_seeds else one)(state.prune.masks, state.trainable)
    # Here, since a schedule evaluated outside a compiled function takes as long as a step.
    return values | {"learning_rate": jnp.asarray(setup.schedule(state.prune.step - 1), jnp.float32)}
