"""The control `narrow`: the same architecture, dense, with widths cut until it costs what the pruned network costs."""

import bisect
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

import sa_plus_plus as sapp
from experiments import tasks
from experiments.models.narrow import Widths, narrowed, widest
from experiments.training import factories
from experiments.utils import registry

EQUAL, CUTS = ("weights", "multiply_adds"), ("scale", "cap")


class CannotNarrow(ValueError):
    """A run has no narrow network of equal cost."""


def widths(
    config: ml_collections.ConfigDict, task: tasks.Task, make_task: Callable[[ml_collections.ConfigDict], tasks.Task]
) -> Widths:
    """The options of the model with which the dense network costs at most what the pruned one does, and nearly as much.

    The widest hidden layer has as many units as possible. By `config.sparsifier.narrow.cut` the others are narrower by
    the same factor (`scale`), or none is wider than it (`cap`). The cost is, by `config.sparsifier.narrow.equal`:

    - `weights`: all parameters of the network; of the pruned one, those in kept blocks and all that are not pruned
      (other kernels, embeddings, biases, normalisation);
    - `multiply_adds`: of convolutions and dense layers, for one example; a pruned layer's by its share of kept blocks.

    A layer with partial blocks on its edges counts by its share of kept blocks.

    Args:
      config: of the run; what would be pruned is what `config.sparsifier` says.
      task: of the whole network.
      make_task: the task of a config with other options of the model.

    Raises:
      CannotNarrow: if it is not known what the model's widths are, trained weights are part of the run, or the
        narrowest network costs more.
      ValueError: as `sapp.plan` does.
    """
    equal = registry.check(config.sparsifier.narrow.equal, EQUAL, "config.sparsifier.narrow.equal")
    cut = registry.check(config.sparsifier.narrow.cut, CUTS, "config.sparsifier.narrow.cut")
    _check(config, task)
    try:
        most = widest(task.model)
    except ValueError as error:
        raise CannotNarrow(f"config.sparsifier.name='narrow': {error}") from error
    plan = sapp.plan(_params(task), sparsity=config.sparsifier.sparsity, **factories.plan_options(config.sparsifier))
    target = cost(task, equal, plan)

    def costs(units: int) -> int:
        return cost(make_task(with_options(config, narrowed(task.model, units, cut))), equal)

    units = bisect.bisect_right(range(1, most + 1), target, key=costs)
    if units == 0:
        least = shown(narrowed(task.model, 1, cut))
        raise CannotNarrow(
            f"config.sparsifier.name='narrow': the narrowest {config.model}, {least}, has {costs(1):,} "
            f"{equal.replace('_', '-')}, more than the {target:,} of the pruned network: lower "
            "config.sparsifier.sparsity"
        )
    return narrowed(task.model, units, cut)


def cost(task: tasks.Task, equal: str = "weights", plan: sapp.Plan | None = None) -> int:
    """Weights, or multiply-adds for one example, of a network, pruned as a plan says if there is one."""
    share = {layer.path: layer.kept / layer.blocks for layer in plan.pruned.values()} if plan else {}
    if equal == "weights":
        leaves = jax.tree_util.tree_leaves_with_path(_params(task))
        whole = {sapp.path_string(path): leaf.size for path, leaf in leaves}
    else:
        whole = tasks.multiply_adds(task)
    return sum(round(share.get(path, 1) * count) for path, count in whole.items())


def with_options(config: ml_collections.ConfigDict, options: Widths) -> ml_collections.ConfigDict:
    """The config with these options of its model."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model_options.update(options)
    return config


def shown(options: Widths) -> str:
    """`widths=(34, 11)`."""
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _params(task: tasks.Task) -> Any:
    return jax.eval_shape(task.init, jax.random.key(0))[0]


def _check(config: ml_collections.ConfigDict, task: tasks.Task) -> None:
    """Refuse what fits only a network of the original widths."""
    trained = {
        f"config.init_from={config.init_from}": config.init_from,
        f"config.distil.weight={config.distil.weight}": config.distil.weight,
        f"config.task={config.task!r}, which begins with published weights": task.start,
    }
    for name, there in trained.items():
        if there:
            raise CannotNarrow(
                f"config.sparsifier.name='narrow' trains a network of other widths from weights of its own: {name} "
                "does not go with it. Train a smaller dense network by config.sparsifier.name='dense' and "
                "config.model_options instead"
            )
