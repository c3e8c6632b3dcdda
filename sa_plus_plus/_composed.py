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
from jax.sharding import AxisType

from sa_plus_plus import blocks as blk
from sa_plus_plus import dynamic_sparsity, planning
from sa_plus_plus.dynamic_sparsity import Regrowth
from sa_plus_plus.masking import apply_mask, expand_blocks, scale_blocks, zero_masked
from sa_plus_plus.phases import SPARSE, Phases
from sa_plus_plus.planning import LeafPlan, Plan, map_layers
from sa_plus_plus.sharding import automatic, of_grid
from sa_plus_plus.sparsifier import Masks, Params, PruneState, State, Trainable
from sa_plus_plus.trees import added, apart, differs, owned, taken_over


class Parametrisation(NamedTuple):
    """How the effective kernel follows from the trained weights, `W * spread(scale)`.

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
        params = owned(params)
        layers, key = self.plan(params).pruned, self._key_data(key)
        _check_values(params, layers, self.parametrisation.by_norm or self.phases.phases[0].kind == SPARSE)

        def like() -> Any:
            grids: Any = dict.fromkeys(layers, 0)  # replicated, like the numbers
            number: Any = 0
            trainable = Trainable(params, grids if self.parametrisation.has_logits else {})
            return trainable, PruneState(number, number, grids, key)

        state = automatic(functools.partial(self._init, layers=layers), like, params, key)
        return _as_kernels_lie(state, params, layers)

    def _init(self, params: Params, key: jax.Array | None, layers: dict[str, LeafPlan]) -> State:
        def own(layer: LeafPlan | None, w: jax.Array) -> jax.Array:
            return w if layer is None else self.parametrisation.weights(w, None, layer)

        has_logits = self.parametrisation.has_logits
        logits = {path: jnp.zeros(layer.full_grid, jnp.float32) for path, layer in layers.items() if has_logits}
        trainable = Trainable(map_layers(own, params, layers), logits)
        masks = {path: jnp.ones(layer.full_grid, bool) for path, layer in layers.items()}
        prune = PruneState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), masks, key)
        if self.phases.phases[0].kind == SPARSE:
            prune = prune._replace(masks=self._chosen(trainable, prune, prune.step, layers))
        return trainable, prune

    def apply(self, trainable: Trainable, prune: PruneState) -> Params:
        params = automatic(self._apply, lambda: trainable.params, trainable, prune)
        return apart(params, trainable)

    def _apply(self, trainable: Trainable, prune: PruneState) -> Params:
        def effective(layer: LeafPlan | None, weights: jax.Array) -> jax.Array:
            if layer is None:
                return weights
            mask = prune.masks[layer.path]
            own = self._effective(layer, weights, trainable.logits.get(layer.path), mask)
            return _open_to_gradients(layer, own, weights, ~mask & due) if self._by_gradient else own

        due = self._by_gradient and self.regrow.due(self.phases, prune.step + 1)  # type: ignore[union-attr]
        return map_layers(effective, trainable.params, self._layers(trainable))

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
        _warn_unfinished(self.phases, prune, self._layers(trainable))
        return zero_masked(self.apply(trainable, prune), prune.masks, self._layers(trainable))

    def sync_from_params(self, trainable: Trainable, prune: PruneState, params: Params) -> Trainable:
        adopted = automatic(self._sync_from_params, lambda: trainable, trainable, prune, params)
        return apart(adopted, trainable, params)

    def _sync_from_params(self, trainable: Trainable, prune: PruneState, params: Params) -> Trainable:
        def own(layer: LeafPlan | None, weights: jax.Array, given: jax.Array) -> jax.Array:
            if layer is None:
                return taken_over(given, weights)
            logits = trainable.logits.get(layer.path)
            scale = self.parametrisation.scale(weights, logits, layer)
            mask = prune.masks[layer.path]
            effective = self._effective(layer, weights, logits, mask)
            moved = differs(given, effective) & expand_blocks(mask if scale is None else mask & (scale != 0), layer)

            def changed() -> jax.Array:
                wanted = jnp.where(moved, given.astype(weights.dtype), effective)
                new = self.parametrisation.weights(wanted, logits, layer)
                if not self.parametrisation.by_norm:
                    return jnp.where(moved, new, weights)
                whole = jnp.any(
                    blk.to_blocks(moved, layer.block, layer.view), (-3, -1)
                )  # its norm is part of each weight
                return apply_mask(new, whole, layer, otherwise=weights)

            # Norms take several passes over the weights.
            return lax.cond(moved.any(), changed, lambda: weights) if self.parametrisation.by_norm else changed()

        return trainable._replace(params=map_layers(own, trainable.params, self._layers(trainable), params))

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
        grads = grads if self._by_gradient else None
        state = automatic(self._update, lambda: (trainable, prune), trainable, prune, updates, grads)
        return apart(state, trainable, prune)

    def _update(
        self, trainable: Trainable, prune: PruneState, updates: Trainable | None, grads: Trainable | None
    ) -> State:
        layers = self._layers(trainable)
        trainable = self._moved(trainable, prune.masks, updates, layers)
        if self.proximal_step is not None and updates is not None:
            trainable = self._after_proximal_step(trainable, ~self.phases.kind_in([SPARSE], prune.step), layers)
        step = prune.step + 1
        # Only the choice of masks is inside the branch: small arrays out, weights read but never copied.
        masks = lax.cond(
            self.phases.selects(step, self.mask_every),
            lambda: self._chosen(trainable, prune, step, layers),
            lambda: prune.masks,
        )
        if self.regrow is not None and (grads is not None or not self._by_gradient):
            masks = lax.cond(
                self.regrow.due(self.phases, step),
                lambda: self._regrown(trainable, prune._replace(masks=masks), step, grads, layers),
                lambda: masks,
            )
        phase = self.phases.index(step)
        if self.reset_logits_at:
            reset = (phase != prune.phase) & self.phases.kind_in(self.reset_logits_at, step)
            logits = {path: jnp.where(reset, 0, x) for path, x in trainable.logits.items()}
            trainable = trainable._replace(logits=logits)
        return trainable, PruneState(step, phase, masks, prune.key)

    def _moved(
        self, trainable: Trainable, masks: Masks, updates: Trainable | None, layers: dict[str, LeafPlan]
    ) -> Trainable:
        """Apply an optimizer's updates; masked weights stay as they are, or become zero."""
        moved = trainable
        if updates is not None:
            scaled = {path: self.logit_lr * u for path, u in updates.logits.items()}
            moved = added(trainable, updates._replace(logits=scaled))
        elif not self.forget_masked:
            return trainable

        def held(layer: LeafPlan | None, new: jax.Array, old: jax.Array) -> jax.Array:
            if layer is None:
                return new
            return _keep(layer, new, masks[layer.path], 0 if self.forget_masked else old)

        return moved._replace(params=map_layers(held, moved.params, layers, trainable.params))

    def _after_proximal_step(self, trainable: Trainable, due: jax.Array, layers: dict[str, LeafPlan]) -> Trainable:
        logits = dict(trainable.logits)

        def stepped(layer: LeafPlan | None, weights: jax.Array) -> jax.Array:
            if layer is None:
                return weights
            old = weights, logits.get(layer.path)
            new = self.proximal_step(layer, *old)  # type: ignore[misc]
            weights, own = jax.tree.map(lambda new, old: jnp.where(due, new, old), new, old)
            if own is not None:
                logits[layer.path] = own
            return weights

        return Trainable(map_layers(stepped, trainable.params, layers), logits)

    def _chosen(self, trainable: Trainable, prune: PruneState, step: jax.Array, layers: dict[str, LeafPlan]) -> Masks:
        """The masks due at a step, given the current ones."""

        def scored(path: str, weights: jax.Array) -> jax.Array:
            key = None if prune.key is None else _layer_key(prune.key, path)
            return self._scored(layers[path], weights, trainable.logits.get(path), key)

        scores = {path: scored(path, w) for path, w in _kernels(trainable, layers)}
        fraction, reached = self.phases.fraction(step), self.phases.reached(step)
        k = {path: _blocks_due(layer, fraction, reached) for path, layer in layers.items()}
        narrows = self.phases.narrows(step) & self.monotone
        return self.choose(scores, k, {path: mask | ~narrows for path, mask in prune.masks.items()})

    def _regrown(
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

        def growth(path: str) -> jax.Array:
            key = None if prune.key is None else jax.random.fold_in(_layer_key(prune.key, path), step)
            return self.regrow.growth(gradients.get(path), layers[path], key)  # type: ignore[union-attr]

        norms = {
            path: blk.frobenius(w, layers[path].block, layers[path].view) for path, w in _kernels(trainable, layers)
        }
        joins, kept = {path: growth(path) for path in norms}, {path: layers[path].kept_each for path in norms}
        return dynamic_sparsity.regrow(
            self.choose, prune.masks, norms, joins, kept, self.regrow.share(self.phases, step)
        )

    @property
    def _by_gradient(self) -> bool:
        return self.regrow is not None and self.regrow.by_gradient

    @functools.cached_property
    def _scored(self) -> Callable[..., jax.Array]:
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
        own = jax.random.key_impl(key) == "threefry2x32"
        return jnp.copy(jax.random.key_data(key)) if own else jax.random.bits(key, (2,), "uint32")


def _as_kernels_lie(state: State, params: Params, layers: dict[str, LeafPlan]) -> State:
    """Masks and logits sharded like their kernels."""
    found = {path: of_grid(layers[path], w) for path, w in _kernels(Trainable(params, {}), layers)}
    split = {path: sharding for path, sharding in found.items() if sharding is not None}

    def placed(grids: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: _placed(grid, split[path]) if path in split else grid for path, grid in grids.items()}

    trainable, prune = state
    return trainable._replace(logits=placed(trainable.logits)), prune._replace(masks=placed(prune.masks))


def _placed(grid: jax.Array, sharding: Any) -> jax.Array:
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(grid, sharding) if explicit else jax.device_put(grid, sharding)


def traced_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(layer, *arrays)`, traced once for all layers that differ only in their paths.

    A network of a thousand layers has few shapes; tracing each layer separately would dominate the first step.
    """
    compiled = jax.jit(fn, static_argnums=0)
    return lambda layer, *arrays: compiled(layer._replace(path=""), *arrays)


@traced_once
def _open_to_gradients(layer: LeafPlan, effective: jax.Array, weights: jax.Array, opened: jax.Array) -> jax.Array:
    """The same kernel, with the gradients of the blocks where `opened` is true passed on to their weights."""
    return effective + apply_mask(weights - lax.stop_gradient(weights), opened, layer)


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
