"""The pruning algorithms: each is a parametrisation x a score x a schedule of phases (paper, section 4.1)."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sa_plus_plus import blocks as blk
from sa_plus_plus import planning
from sa_plus_plus.phases import DENSE, KINDS, Phases
from sa_plus_plus.planning import MIN_BLOCKS, LeafPlan, Overrides, Plan, named_as_kernel
from sa_plus_plus.sparsifier import (
    IDENTITY,
    Parametrisation,
    Params,
    PruneState,
    Sparsifier,
    State,
    Trainable,
    check_phases,
    compose,
    times,
)


def _norm_score(weights: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array:
    return blk.frobenius(weights, layer.block)


def dense(*, phases: Phases) -> Sparsifier:
    """No pruning: the dense baseline, for running through the same loop.

    Args:
      phases: gives the length of the run; must be one dense phase.

    Raises:
      ValueError: if a phase is not dense.
    """
    check_phases(phases)
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
    where: Callable[[str], bool] = named_as_kernel,
    overrides: Overrides | None = None,
    scope: str = "layer",
) -> Sparsifier:
    """One-shot magnitude pruning: the blocks of largest Frobenius norm when the dense phase ends, then fine-tuning.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.magnitude(total_steps)`.
      min_blocks: kernels with fewer blocks stay dense.
      where: predicate on the path of a leaf; by default all but embeddings, biases and scales.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    return compose(
        IDENTITY,
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
    where: Callable[[str], bool] = named_as_kernel,
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
      where: predicate on the path of a leaf; by default all but embeddings, biases and scales.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.
    """
    return compose(
        IDENTITY,
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
    where: Callable[[str], bool] = named_as_kernel,
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
      where: predicate on the path of a leaf; by default all but embeddings, biases and scales.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.
    """

    def score(weights: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array:
        # A layer's own stream, named by its path, so that it does not depend on which others are pruned.
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(layer.path.encode()))
        return jax.random.uniform(key, layer.grid, jnp.float32)

    return compose(
        IDENTITY,
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
    where: Callable[[str], bool] = named_as_kernel,
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
      where: predicate on the path of a leaf; by default all but embeddings, biases and scales.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.

    Raises:
      ValueError: for an unknown form, options out of range, or a schedule that ends dense.
    """
    if form not in ("pruning", "masking"):
        raise ValueError(f'form must be "pruning" or "masking", got {form!r}')
    return compose(
        IDENTITY,
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
    where: Callable[[str], bool] = named_as_kernel,
    overrides: Overrides | None = None,
    scope: str = "layer",
) -> Sparsifier:
    """Block PowerPropagation: the effective block is `W * ||W||_F^(alpha - 1)`, so that large blocks grow faster.

    The trained weights start at `W = U / ||U||^((alpha - 1) / alpha)`, so that the effective kernel starts as the
    model's own initialisation `U`. For `alpha > 1` a block of zeros has gradient 0 and stays zero.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.powerpropagation(total_steps)`.
      alpha: at least 1; 2 is the paper's (Lemma 2.3), 1 is `magnitude`.
      min_blocks: kernels with fewer blocks stay dense.
      where: predicate on the path of a leaf; by default all but embeddings, biases and scales.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    if not alpha >= 1:
        raise ValueError(f"alpha must be at least 1, got {alpha}")

    def norm_to(weights: jax.Array, power: float, layer: LeafPlan) -> jax.Array:
        """`||W||_F^power` of each block; 0, with gradient 0, for a block of zeros."""
        squares = blk.sum_of_squares(weights, layer.block)
        zero = squares == 0
        return jnp.where(zero, 0, jnp.where(zero, 1, squares) ** (power / 2))

    def weights(kernel: jax.Array, layer: LeafPlan) -> jax.Array:
        return times(kernel, norm_to(kernel, (1 - alpha) / alpha, layer), layer)

    def scale(weights: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array | None:
        return None if alpha == 1 else norm_to(weights, alpha - 1, layer)

    def score(weights: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array:
        return norm_to(weights, alpha, layer)  # the norm of the effective block

    return compose(
        Parametrisation(weights, scale),
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
    where: Callable[[str], bool] = named_as_kernel,
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
      monotone: in a sparsification phase a dropped block stays dropped to its end. Otherwise it may return, with
        whatever momentum the optimizer's buffers still hold for it.
      mask_every: steps between selections in a sparsification phase.
      logit_lr: learning rate of the logits as a multiple of the weights'.
      reset_logits_at: kinds of phases (such as `("dense",)`) on entering which the logits return to 0; by default
        they are kept throughout.
      min_blocks: kernels with fewer blocks stay dense.
      where: predicate on the path of a leaf; by default all but embeddings, biases and scales.
      overrides: other `block` or `sparsity` by path or pattern; see `plan`.
      scope: `layer` to keep the planned number of blocks in each layer, `global` to keep their sum over all layers.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    if isinstance(clip, str) and clip != "density":
        raise ValueError(f'clip must be "density", a (low, high) pair or None, got {clip!r}')
    if not (clip is None or isinstance(clip, str)) and not (np.shape(clip) == (2,) and 0 <= clip[0] <= 1 <= clip[1]):
        raise ValueError(f"clip must be a range (low, high) around 1, the mean of the attention weights; got {clip}")
    if not logit_lr > 0:
        raise ValueError(f"logit_lr must be positive, got {logit_lr}")
    if isinstance(reset_logits_at, str) or set(reset_logits_at) - set(KINDS):
        raise ValueError(f"reset_logits_at takes a list of {', '.join(KINDS)}; got {reset_logits_at!r}")

    def scale(weights: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array:
        attention = attention_weights(logits)
        if clip is None:
            return attention
        low, high = (1 - layer.sparsity, 1 / (1 - layer.sparsity)) if isinstance(clip, str) else clip
        return jnp.clip(attention, low, high)

    def score(weights: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array:
        # log A, less a constant of the layer where layers do not compete: small logits keep all their digits.
        return logits if scope != "global" else jnp.log(layer.blocks) + jax.nn.log_softmax(logits, (0, 1))

    return compose(
        Parametrisation(IDENTITY.weights, scale, has_logits=True),
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
