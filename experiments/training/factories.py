"""From a config to the pruning algorithm and the optimizer."""

import fnmatch
import functools
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import optax

import sa_plus_plus as sapp
from experiments.utils import registry

NAMES = (*sapp.ALGORITHMS, *sapp.CONTROLS)


def sparsifier(
    config: ml_collections.ConfigDict, total_steps: int, steps_per_epoch: int | None = None, seed: Any = 0
) -> sapp.Sparsifier:
    """The algorithm that `config` (a run's `config.sparsifier`) describes.

    Args:
      config: `name`, the options common to all, and a section of its own for each algorithm with options.
      total_steps: length of the run.
      steps_per_epoch: for a free-form schedule in epochs.
      seed: for `random` alone; may be traced.

    Raises:
      ValueError: for an unknown algorithm, and whatever its constructor refuses.
    """
    name = registry.check(config.name, NAMES, "config.sparsifier.name")
    make, own_phases = getattr(sapp, name), getattr(sapp.phases, name)
    if name == "dense":
        return make(phases=own_phases(total_steps))
    if config.schedule:
        phases = sapp.phases.custom(
            total_steps, config.schedule, steps_per_epoch=steps_per_epoch, exponent=config.exponent
        )
    else:
        rising = {"exponent": config.exponent} if name in ("sequential_attention", "gradual_magnitude") else {}
        if name == "sequential_attention":
            rising["sparsification"] = config.sparsification
        phases = own_phases(total_steps, recipe=config.recipe, **rising)
    if len(config.block) != 2:
        raise ValueError(f"config.sparsifier.block needs both sides, such as (8, 8); got {config.block}")
    options = dict(config[name])
    if "clip" in options:
        options["clip"] = _clip(options["clip"])
    if name == "random":
        options["seed"] = seed
    common = {key: config[key] for key in ("block", "sparsity", "min_blocks", "scope")}
    if config.only:
        common["where"] = functools.partial(_matches, config.only)
    return make(phases=phases, overrides=config.overrides.to_dict(), **common, **options)


def _matches(pattern: str, path: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern)


def _clip(clip: Any) -> Any:
    """A config holds text, since the type of an option may not change: `density`, `none`, or a range `0.1,10`."""
    if not isinstance(clip, str) or clip == "density":
        return clip
    if clip == "none":
        return None
    low, comma, high = clip.strip("()").partition(",")
    try:
        return (float(low), float(high)) if comma else clip
    except ValueError:
        return clip  # for the constructor to refuse


def optimizer(
    config: ml_collections.ConfigDict, total_steps: int
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """`(tx, learning-rate schedule)` of `config.optimizer`: moments start afresh with each phase, the schedule goes on.

    Weight decay falls on kernels and on attention logits, not on biases and scales.
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
