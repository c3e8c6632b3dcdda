"""What a pruning algorithm is: a named tuple of pure functions, and the state that they pass on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sa_plus_plus.phases import Phases
from sa_plus_plus.planning import Plan

Params = Any  # a pytree of arrays, the model's own
Masks = dict[str, jax.Array]


class Trainable(NamedTuple):
    """What is differentiated and handed to the optimizer.

    Attributes:
      params: same tree as the model's, holding the weights as the algorithm parametrises them.
      logits: one `(*stack, grid_r, grid_c)` float32 array a pruned layer, by path; empty unless the algorithm has
        logits.
    """

    params: Params
    logits: dict[str, jax.Array]


class PruneState(NamedTuple):
    """What the algorithm carries from step to step; never differentiated.

    Attributes:
      step: int32 scalar, gradient steps done so far.
      phase: int32 scalar, index of the phase that the next gradient step belongs to: where it differs from that of the
        step before, optimizers start afresh.
      masks: one boolean `(*stack, grid_r, grid_c)` array a pruned layer, by path: true where a block takes part.
      key: data of a random key, uint32; None for algorithms that leave nothing to chance.
    """

    step: jax.Array
    phase: jax.Array
    masks: Masks
    key: jax.Array | None = None


State = tuple[Trainable, PruneState]


class Sparsifier(NamedTuple):
    """A pruning algorithm: pure functions, for use under `jit`, `vmap`, donation and any sharding.

    Attributes:
      init: `init(params, key=None) -> (trainable, prune)`. `key` is a `jax.random.key` for algorithms that draw at
        random, instead of their own seed. Outside `jit` it also checks that the kernels are finite.
      apply: `apply(trainable, prune) -> params`: the effective parameters, differentiable in `trainable`.
      update: `update(trainable, prune, updates=None, grads=None) -> (trainable, prune)`: add an optimizer's `updates`
        (a tree like `trainable`), then go one step on: phase, masks, what a boundary brings. `grads` are those that
        the optimizer was given; `rigl` alone needs them, the others do not look at them. Hand the updates over rather
        than adding them yourself: only here do masked weights stay untouched by momentum and weight decay, and is
        `logit_lr` applied. None is for going on without an update.
      finalize: `finalize(trainable, prune) -> params`: the pruned network in the model's own tree, masked blocks
        exactly zero. Equal to `apply`, for use after the last step: it folds in the masks as they are, and in a dense
        phase, or where training stopped before `phases.total_steps`, these do not prune as planned. Outside `jit` it
        warns where fewer blocks than planned are masked.
      adopt: `adopt(trainable, prune, params) -> trainable`: the trained weights whose effective parameters are
        `params`, with the logits as they are. An entry of `params` that is what it was (up to rounding) leaves its
        weight alone, and so does every entry of a block that is masked or whose scale is zero, where it has no effect.
      plan: `plan(params) -> Plan`: which layers are pruned and how.
      phases: the schedule.
      attention: whether `trainable.logits` stand for attention weights, `N softmax(logits)`.
    """

    init: Callable[..., State]
    apply: Callable[[Trainable, PruneState], Params]
    update: Callable[..., State]
    finalize: Callable[[Trainable, PruneState], Params]
    adopt: Callable[[Trainable, PruneState, Params], Trainable]
    plan: Callable[[Params], Plan]
    phases: Phases
    attention: bool = False
