"""The definition of a pruning algorithm: a named tuple of pure functions, and the state that they pass on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sa_plus_plus.phases import Phases
from sa_plus_plus.planning import Plan

Params = Any  # a pytree of arrays, the model's own
Masks = dict[str, jax.Array]


class Trainable(NamedTuple):
    """What is differentiated and passed to the optimizer.

    Attributes:
      params: same tree as the model's, holding the weights as the algorithm parametrises them.
      logits: one `(*stack, grid_r, grid_c)` float32 array per pruned layer, by path; empty if the algorithm has no
        logits.
    """

    params: Params
    logits: dict[str, jax.Array]


class PruneState(NamedTuple):
    """What the algorithm carries from step to step; never differentiated.

    Attributes:
      step: int32 scalar, gradient steps done so far.
      phase: int32 scalar, index of the phase that the next gradient step belongs to: when it differs from that of the
        previous step, optimizers are reset.
      masks: one boolean `(*stack, grid_r, grid_c)` array per pruned layer, by path: true where a block is active.
      key: data of a random key, uint32; None for deterministic algorithms.
    """

    step: jax.Array
    phase: jax.Array
    masks: Masks
    key: jax.Array | None = None


State = tuple[Trainable, PruneState]


class Sparsifier(NamedTuple):
    """A pruning algorithm: pure functions, for use under `jit`, `vmap`, donation and any sharding.

    Results never share a buffer with an argument or with each other, so that any of them may be donated.

    Attributes:
      init: `init(params, key=None) -> (trainable, prune)`. `key` is a `jax.random.key` for randomised
        algorithms, instead of their own seed. Outside `jit` it also checks that the kernels are finite. All leaves of
        `params` must be arrays or numbers.
      apply: `apply(trainable, prune) -> params`: the effective parameters, differentiable in `trainable`.
      update: `update(trainable, prune, updates=None, grads=None) -> (trainable, prune)`: add an optimizer's `updates`
        (a tree like `trainable`), then advance one step: phase, masks, changes at a boundary. `grads` are those that
        the optimizer was given; `rigl` needs them, and `sequential_attention` with `regrow`; the others ignore them.
        Pass the updates rather than adding them yourself: only here are masked weights protected from momentum and
        weight decay, and is `logit_lr` applied. None advances without an update, and None in place of a leaf leaves
        that leaf as it is.
      finalize: `finalize(trainable, prune) -> params`: the pruned network in the model's own tree, masked blocks
        exactly zero. Equal to `apply`, for use after the last step: it applies the current masks, and in a dense
        phase, or if training stopped before `phases.total_steps`, these do not prune as planned. Outside `jit` it
        warns if fewer blocks than planned are masked.
      sync_from_params: `sync_from_params(trainable, prune, params) -> trainable`: the trained weights whose effective
        parameters are `params`, with unchanged logits. An entry that is effective already leaves its weight alone, and
        so does every entry of a block that is masked or has scale zero, where it has no effect.
      plan: `plan(params) -> Plan`: which layers are pruned and how.
      phases: the schedule.
      attention: whether `trainable.logits` are those of attention weights, `N softmax(logits)`.
    """

    init: Callable[..., State]
    apply: Callable[[Trainable, PruneState], Params]
    update: Callable[..., State]
    finalize: Callable[[Trainable, PruneState], Params]
    sync_from_params: Callable[[Trainable, PruneState, Params], Trainable]
    plan: Callable[[Params], Plan]
    phases: Phases
    attention: bool = False
