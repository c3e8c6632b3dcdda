"""A composed algorithm: the functions of a `Sparsifier`, built from a parametrisation, a score and a schedule."""

import dataclasses
import functools
import math
import warnings
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding

from sa_plus_plus import blocks as blk
from sa_plus_plus import dynamic_sparsity, planning, select
from sa_plus_plus.dynamic_sparsity import Regrowth
from sa_plus_plus.masking import apply_mask, expand_blocks, scale_blocks, zero_masked
from sa_plus_plus.phases import SPARSE, Phases
from sa_plus_plus.planning import LeafPlan, Plan, map_layers
from sa_plus_plus.sharding import automatic, of_grid
from sa_plus_plus.sparsifier import Masks, Params, PruneState, State, Trainable
from sa_plus_plus.trees import apply_updates, copy_arrays, differs, merge_changes, unalias


class Parametrisation(NamedTuple):
    """How the effective kernel follows from the trained weights, `W * expand_blocks(scale)`.

    Functions of a layer are traced once for all layers that differ only in their paths, so `layer.path` is empty here,
    in a `Score` and in a `ProximalStep`.

    Attributes:
      weights: `weights(kernel, logits, layer)`: the trained weights whose effective kernel is `kernel`. `logits` is
        None before training, when all logits are 0, and where the algorithm has none.
      scale: `scale(weights, logits, layer)`: the `(grid_r, grid_c)` factors of the blocks, or None for 1 throughout.
      has_logits: whether each block has a trainable logit; otherwise `logits` is None above.
      by_norm: whether `scale` depends on the weights. A block then changes as a whole, and a block of zeros stays zero.
      attention: whether the logits are those of attention weights, `N softmax(logits)`, which reports then show.
      straight_through: whether each logit gets the gradient of its block's factor, even if the block is masked.
    """

    weights: Callable[[jax.Array, Any, LeafPlan], jax.Array]
    scale: Callable[[jax.Array, Any, LeafPlan], jax.Array | None]
    has_logits: bool = False
    by_norm: bool = False
    straight_through: bool = False
    attention: bool = False


IDENTITY = Parametrisation(lambda kernel, logits, layer: kernel, lambda weights, logits, layer: None)

# score(weights, logits, layer, key) -> a number per block, of the shape `layer.full_grid`: the higher, the more a block
# deserves to stay. `logits` is None without logits, `key` (the layer's own) without a seed.
Score = Callable[[jax.Array, Any, LeafPlan, Any], jax.Array]
# proximal_step(layer, weights, logits) -> (weights, logits): one step of a penalty.
ProximalStep = Callable[[LeafPlan, jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Composed:
    """The parts of `compose`, and the functions of a `Sparsifier` built from them."""

    parametrisation: Parametrisation
    score: Score
    phases: Phases
    plan: Callable[[Params], Plan]
    choose: Callable[..., Masks]
    mask_every: int
    monotone: bool
    forget_masked: bool
    logit_lr: float
    reset_logits_at: tuple[str, ...]
    regrow: Regrowth | None
    proximal_step: ProximalStep | None
    seed: Any

    def init(self, params: Params, key: jax.Array | None = None) -> State:
        params = copy_arrays(params)
        layers = self.plan(params).pruned
        _check_values(params, layers, self.parametrisation.by_norm or self.phases.phases[0].kind == SPARSE)
        return _shard_like_kernels(self._initial_state(params, self._key_data(key)), params, layers)

    def _replicated_like(self, params: Params, key: jax.Array | None) -> Any:
        """The structure of the initial state: grids of blocks are replicated, like numbers."""
        grids: Any = dict.fromkeys(self.plan(params).pruned, 0)
        number: Any = 0
        trainable = Trainable(params, grids if self.parametrisation.has_logits else {})
        return trainable, PruneState(number, number, grids, key)

    @automatic(_replicated_like)
    def _initial_state(self, params: Params, key: jax.Array | None) -> State:
        def to_weights(layer: LeafPlan | None, kernel: jax.Array) -> jax.Array:
            return kernel if layer is None else self.parametrisation.weights(kernel, None, layer)

        layers, has_logits = self.plan(params).pruned, self.parametrisation.has_logits
        logits = {path: jnp.zeros(layer.full_grid, jnp.float32) for path, layer in layers.items() if has_logits}
        trainable = Trainable(map_layers(to_weights, params, layers), logits)
        masks = {path: jnp.ones(layer.full_grid, bool) for path, layer in layers.items()}
        prune = PruneState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), masks, key)
        if self.phases.phases[0].kind == SPARSE:
            prune = prune._replace(masks=self._select_masks(trainable, prune, prune.step, layers))
        return trainable, prune

    @automatic(lambda self, trainable, prune: trainable.params)
    def apply(self, trainable: Trainable, prune: PruneState) -> Params:
        def to_kernel(layer: LeafPlan | None, weights: jax.Array) -> jax.Array:
            if layer is None:
                return weights
            mask = prune.masks[layer.path]
            kernel = self._effective(layer, weights, trainable.logits.get(layer.path), mask)
            return _open_to_gradients(layer, kernel, weights, ~mask & regrow_due) if self._by_gradient else kernel

        regrow_due = self._by_gradient and self.regrow.due(self.phases, prune.step + 1)  # type: ignore[union-attr]
        return unalias(map_layers(to_kernel, trainable.params, self._layers(trainable)), trainable)

    @functools.cached_property
    def _effective(self) -> Callable[..., jax.Array]:
        def effective(layer: LeafPlan, weights: jax.Array, logits: Any, mask: jax.Array) -> jax.Array:
            scale = self.parametrisation.scale(weights, logits, layer)
            factors = jnp.where(mask, 1 if scale is None else scale, 0)
            if self.parametrisation.straight_through:
                factors = factors + (logits - lax.stop_gradient(logits))
            return scale_blocks(weights, factors, layer)

        return traced_once(effective)

    def finalize(self, trainable: Trainable, prune: PruneState) -> Params:
        layers = self._layers(trainable)
        _warn_unfinished(self.phases, prune, layers)
        return zero_masked(layers, self.apply(trainable, prune), prune.masks)

    @automatic(lambda self, trainable, prune, params: trainable)
    def sync_from_params(self, trainable: Trainable, prune: PruneState, params: Params) -> Trainable:
        def synced(layer: LeafPlan | None, weights: jax.Array, target: jax.Array) -> jax.Array:
            if layer is None:
                return merge_changes(target, weights)
            logits, mask = trainable.logits.get(layer.path), prune.masks[layer.path]
            # Computed by the same program as in `apply`: what `apply` returned must not look changed.
            kernel = self._effective(layer, weights, logits, mask)
            return self._weights_for(layer, weights, logits, mask, kernel, target)

        synced_params = map_layers(synced, trainable.params, self._layers(trainable), params)
        return unalias(trainable._replace(params=synced_params), trainable, params)

    @functools.cached_property
    def _weights_for(self) -> Callable[..., jax.Array]:
        """Weights whose effective kernel is `target`, where it differs from `kernel`, that of the present weights."""

        def solve(
            layer: LeafPlan, weights: jax.Array, logits: Any, mask: jax.Array, kernel: jax.Array, target: jax.Array
        ) -> jax.Array:
            scale, by_norm = self.parametrisation.scale(weights, logits, layer), self.parametrisation.by_norm
            has_effect = mask if scale is None else mask & (scale != 0)
            changed = differs(target, kernel) & expand_blocks(has_effect, layer)

            def solution() -> jax.Array:
                wanted = jnp.where(changed, target.astype(weights.dtype), kernel)
                new = self.parametrisation.weights(wanted, logits, layer)
                if not by_norm:
                    return jnp.where(changed, new, weights)
                # The norm of a block is part of each of its weights.
                changed_blocks = jnp.any(blk.to_blocks(changed, layer.block, layer.view), (-3, -1))
                return apply_mask(new, changed_blocks, layer, otherwise=weights)

            # Norms take several passes over the weights.
            return lax.cond(changed.any(), solution, lambda: weights) if by_norm else solution()

        return traced_once(solve)

    def update(
        self,
        trainable: Trainable,
        prune: PruneState,
        updates: Trainable | None = None,
        grads: Trainable | None = None,
    ) -> State:
        if self._by_gradient and updates is not None and grads is None:
            raise ValueError(
                "this algorithm chooses blocks by their gradients: call update(trainable, prune, updates, grads) with "
                "those that the optimizer was given"
            )
        return self._advance(trainable, prune, updates, grads if self._by_gradient else None)

    @automatic(lambda self, trainable, prune, updates, grads: (trainable, prune))
    def _advance(
        self, trainable: Trainable, prune: PruneState, updates: Trainable | None, grads: Trainable | None
    ) -> State:
        arguments, layers = (trainable, prune), self._layers(trainable)
        trainable = self._apply_updates(trainable, prune.masks, updates, layers)
        if self.proximal_step is not None and updates is not None:
            trainable = self._apply_proximal_step(trainable, ~self.phases.kind_in([SPARSE], prune.step), layers)
        step = prune.step + 1
        # Only the choice of masks is inside the branch: small arrays out, weights read but never copied.
        masks = lax.cond(
            self.phases.selects(step, self.mask_every),
            lambda: self._select_masks(trainable, prune, step, layers),
            lambda: prune.masks,
        )
        if self.regrow is not None and (grads is not None or not self._by_gradient):
            masks = lax.cond(
                self.regrow.due(self.phases, step),
                lambda: self._regrow_masks(trainable, prune._replace(masks=masks), step, grads, layers),
                lambda: masks,
            )
        phase = self.phases.index(step)
        if self.reset_logits_at:
            reset = (phase != prune.phase) & self.phases.kind_in(self.reset_logits_at, step)
            logits = {path: jnp.where(reset, 0, x) for path, x in trainable.logits.items()}
            trainable = trainable._replace(logits=logits)
        return unalias((trainable, PruneState(step, phase, masks, prune.key)), arguments)

    def _apply_updates(
        self, trainable: Trainable, masks: Masks, updates: Trainable | None, layers: dict[str, LeafPlan]
    ) -> Trainable:
        """Apply an optimizer's updates; masked weights stay as they are, or become zero."""
        updated = trainable
        if updates is not None:
            scaled = {path: self.logit_lr * u for path, u in updates.logits.items()}
            updated = apply_updates(trainable, updates._replace(logits=scaled))
        elif not self.forget_masked:
            return trainable

        def masked(layer: LeafPlan | None, new: jax.Array, old: jax.Array) -> jax.Array:
            if layer is None:
                return new
            return _keep(layer, new, masks[layer.path], 0 if self.forget_masked else old)

        return updated._replace(params=map_layers(masked, updated.params, layers, trainable.params))

    def _apply_proximal_step(self, trainable: Trainable, due: jax.Array, layers: dict[str, LeafPlan]) -> Trainable:
        logits = dict(trainable.logits)

        def stepped(layer: LeafPlan | None, weights: jax.Array) -> jax.Array:
            if layer is None:
                return weights
            old = weights, logits.get(layer.path)
            new = self.proximal_step(layer, *old)  # type: ignore[misc]
            weights, layer_logits = jax.tree.map(lambda new, old: jnp.where(due, new, old), new, old)
            if layer_logits is not None:
                logits[layer.path] = layer_logits
            return weights

        return Trainable(map_layers(stepped, trainable.params, layers), logits)

    def _select_masks(
        self, trainable: Trainable, prune: PruneState, step: jax.Array, layers: dict[str, LeafPlan]
    ) -> Masks:
        """The masks due at a step, given the current ones."""

        def block_scores(path: str, weights: jax.Array) -> jax.Array:
            key = None if prune.key is None else _layer_key(prune.key, path)
            return self._traced_score(layers[path], weights, trainable.logits.get(path), key)

        scores = {path: block_scores(path, w) for path, w in _kernels(trainable, layers)}
        fraction, reached = self.phases.fraction(step), self.phases.reached(step)
        k = {path: _blocks_due(layer, fraction, reached) for path, layer in layers.items()}
        narrows = self.phases.narrows(step) & self.monotone
        return self._keeping(layers)(scores, k, {path: mask | ~narrows for path, mask in prune.masks.items()})

    def _keeping(self, layers: dict[str, LeafPlan]) -> Callable[..., Masks]:
        return select.keeping(self.choose, {path: layer.min_kept for path, layer in layers.items()})

    def _regrow_masks(
        self,
        trainable: Trainable,
        prune: PruneState,
        step: jax.Array,
        grads: Trainable | None,
        layers: dict[str, LeafPlan],
    ) -> Masks:
        """The masks after blocks have been replaced at a step."""
        assert self.regrow is not None
        gradients = {} if grads is None else dict(_kernels(grads, layers))

        def growth_scores(path: str, weights: jax.Array) -> jax.Array:
            layer, gradient = layers[path], gradients.get(path)
            key = None if prune.key is None else jax.random.fold_in(_layer_key(prune.key, path), step)
            scale = self.parametrisation.scale(weights, trainable.logits.get(path), layer)
            if gradient is not None and scale is not None:  # masked blocks have that of the effective kernel already
                unscaled = jnp.where(prune.masks[path] & (scale > 0), 1 / jnp.where(scale > 0, scale, 1), 1)
                gradient = scale_blocks(gradient, unscaled, layer)
            return self.regrow.growth(gradient, layer, key)  # type: ignore[union-attr]

        kernels = dict(_kernels(trainable, layers))
        norms = {path: blk.frobenius(w, layers[path].block, layers[path].view) for path, w in kernels.items()}
        growth = {path: growth_scores(path, w) for path, w in kernels.items()}
        kept = {path: layers[path].kept_each for path in norms}
        share = self.regrow.share(self.phases, step)
        return dynamic_sparsity.regrow(self._keeping(layers), prune.masks, norms, growth, kept, share)

    @property
    def _by_gradient(self) -> bool:
        return self.regrow is not None and self.regrow.by_gradient

    @functools.cached_property
    def _traced_score(self) -> Callable[..., jax.Array]:
        return traced_once(lambda layer, weights, logits, key: self.score(weights, logits, layer, key))

    def _layers(self, trainable: Trainable) -> dict[str, LeafPlan]:
        return self.plan(trainable.params).pruned

    def _key_data(self, key: jax.Array | None) -> jax.Array | None:
        """As plain integers, which any checkpoint can hold."""
        if self.seed is None:
            return None
        key = jax.random.key(self.seed, impl="threefry2x32") if key is None else key
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return jnp.copy(key)
        threefry = jax.random.key_impl(key) == "threefry2x32"
        return jnp.copy(jax.random.key_data(key)) if threefry else jax.random.bits(key, (2,), "uint32")


def _shard_like_kernels(state: State, params: Params, layers: dict[str, LeafPlan]) -> State:
    """Masks and logits sharded like their kernels."""
    shardings = {path: of_grid(layers[path], w) for path, w in _kernels(Trainable(params, {}), layers)}

    def sharded(grids: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: _reshard(grid, shardings[path]) for path, grid in grids.items()}

    trainable, prune = state
    return trainable._replace(logits=sharded(trainable.logits)), prune._replace(masks=sharded(prune.masks))


def _reshard(grid: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        return grid
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(grid, sharding) if explicit else jax.device_put(grid, sharding)


def traced_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(layer, *arrays)`, traced once for all layers that differ only in their paths.

    A network of a thousand layers has few shapes; tracing each layer separately would dominate the first step.
    """
    compiled = jax.jit(fn, static_argnums=0)
    return lambda layer, *arrays: compiled(layer._replace(path=""), *arrays)


@traced_once
def _open_to_gradients(layer: LeafPlan, kernel: jax.Array, weights: jax.Array, opened: jax.Array) -> jax.Array:
    """The same kernel, with the gradients of the blocks where `opened` is true passed on to their weights."""
    return kernel + apply_mask(weights - lax.stop_gradient(weights), opened, layer)


@traced_once
def _keep(layer: LeafPlan, weights: jax.Array, mask: jax.Array, otherwise: Any) -> jax.Array:
    return apply_mask(weights, mask, layer, otherwise)


@traced_once
def _blocks_due(layer: LeafPlan, fraction: jax.Array, reached: jax.Array) -> jax.Array:
    """`floor((1 - sparsity(t)) * N)` of each matrix, and exactly the planned number where the target is due.

    Args:
      layer: whose blocks are counted.
      fraction: share of the target sparsity that is due.
      reached: whether all of it is.
    """
    blocks, kept = math.prod(layer.grid), layer.kept_each
    dropped = jnp.ceil(layer.sparsity * fraction * blocks).astype(jnp.int32)
    return jnp.where(reached, kept, jnp.maximum(blocks - dropped, kept))


def _kernels(trainable: Trainable, layers: dict[str, LeafPlan]) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(trainable.params)
    return [(path, w) for path, w in ((planning.path_string(p), w) for p, w in leaves) if path in layers]


def _layer_key(data: jax.Array, path: str) -> jax.Array:
    """A layer's own key, named by its path, so that it does not depend on which others are pruned."""
    return jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), zlib.crc32(path.encode()))


def _check_values(params: Params, layers: dict[str, LeafPlan], stuck_at_zero: bool) -> None:
    """Refuse kernels that are not finite, or would stay zero; under `jit` there are no values to check."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = planning.path_string(keys)
        if path not in layers or isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            continue
        bad = int(leaf.size - jnp.sum(jnp.isfinite(leaf)))
        if bad:
            raise ValueError(f"{path} holds {bad} NaN or infinite weights of {leaf.size}; scores would be meaningless")
        if stuck_at_zero and not jnp.any(leaf):
            raise ValueError(
                f"all {leaf.size} weights of {path} are zero, so no block is better than another, and none could grow: "
                "start from other weights, begin with a dense phase, or leave the kernel out by `where`"
            )


def _warn_unfinished(phases: Phases, prune: PruneState, layers: dict[str, LeafPlan]) -> None:
    """Warn if `finalize` runs before the schedule ends; under `jit` there are no values to check."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(prune)) or phases.reached(prune.step).all():
        return
    step, blocks = int(np.max(prune.step)), sum(layer.blocks for layer in layers.values())
    masked = 1 - np.mean(np.concatenate([np.ravel(prune.masks[path]) for path in layers]))
    planned = 1 - sum(layer.kept for layer in layers.values()) / blocks
    warnings.warn(
        f"finalize: after step {step} of {phases.total_steps}, in a {phases.at(step).kind} phase, {masked:.1%} of the "
        f"blocks are masked, where {planned:.1%} are planned: the network is pruned when its schedule is done",
        stacklevel=3,
    )
