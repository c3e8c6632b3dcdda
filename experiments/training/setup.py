"""The parts of a run, built from its config: everything checked, nothing compiled."""

import functools
import hashlib
import math
import operator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

import sa_plus_plus as sapp
from experiments import data, tasks
from experiments.data import fingerprints
from experiments.models import tables
from experiments.models.narrow import Widths
from experiments.training import factories, narrow, sharding, weights
from experiments.utils import registry

# Numbers of a config: the least that each may be, and what it must be below.
_RANGES = {
    **dict.fromkeys(("batch_size", "eval_batch_size", "log_every", "eval_every", "checkpoint_every"), (1, math.inf)),
    **dict.fromkeys(("max_to_keep", "mesh.fsdp"), (1, math.inf)),
    **dict.fromkeys(("steps", "epochs", "data.workers"), (0, math.inf)),
    **{f"optimizer.{name}": (0, math.inf) for name in ("learning_rate", "scale_batch", "weight_decay")},
    **{f"optimizer.{name}": (0, math.inf) for name in ("warmup_steps", "warmup_epochs", "final_fraction")},
    "optimizer.momentum": (0, 1),
    "distil.temperature": (0.01, math.inf),
}
TASKS = ("classification", "click_prediction", "language_modelling", "reconstruction", "sentence_embedding")


class Setup(NamedTuple):
    """The parts of a run that its config describes.

    Attributes:
      raw_config: the config as it was given, with the sparsity that its number of features stands for.
      config: the same with lengths in steps, the learning rate as it applies to the batch, and the widths of the
        control `narrow`.
      mesh: the devices.
      task: what is trained.
      tx: the optimizer.
      schedule: learning rate against step.
      sparsifier: the algorithm.
      plan: what is pruned.
      table: the embedding table of which a step touches only the batch's rows; None for steps on all parameters.
      start: trained weights to begin with, in host memory; None to begin with the model's own.
      teacher: of a network to learn from, in host memory; None for learning from labels alone.
      reorder: the steps after which units are put into another order.
    """

    raw_config: ml_collections.ConfigDict
    config: ml_collections.ConfigDict
    mesh: Mesh
    task: tasks.Task
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    sparsifier: sapp.Sparsifier
    plan: sapp.Plan
    table: tables.Table | None
    start: weights.Variables | None = None
    teacher: weights.Variables | None = None
    reorder: tuple[int, ...] = ()

    def fingerprint(self) -> dict[str, str]:
        """Checksums of what the run reads besides its config: by file those of its data, and that of its teacher."""
        found = fingerprints.fingerprint(self.task.dataset.files)
        if self.teacher is None:
            return found
        arrays = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(tuple(self.teacher)))
        return found | {"the teacher, config.distil,": hashlib.sha256(arrays).hexdigest()}

    @property
    def narrowed(self) -> Widths:
        """The widths of the control `narrow`; of any other run, nothing."""
        before, now = self.raw_config.model_options.to_dict(), self.config.model_options.to_dict()
        return {name: value for name, value in now.items() if value != before.get(name)}

    @property
    def phases(self) -> sapp.Phases:
        """The schedule."""
        return self.sparsifier.phases


def prepare(config: ml_collections.ConfigDict, mesh: Mesh | None = None, dataset: data.Dataset | None = None) -> Setup:
    """Build every part of a run except the compiled step, so that errors in a config show at once.

    Args:
      config: of the run.
      mesh: the devices; by default all of them, as `config.mesh` has it.
      dataset: what to train on; by default that of `config.data`, which takes time to read: runs on the same data
        share it.

    Raises:
      ValueError: if any part of the config is out of range, unknown or does not fit the others; or if trained weights
        that it names cannot be read, or are another network's.
      FileNotFoundError: if there are no such weights.
    """
    _check_ranges(config)
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp)
    for name in ("batch_size", "eval_batch_size"):
        sharding.check_batch(config[name], mesh, f"config.{name}")
    make_task = getattr(tasks, registry.check(config.task, TASKS, "config.task"))
    task = make_task(config, dataset or tasks.dataset_of(config.data))
    config = _keeping_features(config, task)
    examples = len(task.dataset.train)
    if config.batch_size > examples:
        raise ValueError(f"config.batch_size={config.batch_size} exceeds the {examples} training examples")
    raw, config = config.copy_and_resolve_references(), _resolved(config, examples)
    if config.sparsifier.name == factories.NARROW:
        of_data = functools.partial(make_task, dataset=task.dataset)
        config = narrow.with_options(config, narrow.widths(config, task, of_data))
        task = of_data(config)
    tx, schedule = factories.optimizer(config.optimizer, config.steps)
    epoch = max(1, round(examples / config.batch_size))
    sparsifier = factories.sparsifier(config.sparsifier, config.steps, epoch)
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    plan = sparsifier.plan(params)
    _check_features(config, task, plan)
    table = _table(config.optimizer.rows, task)
    if config.init_from:
        start: weights.Variables | None = weights.read(config.init_from, params, model_state, "config.init_from")
    else:
        start = weights.Variables(*task.start()) if task.start else None
    teacher = _teacher(config, task, (params, model_state), start)
    reorder = factories.reorder_steps(config.sparsifier.reorder, sparsifier.phases, epoch) if plan.pruned else ()
    if reorder and jax.process_count() > 1:
        raise ValueError(f"config.sparsifier.reorder={config.sparsifier.reorder} needs one process with all weights")
    return Setup(raw, config, mesh, task, tx, schedule, sparsifier, plan, table, start, teacher, reorder)


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


def _keeping_features(config: ml_collections.ConfigDict, task: tasks.Task) -> ml_collections.ConfigDict:
    """The config with the sparsity at which `features` rows of the first kernel are kept, where it has that option."""
    if "features" not in config:
        return config
    count = len(task.dataset.features)
    if not 1 <= config.features <= count:
        raise ValueError(f"config.features={config.features} must be from 1 to the {count} features that the data have")
    config = config.copy_and_resolve_references()
    config.sparsifier.sparsity = (
        count - config.features
    ) / count  # the nearest float, so that exactly `features` are kept
    return config


def _check_features(config: ml_collections.ConfigDict, task: tasks.Task, plan: sapp.Plan) -> None:
    """Refuse to prune anything but whole features where the config says how many are to be kept."""
    if "features" not in config:
        return
    wanted = len(task.dataset.features), 1, config.features
    if any((*layer.grid, layer.kept) != wanted for layer in plan.pruned.values()):
        raise ValueError(
            f"config.features={config.features} is for rows of the first kernel alone: set "
            f"config.sparsifier.block={config.sparsifier.block} to (1, None), and config.sparsifier.include="
            f"{config.sparsifier.include!r} to its path"
        )


def _table(rows: str, task: tasks.Task) -> tables.Table | None:
    """The table that an optimizer for the rows of the batch alone works on."""
    if registry.check(rows, ["all", "batch"], "config.optimizer.rows") == "all":
        return None
    if task.table is None:
        raise ValueError('config.optimizer.rows="batch" is for models with an embedding table; this one has none')
    return task.table


def _teacher(
    config: ml_collections.ConfigDict, task: tasks.Task, shapes: tuple[Any, Any], start: weights.Variables | None
) -> weights.Variables | None:
    """The network that the run learns from: the task's own, or the one that it starts from unless another is named."""
    options = config.distil
    if not 0 <= options.weight <= 1:
        raise ValueError(f"config.distil.weight must be in [0, 1], 0 for no teacher; got {options.weight}")
    if options.weight == 0:
        if options.teacher:
            raise ValueError(
                f"config.distil.teacher={options.teacher} is a teacher without influence: raise config.distil.weight "
                "above 0, such as to 0.5"
            )
        return weights.Variables(*task.teacher()) if task.teacher else None
    if not task.takes_teacher:
        raise ValueError(
            f"config.distil.weight={options.weight} needs a task that can learn from a teacher, classification; "
            f"config.task={config.task!r} cannot"
        )
    found = weights.read(options.teacher, *shapes, "config.distil.teacher") if options.teacher else start
    if found is None:
        raise ValueError(
            f"config.distil.weight={options.weight} needs a teacher: name its weights by config.distil.teacher, or by "
            "config.init_from to start from them too"
        )
    if shapes[1] and found.model_state is None:
        raise ValueError(
            f"the teacher {options.teacher or config.init_from} has no {', '.join(shapes[1])}, which its model needs: "
            "take what a run has left"
        )
    return found._replace(model_state=found.model_state or {})


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
