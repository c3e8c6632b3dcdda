"""The pruning algorithm and the optimizer of a config."""

import ast
import fnmatch
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import optax

import sa_plus_plus as sapp
from experiments.utils import registry
from sa_plus_plus.registry import options_of

NAMES = tuple(sapp.ALGORITHMS)
NARROW = "narrow"  # no algorithm: a smaller dense network, see `training.narrow`
CONTENDERS = (*NAMES, NARROW)


def sparsifier(
    config: ml_collections.ConfigDict, total_steps: int, steps_per_epoch: int | None = None
) -> sapp.Sparsifier:
    """The algorithm that `config` (a run's `config.sparsifier`) describes.

    Args:
      config: `name`, the options common to all, and a section of its own for each algorithm with options.
      total_steps: length of the run.
      steps_per_epoch: for a free-form schedule in epochs.

    Raises:
      ValueError: for an unknown algorithm, and whatever its constructor refuses.
    """
    name = registry.check(config.name, CONTENDERS, "config.sparsifier.name")
    name = "dense" if name == NARROW else name
    make, own_schedule, _ = sapp.ALGORITHMS[name]
    options = plan_options(config) | {key: config[key] for key in ("sparsity", "scope")}
    options |= {key: _value(text) for key, text in config[name].items()}
    known = options_of(make)
    options = {key: value for key, value in options.items() if key in known}
    if config.schedule and "sparsity" in known:  # what prunes nothing has no use for another schedule
        epoch, c = steps_per_epoch, config.exponent
        phases = sapp.phases.custom(total_steps, config.schedule, steps_per_epoch=epoch, exponent=c)
    else:
        asked = inspect.signature(own_schedule).parameters
        phases = own_schedule(total_steps, **{k: config[k] for k in _OF_SCHEDULES if k in asked})
    return make(phases=phases, **options)


def reorder_steps(when: Sequence[Any], phases: sapp.Phases, steps_per_epoch: int | None = None) -> tuple[int, ...]:
    """The steps that `config.sparsifier.reorder` stands for.

    Args:
      when: kinds of phases, for their starts, or lengths of time since the start of the run, as schedules take them.
      phases: the schedule.
      steps_per_epoch: for times in epochs.

    Raises:
      ValueError: for a step in a sparse phase, or what cannot be read.
    """
    steps: set[int] = set()
    for entry in when:
        starts = [phase.start for phase in phases.phases if phase.kind == entry]
        if not starts and entry in sapp.phases.KINDS:
            raise ValueError(
                f"config.sparsifier.reorder names {entry!r}, but the schedule has no such phase:\n{phases}"
            )
        at = starts or [round(sapp.phases.as_steps(entry, phases.total_steps, steps_per_epoch))]
        if taken := [step for step in at if phases.at(step).kind == sapp.phases.SPARSE]:
            raise ValueError(
                f"config.sparsifier.reorder={entry!r} is at step {taken[0]}, in the phase {phases.at(taken[0])}, whose "
                "blocks are chosen: reorder before"
            )
        steps.update(at)
    return tuple(sorted(steps))


def plan_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The options of `sapp.plan` besides the sparsity, from a run's `config.sparsifier`.

    Raises:
      ValueError: for a block that does not have two sides.
    """
    if len(config.block) != 2:
        raise ValueError(f"config.sparsifier.block needs both sides, such as (8, 8); got {config.block}")
    options = {"block": config.block, "min_blocks": config.min_blocks}
    options |= {key: config[key].to_dict() for key in ("overrides", "views")}
    options["min_kept"] = _value(config.min_kept)
    return options | ({"where": functools.partial(_matches, config.include)} if config.include else {})


_OF_SCHEDULES = ("recipe", "exponent", "sparsification")


def _matches(pattern: str, path: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern)


def _value(value: Any) -> Any:
    """An option as its constructor takes it. Types in a config are fixed, so text represents values of several types.

    >>> [_value(text) for text in ("density", "none", "0.1,10", 3)]
    ['density', None, (0.1, 10), 3]
    """
    if not isinstance(value, str):
        return value
    try:
        return None if value == "none" else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value  # a word


def optimizer(
    config: ml_collections.ConfigDict, total_steps: int
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """`(tx, learning-rate schedule)` of `config.optimizer`: moments are reset at each phase, the schedule continues.

    Weight decay applies to kernels and attention logits, not to biases and scales.
    """
    rate = _SCHEDULES[registry.check(config.schedule, list(_SCHEDULES), "config.optimizer.schedule")](
        config, total_steps
    )
    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda t: jax.tree.map(lambda x: x.ndim > 1, t))
    parts = {
        "sgd": (decay, sapp.reset_on(optax.trace(config.momentum))),
        "adamw": (sapp.reset_on(optax.scale_by_adam()), decay),
    }
    registry.check(config.name, list(parts), "config.optimizer.name")
    return optax.chain(*parts[config.name], optax.scale_by_learning_rate(rate)), rate


def _cosine(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    peak, warmup = config.learning_rate, config.warmup_steps
    if not 0 <= warmup < steps:
        raise ValueError(f"config.optimizer.warmup_steps must be in [0, {steps}), the length of the run; got {warmup}")
    if warmup == 0:
        return optax.cosine_decay_schedule(peak, steps, config.final_fraction)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak * config.final_fraction)


def _exponential(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    if not config.final_fraction > 0:
        raise ValueError(f"config.optimizer.final_fraction must be positive to decay to, got {config.final_fraction}")
    return optax.exponential_decay(config.learning_rate, steps, config.final_fraction)


_SCHEDULES: Mapping[str, Any] = {
    "cosine": _cosine,
    "exponential": _exponential,
    "constant": lambda config, steps: optax.constant_schedule(config.learning_rate),
}
