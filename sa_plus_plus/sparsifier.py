"""What a pruning algorithm is: pure functions, composed of a parametrisation, a score and a schedule.

Every algorithm here multiplies each block of a kernel by one number: the effective kernel is
`W * spread(scale * mask)`. The *parametrisation* says what `scale` is (1, an attention weight, a norm), the *score*
by which blocks are chosen, the *phases* when. `compose` makes a `Sparsifier` of the three; `algorithms.py` has the
algorithms themselves.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sa_plus_plus import blocks as blk
from sa_plus_plus import planning, select
from sa_plus_plus.phases import DENSE, SPARSE, Phases
from sa_plus_plus.planning import LeafPlan, Overrides, Plan, map_layers

Params = Any  # a pytree of arrays, the model's own
Masks = dict[str, jax.Array]


class Trainable(NamedTuple):
    """What is differentiated and handed to the optimizer.

    Attributes:
      params: same tree as the model's, holding the weights as the algorithm parametrises them.
      logits: one `(grid_r, grid_c)` float32 array a pruned layer, by path; empty unless the algorithm has logits.
    """

    params: Params
    logits: dict[str, jax.Array]


class PruneState(NamedTuple):
    """What the algorithm carries from step to step; never differentiated.

    Attributes:
      step: int32 scalar, gradient steps done so far.
      boundary: bool scalar, whether the next gradient step is the first of a new phase: optimizers start afresh.
      masks: one boolean `(grid_r, grid_c)` array a pruned layer, by path: true where a block takes part.
    """

    step: jax.Array
    boundary: jax.Array
    masks: Masks


State = tuple[Trainable, PruneState]


class Sparsifier(NamedTuple):
    """A pruning algorithm: pure functions, for use under `jit`, `vmap`, donation and any sharding.

    Attributes:
      init: `init(params) -> (trainable, prune)`. Outside `jit` it also checks that the kernels are finite.
      apply: `apply(trainable, prune) -> params`: the effective parameters, differentiable in `trainable`.
      update: `update(trainable, prune, updates=None) -> (trainable, prune)`: add an optimizer's `updates` (a tree
        like `trainable`), then go one step on: phase, masks, what a boundary brings. Hand the updates over rather than
        adding them yourself: only here do masked weights stay untouched by momentum and weight decay, and is
        `logit_lr` applied. None is for going on without an update.
      finalize: `finalize(trainable, prune) -> params`: the pruned network in the model's own tree, masked blocks
        exactly zero. Equal to `apply`, for use after the last step: it folds in the masks as they are, and in a dense
        phase, or where training stopped before `phases.total_steps`, these do not prune as planned.
      plan: `plan(params) -> Plan`: which layers are pruned and how.
      phases: the schedule.
    """

    init: Callable[[Params], State]
    apply: Callable[[Trainable, PruneState], Params]
    update: Callable[..., State]
    finalize: Callable[[Trainable, PruneState], Params]
    plan: Callable[[Params], Plan]
    phases: Phases


class Parametrisation(NamedTuple):
    """How the trained weights make the effective kernel.

    Attributes:
      weights: `weights(kernel, layer)`: the trained weights with which the effective kernel starts as the model's own.
      scale: `scale(weights, logits, layer)`: the `(grid_r, grid_c)` factors of the blocks, or None for 1 throughout.
      has_logits: whether each block has a trainable logit; otherwise `logits` is None above.
    """

    weights: Callable[[jax.Array, LeafPlan], jax.Array]
    scale: Callable[[jax.Array, Any, LeafPlan], jax.Array | None]
    has_logits: bool = False


IDENTITY = Parametrisation(lambda kernel, layer: kernel, lambda weights, logits, layer: None)

# (weights, logits, layer) -> grid: the higher, the more a block deserves to stay
Score = Callable[[jax.Array, Any, LeafPlan], jax.Array]


def compose(
    parametrisation: Parametrisation,
    score: Score,
    phases: Phases,
    *,
    block: int | Sequence[int],
    sparsity: float,
    min_blocks: int,
    where: Callable[[str], bool],
    overrides: Overrides | None,
    scope: str,
    mask_every: int = 1,
    monotone: bool = True,
    forget_masked: bool = False,
    logit_lr: float = 1.0,
    reset_logits_at: Sequence[str] = (),
) -> Sparsifier:
    """Put an algorithm together.

    Args:
      parametrisation: how weights and logits make the effective kernel.
      score: by which the blocks are chosen.
      phases: when.
      block: with `sparsity`, `min_blocks`, `where` and `overrides`, as `plan` takes them.
      sparsity: see there.
      min_blocks: see there.
      where: see there.
      overrides: see there.
      scope: `layer` or `global`.
      mask_every: steps between selections in a sparsification phase.
      monotone: in a sparsification phase, a dropped block stays dropped to its end.
      forget_masked: masked weights are set to zero; otherwise they stay as they were when masked.
      logit_lr: factor on the logits' updates.
      reset_logits_at: kinds of phases on entering which the logits return to zero.
    """
    check_phases(phases)
    if phases.phases[-1].kind == DENSE:
        raise ValueError(f"the last phase is {phases.phases[-1]} and would not leave the network pruned: end sparse")
    if scope not in ("layer", "global"):
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}')
    if mask_every < 1:
        raise ValueError(f"mask_every must be at least 1 step, got {mask_every}")
    if mask_every != int(mask_every):
        raise ValueError(f"mask_every must be a whole number of steps, got {mask_every}")
    choose = select.top_k_per_layer if scope == "layer" else select.top_k_global

    plan = functools.partial(
        planning.plan, block=block, sparsity=sparsity, min_blocks=min_blocks, where=where, overrides=overrides
    )
    planning.check_options(block, sparsity, min_blocks, overrides)

    def layers_of(trainable: Trainable) -> dict[str, LeafPlan]:
        return plan(trainable.params).pruned

    def chosen(trainable: Trainable, masks: Masks, step: jax.Array, layers: dict[str, LeafPlan]) -> Masks:
        """The masks due at a step, given the current ones."""
        scores = {path: score(w, trainable.logits.get(path), layers[path]) for path, w in _kernels(trainable, layers)}
        k = {path: _blocks_due(layer, phases, step) for path, layer in layers.items()}
        narrows = phases.narrows(step) & monotone
        return choose(scores, k, {path: mask | ~narrows for path, mask in masks.items()})

    def init(params: Params) -> State:
        layers = plan(params).pruned
        _check_finite(params, layers)
        own = map_layers(lambda layer, w: w if layer is None else parametrisation.weights(w, layer), params, layers)
        logits = {path: jnp.zeros(la.grid, jnp.float32) for path, la in layers.items() if parametrisation.has_logits}
        trainable = Trainable(own, logits)
        step = jnp.zeros((), jnp.int32)
        masks = {path: jnp.ones(layer.grid, bool) for path, layer in layers.items()}
        if phases.phases[0].kind == SPARSE:
            masks = chosen(trainable, masks, step, layers)
        return trainable, PruneState(step, jnp.zeros((), bool), masks)

    def apply(trainable: Trainable, prune: PruneState) -> Params:
        layers = layers_of(trainable)

        def effective(layer: LeafPlan | None, weights: jax.Array) -> jax.Array:
            if layer is None:
                return weights
            scale = parametrisation.scale(weights, trainable.logits.get(layer.path), layer)
            mask = prune.masks[layer.path]
            return times(weights, jnp.where(mask, 1 if scale is None else scale, 0), layer)

        return map_layers(effective, trainable.params, layers)

    def finalize(trainable: Trainable, prune: PruneState) -> Params:
        layers = layers_of(trainable)

        def exact(layer: LeafPlan | None, weights: jax.Array) -> jax.Array:
            return weights if layer is None else _keep(weights, prune.masks[layer.path], layer)

        return map_layers(exact, apply(trainable, prune), layers)

    def update(trainable: Trainable, prune: PruneState, updates: Trainable | None = None) -> State:
        layers = layers_of(trainable)
        trainable = move(trainable, prune.masks, updates, layers)
        step = prune.step + 1
        # Only the choice of masks stands in the branch: small arrays out, weights read but never copied.
        masks = lax.cond(
            phases.selects(step, mask_every),
            lambda: chosen(trainable, prune.masks, step, layers),
            lambda: prune.masks,
        )
        boundary = phases.is_boundary(step)
        if reset_logits_at:
            reset = boundary & phases.kind_in(reset_logits_at, step)
            logits = {path: jnp.where(reset, 0, x) for path, x in trainable.logits.items()}
            trainable = trainable._replace(logits=logits)
        return trainable, PruneState(step, boundary, masks)

    def move(trainable: Trainable, masks: Masks, updates: Trainable | None, layers: dict[str, LeafPlan]) -> Trainable:
        """Apply an optimizer's updates; masked weights stay as they are, or become zero."""
        moved = trainable
        if updates is not None:
            scaled = {path: logit_lr * u for path, u in updates.logits.items()}
            moved = optax.apply_updates(trainable, updates._replace(logits=scaled))
        elif not forget_masked:
            return trainable

        def held(layer: LeafPlan | None, new: jax.Array, old: jax.Array) -> jax.Array:
            if layer is None:
                return new
            return _keep(new, masks[layer.path], layer, otherwise=0 if forget_masked else old)

        return moved._replace(params=map_layers(held, moved.params, layers, trainable.params))

    return Sparsifier(init, apply, update, finalize, plan, phases)


def check_phases(phases: Any) -> None:
    """Refuse what is no schedule, such as a list of phases."""
    if not isinstance(phases, Phases):
        raise TypeError(f"phases must be a schedule such as `phases.custom(total_steps, [...])` makes, got {phases!r}")


def _blocks_due(layer: LeafPlan, phases: Phases, step: jax.Array) -> jax.Array:
    """`floor((1 - sparsity(t)) * N)`, and exactly the planned number where the target is due."""
    dropped = jnp.ceil(layer.sparsity * phases.fraction(step) * layer.blocks).astype(jnp.int32)
    return jnp.where(phases.reached(step), layer.kept, jnp.maximum(layer.blocks - dropped, layer.kept))


def _kernels(trainable: Trainable, layers: dict[str, LeafPlan]) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(trainable.params)
    return [(path, w) for path, w in ((planning.path_string(p), w) for p, w in leaves) if path in layers]


def times(weights: jax.Array, grid: jax.Array, layer: LeafPlan) -> jax.Array:
    """`weights * spread(grid)`, multiplied in at least float32 and returned in the weights' type."""
    wide = blk.widened(weights)
    return (wide * blk.spread(grid.astype(wide.dtype), layer.shape, layer.block)).astype(weights.dtype)


def _keep(weights: jax.Array, mask: jax.Array, layer: LeafPlan, otherwise: jax.Array | int = 0) -> jax.Array:
    return jnp.where(blk.spread(mask, layer.shape, layer.block), weights, otherwise)


def _check_finite(params: Params, layers: dict[str, LeafPlan]) -> None:
    """Refuse NaN and infinite kernels where there are values to look at: under `jit` there are none."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = planning.path_string(keys)
        if path not in layers or isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            continue
        bad = int(leaf.size - jnp.sum(jnp.isfinite(leaf)))
        if bad:
            raise ValueError(f"{path} holds {bad} NaN or infinite weights of {leaf.size}; scores would be meaningless")
