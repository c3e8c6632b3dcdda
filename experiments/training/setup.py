"""A run's parts, as its config describes them: everything checked, nothing compiled."""

import math
import operator
from typing import NamedTuple

import jax
import ml_collections
import optax
from jax.sharding import Mesh

import sa_plus_plus as sapp
from experiments import data, tasks
from experiments.models import tables
from experiments.training import factories, sharding
from experiments.utils import registry

# Numbers of a config: the least that each may be, and what it must be below.
_RANGES = {
    **dict.fromkeys(("batch_size", "eval_batch_size", "log_every", "eval_every", "checkpoint_every"), (1, math.inf)),
    **dict.fromkeys(("keep", "mesh.fsdp"), (1, math.inf)),
    **dict.fromkeys(("steps", "epochs", "data.workers"), (0, math.inf)),
    **{f"optimizer.{name}": (0, math.inf) for name in ("learning_rate", "scale_batch", "weight_decay")},
    **{f"optimizer.{name}": (0, math.inf) for name in ("warmup_steps", "warmup_epochs", "final_fraction")},
    "optimizer.momentum": (0, 1),
}
TASKS = ("classification", "click_prediction", "language_modelling", "reconstruction")


class Setup(NamedTuple):
    """The parts of a run that its config describes.

    Attributes:
      given: the config as it was given.
      config: the same with lengths in steps, and the learning rate as it applies to the batch.
      mesh: the devices.
      task: what is trained.
      tx: the optimizer.
      schedule: learning rate against step.
      sparsifier: the algorithm.
      plan: what is pruned.
      table: the embedding table of which a step touches only the batch's rows; None for steps on all parameters.
    """

    given: ml_collections.ConfigDict
    config: ml_collections.ConfigDict
    mesh: Mesh
    task: tasks.Task
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    sparsifier: sapp.Sparsifier
    plan: sapp.Plan
    table: tables.Table | None

    @property
    def phases(self) -> sapp.Phases:
        """The schedule."""
        return self.sparsifier.phases


def prepare(config: ml_collections.ConfigDict, mesh: Mesh | None = None, dataset: data.Dataset | None = None) -> Setup:
    """Build every part of a run but the compiled step, so that what is wrong with a config shows at once.

    Args:
      config: of the run.
      mesh: the devices; by default all of them, as `config.mesh` has it.
      dataset: what to train on; by default that of `config.data`, which takes time to read: runs on the same data
        share it.

    Raises:
      ValueError: if any part of the config is out of range, unknown or does not fit the others.
    """
    _check_ranges(config)
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp)
    for name in ("batch_size", "eval_batch_size"):
        sharding.check_batch(config[name], mesh, f"config.{name}")
    make_task = getattr(tasks, registry.check(config.task, TASKS, "config.task"))
    task = make_task(config, dataset or tasks.dataset_of(config.data))
    examples = len(task.dataset.train)
    if config.batch_size > examples:
        raise ValueError(f"config.batch_size={config.batch_size} exceeds the {examples} training examples")
    given, config = config.copy_and_resolve_references(), _resolved(config, examples)
    tx, schedule = factories.optimizer(config.optimizer, config.steps)
    epoch = max(1, round(examples / config.batch_size))
    sparsifier = factories.sparsifier(config.sparsifier, config.steps, epoch)
    plan = sparsifier.plan(jax.eval_shape(task.init, jax.random.key(0))[0])
    return Setup(given, config, mesh, task, tx, schedule, sparsifier, plan, _table(config.optimizer.rows, task))


def prepare_without_data(config: ml_collections.ConfigDict, dataset: data.Dataset | None = None) -> Setup:
    """As `prepare`, on one device and by default with what `blank` gives."""
    return prepare(config, sharding.make_mesh(devices=jax.devices()[:1]), dataset or blank(config))


def blank(config: ml_collections.ConfigDict) -> data.Dataset:
    """Examples of zeros where the shapes of a run's data set are known beforehand, else the data set itself."""
    return data.declared(config.data.name, config.data.options.get("size")) or tasks.dataset_of(config.data)


def _check_ranges(config: ml_collections.ConfigDict) -> None:
    for name, (least, below) in _RANGES.items():
        value = operator.attrgetter(name)(config)
        if not least <= value < below:
            wanted = f"in [{least}, {below})" if below < math.inf else f"a finite number from {least}"
            raise ValueError(f"config.{name} must be {wanted}, got {value}")


def _table(rows: str, task: tasks.Task) -> tables.Table | None:
    """The table that an optimizer for the rows of the batch alone works on."""
    if registry.check(rows, ["all", "batch"], "config.optimizer.rows") == "all":
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
