"""The pruning algorithms: each is a parametrisation x a score x a schedule of phases (paper, section 4.1).

Every one of them multiplies each block of a kernel by one number: the effective kernel is
`W * spread(scale * mask)`. The *parametrisation* says what `scale` is (1, an attention weight, a norm), the *score*
by which blocks are chosen, the *phases* when. `_compose` makes a `Sparsifier` of the three.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sa_plus_plus import blocks as blk
from sa_plus_plus import plan as planning
from sa_plus_plus import select
from sa_plus_plus.phases import DENSE, KINDS, SPARSE, Phases
from sa_plus_plus.plan import MIN_BLOCKS, Layer, Overrides, Plan, map_layers, not_embedding

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
        like `trainable`; masked weights stay untouched), then go one step on: phase, masks, what a boundary brings.
      finalize: `finalize(trainable, prune) -> params`: the pruned network in the model's own tree, masked blocks
        exactly zero. Equal to `apply`, for use after the last step.
      plan: `plan(params) -> Plan`: which layers are pruned and how.
      phases: the schedule.
    """

    init: Callable[[Params], State]
    apply: Callable[[Trainable, PruneState], Params]
    update: Callable[..., State]
    finalize: Callable[[Trainable, PruneState], Params]
    plan: Callable[[Params], Plan]
    phases: Phases


class _Parametrisation(NamedTuple):
    weights: Callable[[jax.Array, Layer], jax.Array]  # the model's kernel -> the trained weights
    scale: Callable[[jax.Array, Any, Layer], jax.Array | None]  # (weights, logits, layer) -> grid; None for 1
    has_logits: bool = False


# (weights, logits, layer) -> grid; the higher, the more a block deserves to stay
_Score = Callable[[jax.Array, Any, Layer], jax.Array]

_IDENTITY = _Parametrisation(lambda kernel, layer: kernel, lambda weights, logits, layer: None)


def _compose(
    parametrisation: _Parametrisation,
    score: _Score,
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
    if phases.phases[-1].kind == DENSE:
        raise ValueError(f"the last phase is {phases.phases[-1]} and would not leave the network pruned: end sparse")
    if scope not in ("layer", "global"):
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}')
    if mask_every < 1:
        raise ValueError(f"mask_every must be at least 1 step, got {mask_every}")
    choose = select.top_k_per_layer if scope == "layer" else select.top_k_global

    plan = functools.partial(
        planning.plan, block=block, sparsity=sparsity, min_blocks=min_blocks, where=where, overrides=overrides
    )
    planning.check_options(block, sparsity, min_blocks, overrides)

    def layers_of(trainable: Trainable) -> dict[str, Layer]:
        return plan(trainable.params).pruned

    def chosen(trainable: Trainable, masks: Masks, step: jax.Array, layers: dict[str, Layer]) -> Masks:
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

        def effective(layer: Layer | None, weights: jax.Array) -> jax.Array:
            if layer is None:
                return weights
            scale = parametrisation.scale(weights, trainable.logits.get(layer.path), layer)
            mask = prune.masks[layer.path]
            return _times(weights, jnp.where(mask, 1 if scale is None else scale, 0), layer)

        return map_layers(effective, trainable.params, layers)

    def finalize(trainable: Trainable, prune: PruneState) -> Params:
        layers = layers_of(trainable)

        def exact(layer: Layer | None, weights: jax.Array) -> jax.Array:
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

    def move(trainable: Trainable, masks: Masks, updates: Trainable | None, layers: dict[str, Layer]) -> Trainable:
        """Apply an optimizer's updates; masked weights stay as they are, or become zero."""
        moved = trainable
        if updates is not None:
            scaled = {path: logit_lr * u for path, u in updates.logits.items()}
            moved = optax.apply_updates(trainable, updates._replace(logits=scaled))
        elif not forget_masked:
            return trainable

        def held(layer: Layer | None, new: jax.Array, old: jax.Array) -> jax.Array:
            if layer is None:
                return new
            return _keep(new, masks[layer.path], layer, otherwise=0 if forget_masked else old)

        return moved._replace(params=map_layers(held, moved.params, layers, trainable.params))

    return Sparsifier(init, apply, update, finalize, plan, phases)


def _blocks_due(layer: Layer, phases: Phases, step: jax.Array) -> jax.Array:
    """`floor((1 - sparsity(t)) * N)`, and exactly the planned number where the target is due."""
    due = jnp.floor((1 - layer.sparsity * phases.fraction(step)) * layer.blocks).astype(jnp.int32)
    return jnp.where(phases.reached(step), layer.kept, jnp.maximum(due, layer.kept))


def _kernels(trainable: Trainable, layers: dict[str, Layer]) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(trainable.params)
    return [(path, w) for path, w in ((planning.path_string(p), w) for p, w in leaves) if path in layers]


def _times(weights: jax.Array, grid: jax.Array, layer: Layer) -> jax.Array:
    """`weights * spread(grid)`, multiplied in the grid's precision and returned in the weights'."""
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    factor = blk.spread(grid.astype(wide), layer.shape, layer.block)
    return (weights.astype(wide) * factor).astype(weights.dtype)


def _keep(weights: jax.Array, mask: jax.Array, layer: Layer, otherwise: jax.Array | int = 0) -> jax.Array:
    return jnp.where(blk.spread(mask, layer.shape, layer.block), weights, otherwise)


def _check_finite(params: Params, layers: dict[str, Layer]) -> None:
    """Refuse NaN and infinite kernels where there are values to look at: under `jit` there are none."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = planning.path_string(keys)
        if path not in layers or isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            continue
        bad = int(leaf.size - jnp.sum(jnp.isfinite(leaf)))
        if bad:
            raise ValueError(f"{path} holds {bad} NaN or infinite weights of {leaf.size}; scores would be meaningless")


def _norm_score(weights: jax.Array, logits: Any, layer: Layer) -> jax.Array:
    return blk.frobenius(weights, layer.block)


def dense(*, phases: Phases) -> Sparsifier:
    """No pruning: the dense baseline, for running through the same loop.

    Args:
      phases: gives the length of the run; must be one dense phase.

    Raises:
      ValueError: if a phase is not dense.
    """
    if odd := [str(p) for p in phases.phases if p.kind != DENSE]:
        raise ValueError(f"dense prunes nothing, but the schedule has {odd[0]}")

    def plan(params: Params) -> Plan:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return Plan(tuple(planning.stays_dense(planning.path_string(path), leaf, "dense") for path, leaf in leaves))

    def init(params: Params) -> State:
        return Trainable(params, {}), PruneState(jnp.zeros((), jnp.int32), jnp.zeros((), bool), {})

    def update(trainable: Trainable, prune: PruneState, updates: Trainable | None = None) -> State:
        if updates is not None:
            trainable = optax.apply_updates(trainable, updates)
        step = prune.step + 1
        return trainable, PruneState(step, phases.is_boundary(step), {})

    return Sparsifier(init, lambda t, prune: t.params, update, lambda t, prune: t.params, plan, phases)


def magnitude(
    *,
    block: int | Sequence[int],
    sparsity: float,
    phases: Phases,
    min_blocks: int = MIN_BLOCKS,
    where: Callable[[str], bool] = not_embedding,
    overrides: Overrides | None = None,
    scope: str = "layer",
) -> Sparsifier:
    """One-shot magnitude pruning: the blocks of largest Frobenius norm when the dense phase ends, then fine-tuning.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.magnitude(total_steps)`.
      min_blocks: kernels with fewer blocks stay dense.
      where: predicate on the path of a leaf; by default all but embeddings.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    return _compose(
        _IDENTITY,
        _norm_score,
        phases,
        block=block,
        sparsity=sparsity,
        min_blocks=min_blocks,
        where=where,
        overrides=overrides,
        scope=scope,
    )


def gradual_magnitude(
    *,
    block: int | Sequence[int],
    sparsity: float,
    phases: Phases,
    mask_every: int = 1,
    monotone: bool = True,
    min_blocks: int = MIN_BLOCKS,
    where: Callable[[str], bool] = not_embedding,
    overrides: Overrides | None = None,
    scope: str = "layer",
) -> Sparsifier:
    """Gradual magnitude pruning, a control: `magnitude` with the sparsity rising over a long sparsification phase.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.gradual_magnitude(total_steps)`.
      mask_every: steps between selections in the sparsification phase.
      monotone: a block once dropped stays dropped.
      min_blocks: kernels with fewer blocks stay dense.
      where: predicate on the path of a leaf; by default all but embeddings.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.
    """
    return _compose(
        _IDENTITY,
        _norm_score,
        phases,
        block=block,
        sparsity=sparsity,
        mask_every=mask_every,
        monotone=monotone,
        min_blocks=min_blocks,
        where=where,
        overrides=overrides,
        scope=scope,
    )


def random(
    *,
    block: int | Sequence[int],
    sparsity: float,
    phases: Phases,
    seed: int | jax.Array = 0,
    min_blocks: int = MIN_BLOCKS,
    where: Callable[[str], bool] = not_embedding,
    overrides: Overrides | None = None,
    scope: str = "layer",
) -> Sparsifier:
    """A fixed random mask, a control: what the best of the others must beat.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.random(total_steps)`.
      seed: which mask; may be traced, to `vmap` over masks.
      min_blocks: kernels with fewer blocks stay dense.
      where: predicate on the path of a leaf; by default all but embeddings.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.
    """

    def score(weights: jax.Array, logits: Any, layer: Layer) -> jax.Array:
        # A layer's own stream, named by its path, so that it does not depend on which others are pruned.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(layer.path.encode()))
        return jax.random.uniform(key, layer.grid, jnp.float32)

    return _compose(
        _IDENTITY,
        score,
        phases,
        block=block,
        sparsity=sparsity,
        min_blocks=min_blocks,
        where=where,
        overrides=overrides,
        scope=scope,
    )


def acdc(
    *,
    block: int | Sequence[int],
    sparsity: float,
    phases: Phases,
    form: str = "pruning",
    min_blocks: int = MIN_BLOCKS,
    where: Callable[[str], bool] = not_embedding,
    overrides: Overrides | None = None,
    scope: str = "layer",
) -> Sparsifier:
    """Alternating compressed/decompressed training with blocks: stochastic iterative hard thresholding.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.acdc(total_steps)`.
      form: `pruning`: pruned weights restart from 0 in the next dense phase (the paper's choice for ImageNet);
        `masking`: they are as they were when masked (its choice for Criteo).
      min_blocks: kernels with fewer blocks stay dense.
      where: predicate on the path of a leaf; by default all but embeddings.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.

    Raises:
      ValueError: for an unknown form, options out of range, or a schedule that ends dense.
    """
    if form not in ("pruning", "masking"):
        raise ValueError(f'form must be "pruning" or "masking", got {form!r}')
    return _compose(
        _IDENTITY,
        _norm_score,
        phases,
        block=block,
        sparsity=sparsity,
        min_blocks=min_blocks,
        where=where,
        overrides=overrides,
        scope=scope,
        forget_masked=form == "pruning",
    )


def powerpropagation(
    *,
    block: int | Sequence[int],
    sparsity: float,
    phases: Phases,
    alpha: float = 2.0,
    min_blocks: int = MIN_BLOCKS,
    where: Callable[[str], bool] = not_embedding,
    overrides: Overrides | None = None,
    scope: str = "layer",
) -> Sparsifier:
    """Block PowerPropagation: the effective block is `W * ||W||_F^(alpha - 1)`, so that large blocks grow faster.

    The trained weights start at `W = U / ||U||^((alpha - 1) / alpha)`, so that the effective kernel starts as the
    model's own initialisation `U`. A block of zeros has gradient 0 and stays zero.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.powerpropagation(total_steps)`.
      alpha: at least 1; 2 is the paper's (Lemma 2.3), 1 is `magnitude`.
      min_blocks: kernels with fewer blocks stay dense.
      where: predicate on the path of a leaf; by default all but embeddings.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    if not alpha >= 1:
        raise ValueError(f"alpha must be at least 1, got {alpha}")

    def norm_to(weights: jax.Array, power: float, layer: Layer) -> jax.Array:
        """`||W||_F^power` of each block; 0, with gradient 0, for a block of zeros."""
        squares = blk.sum_of_squares(weights, layer.block)
        positive = squares > 0
        return jnp.where(positive, jnp.where(positive, squares, 1) ** (power / 2), 0)

    def weights(kernel: jax.Array, layer: Layer) -> jax.Array:
        return _times(kernel, norm_to(kernel, (1 - alpha) / alpha, layer), layer)

    def scale(weights: jax.Array, logits: Any, layer: Layer) -> jax.Array | None:
        return None if alpha == 1 else norm_to(weights, alpha - 1, layer)

    def score(weights: jax.Array, logits: Any, layer: Layer) -> jax.Array:
        return norm_to(weights, alpha, layer)  # the norm of the effective block

    return _compose(
        _Parametrisation(weights, scale),
        score,
        phases,
        block=block,
        sparsity=sparsity,
        min_blocks=min_blocks,
        where=where,
        overrides=overrides,
        scope=scope,
    )


def sequential_attention(
    *,
    block: int | Sequence[int],
    sparsity: float,
    phases: Phases,
    clip: str | tuple[float, float] | None = "density",
    monotone: bool = True,
    mask_every: int = 1,
    logit_lr: float = 1.0,
    reset_logits_at: Sequence[str] = (),
    min_blocks: int = MIN_BLOCKS,
    where: Callable[[str], bool] = not_embedding,
    overrides: Overrides | None = None,
    scope: str = "layer",
) -> Sparsifier:
    """SequentialAttention++ (Algorithm 1): a trainable attention weight per block guides the search.

    Each pruned layer of `N` blocks has a logit per block, all 0 at the start, and attention weights
    `A = N * softmax(logits)` of mean 1. The effective kernel is `W * spread(clip(A) * mask)`. Blocks are chosen by `A`
    as it is before clipping, which orders them the same way but leaves no ties at the ends of the range.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.sequential_attention(total_steps)`.
      clip: `(low, high)` range of `A` in the forward pass (C.1); `"density"` for `(d, 1 / d)` with `d = 1 - sparsity`
        of the layer; None for no clipping.
      monotone: in a sparsification phase a dropped block stays dropped to its end.
      mask_every: steps between selections in a sparsification phase.
      logit_lr: learning rate of the logits as a multiple of the weights'.
      reset_logits_at: kinds of phases (such as `("dense",)`) on entering which the logits return to 0; by default
        they are kept throughout.
      min_blocks: kernels with fewer blocks stay dense.
      where: predicate on the path of a leaf; by default all but embeddings.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    if isinstance(clip, str) and clip != "density":
        raise ValueError(f'clip must be "density", a (low, high) pair or None, got {clip!r}')
    if not (clip is None or isinstance(clip, str)) and not (len(clip) == 2 and 0 <= clip[0] <= 1 <= clip[1]):
        raise ValueError(f"clip must be a range (low, high) around 1, the mean of the attention weights; got {clip}")
    if not logit_lr > 0:
        raise ValueError(f"logit_lr must be positive, got {logit_lr}")
    if unknown := set(reset_logits_at) - set(KINDS):
        raise ValueError(f"reset_logits_at takes kinds of phases ({', '.join(KINDS)}), got {sorted(unknown)}")

    def scale(weights: jax.Array, logits: Any, layer: Layer) -> jax.Array:
        attention = attention_weights(logits)
        if clip is None:
            return attention
        low, high = (1 - layer.sparsity, 1 / (1 - layer.sparsity)) if isinstance(clip, str) else clip
        return jnp.clip(attention, low, high)

    def score(weights: jax.Array, logits: Any, layer: Layer) -> jax.Array:
        # log A, less a constant of the layer where layers do not compete: small logits keep all their digits.
        return logits if scope != "global" else jnp.log(layer.blocks) + jax.nn.log_softmax(logits, (0, 1))

    return _compose(
        _Parametrisation(_IDENTITY.weights, scale, has_logits=True),
        score,
        phases,
        block=block,
        sparsity=sparsity,
        monotone=monotone,
        mask_every=mask_every,
        logit_lr=logit_lr,
        reset_logits_at=tuple(reset_logits_at),
        min_blocks=min_blocks,
        where=where,
        overrides=overrides,
        scope=scope,
    )


def attention_weights(logits: jax.Array) -> jax.Array:
    """`A = N * softmax(logits)` over all `N` blocks of a layer, of the shape of `logits`; mean 1 (Algorithm 1)."""
    return logits.size * jax.nn.softmax(logits, axis=(0, 1))
