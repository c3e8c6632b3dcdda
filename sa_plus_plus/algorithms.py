"""The pruning algorithms: each combines a parametrisation, a score and a schedule of phases (paper, section 4.1).

To add an algorithm, decorate a constructor with `@algorithm(schedule)`: this adds it to `ALGORITHMS` and to every test
of `tests/core/contract_test.py`, and the experiments can select it by name.
"""

import math
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus import dynamic_sparsity, planning
from sa_plus_plus import phases as schedules
from sa_plus_plus.compose import (
    IDENTITY,
    Parametrisation,
    PruningOptions,
    check_phases,
    check_start,
    compose,
)
from sa_plus_plus.masking import scale_blocks
from sa_plus_plus.phases import DENSE, KINDS, SPARSE, SPARSIFICATION, Phases
from sa_plus_plus.planning import LeafPlan, Plan
from sa_plus_plus.registry import algorithm
from sa_plus_plus.sparsifier import Params, PruneState, Sparsifier, State, Trainable
from sa_plus_plus.trees import apply_updates, copy_arrays, merge_changes, unalias


def block_norm(weights: jax.Array, logits: Any, layer: LeafPlan, key: Any) -> jax.Array:
    """The score of `magnitude` and others: the Frobenius norm of each block.

    Args:
      weights: the kernel, of `layer.shape`.
      logits: not used.
      layer: gives the blocks and the view.
      key: not used.
    """
    return blk.frobenius(weights, layer.block, layer.view)


def random_score(weights: jax.Array, logits: Any, layer: LeafPlan, key: Any) -> jax.Array:
    """The score of `random` and others: uniformly random.

    Args:
      weights: not used.
      logits: not used.
      layer: gives the grid.
      key: a `jax.random.key`.
    """
    return jax.random.uniform(key, layer.full_grid, jnp.float32)


@algorithm(schedules.dense)
def dense(*, phases: Phases) -> Sparsifier:
    """No pruning: the dense baseline, in the same training loop.

    Args:
      phases: gives the length of the run; must be one dense phase.

    Raises:
      TypeError: if `phases` is not a schedule.
      ValueError: if a phase is not dense.
    """
    check_phases(phases)
    if odd := [str(p) for p in phases.phases if p.kind != DENSE]:
        raise ValueError(f"dense prunes nothing, but the schedule has {odd[0]}")

    def plan(params: Params) -> Plan:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        return Plan(tuple(planning.stays_dense(planning.path_string(path), leaf, "dense") for path, leaf in leaves))

    def init(params: Params, key: jax.Array | None = None) -> State:
        zero = jnp.zeros((), jnp.int32)
        return Trainable(copy_arrays(params), {}), PruneState(zero, jnp.zeros((), jnp.int32), {})

    def update(trainable: Trainable, prune: PruneState, updates: Trainable | None = None, grads: Any = None) -> State:
        updated = trainable if updates is None else apply_updates(trainable, updates)
        return unalias(updated, trainable), PruneState(prune.step + 1, phases.index(prune.step + 1), {})

    def sync_from_params(trainable: Trainable, prune: PruneState, params: Params) -> Trainable:
        return Trainable(unalias(jax.tree.map(merge_changes, params, trainable.params), params), {})

    def apply(trainable: Trainable, prune: PruneState) -> Params:
        return unalias(trainable.params, trainable)

    return Sparsifier(init, apply, update, apply, sync_from_params, plan, phases)


@algorithm(schedules.magnitude)
def magnitude(
    *, block: int | Sequence[int | None], sparsity: float, phases: Phases, **options: Unpack[PruningOptions]
) -> Sparsifier:
    """One-shot magnitude pruning: keep the blocks of largest Frobenius norm when the dense phase ends, then fine-tune.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.magnitude(total_steps)`.
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    return compose(IDENTITY, block_norm, phases, block=block, sparsity=sparsity, **options)


@algorithm(schedules.acdc)
def acdc(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    phases: Phases,
    form: str = "pruning",
    **options: Unpack[PruningOptions],
) -> Sparsifier:
    """Alternating compressed/decompressed training with blocks: stochastic iterative hard thresholding.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.acdc(total_steps)`.
      form: `pruning`: pruned weights restart from 0 in the next dense phase (the paper's choice for ImageNet);
        `masking`: they keep the values that they had when masked (its choice for Criteo).
      **options: see `PruningOptions`.

    Raises:
      ValueError: for an unknown form, options out of range, or a schedule that ends dense.
    """
    if form not in ("pruning", "masking"):
        raise ValueError(f'form must be "pruning" or "masking", got {form!r}')
    forget = form == "pruning"
    return compose(IDENTITY, block_norm, phases, block=block, sparsity=sparsity, forget_masked=forget, **options)


@algorithm(schedules.powerpropagation)
def powerpropagation(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    phases: Phases,
    alpha: float = 2.0,
    **options: Unpack[PruningOptions],
) -> Sparsifier:
    """Block PowerPropagation: the effective block is `W * ||W||_F^(alpha - 1)`, so that large blocks grow faster.

    The trained weights start at `W = U / ||U||^((alpha - 1) / alpha)`, so that the effective kernel starts at the
    model's initialisation `U`. For `alpha > 1` a block of zeros has gradient 0 and stays zero.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.powerpropagation(total_steps)`.
      alpha: at least 1; 2 is the paper's (Lemma 2.3), 1 is `magnitude`.
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    if not alpha >= 1:
        raise ValueError(f"alpha must be at least 1, got {alpha}")

    def norm_to(weights: jax.Array, power: float, layer: LeafPlan) -> jax.Array:
        """`||W||_F^power` of each block; 0, with gradient 0, for a block of zeros."""
        squares = blk.sum_of_squares(weights, layer.block, layer.view)
        zero = squares == 0
        return jnp.where(zero, 0, jnp.where(zero, 1, squares) ** (power / 2))

    def weights(kernel: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array:
        return scale_blocks(kernel, norm_to(kernel, (1 - alpha) / alpha, layer), layer)

    def scale(weights: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array | None:
        return None if alpha == 1 else norm_to(weights, alpha - 1, layer)

    def score(weights: jax.Array, logits: Any, layer: LeafPlan, key: Any) -> jax.Array:
        return norm_to(weights, alpha, layer)  # the norm of the effective block

    parametrisation = Parametrisation(weights, scale, by_norm=alpha > 1)
    return compose(parametrisation, score, phases, block=block, sparsity=sparsity, **options)


@algorithm(schedules.sequential_attention)
def sequential_attention(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    phases: Phases,
    score: str = "attention",
    clip: str | tuple[float, float] | None = "density",
    monotone: bool = True,
    mask_every: int = 1,
    logit_lr: float = 1.0,
    reset_logits_at: Sequence[str] = (),
    regrow: float = 0.0,
    regrow_every: int = 25,
    regrow_until: float = 0.75,
    **options: Unpack[PruningOptions],
) -> Sparsifier:
    """SequentialAttention++ (Algorithm 1): a trainable attention weight per block guides the search.

    Each pruned layer of `N` blocks has a logit per block, all 0 at the start, and attention weights
    `A = N * softmax(logits)` of mean 1. The effective kernel is `W * spread(clip(A) * mask)`. Blocks are ranked by `A`
    before clipping, which gives the same order but no ties at the ends of the range. Alternatively, which is not in the
    paper, they are ranked by the norm of the effective block, `clip(A) * ||W||_F`.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.sequential_attention(total_steps)`.
      score: ranks the blocks: `"attention"` for `A`, as in the paper, or `"effective"` for the norm of the
        effective block.
      clip: `(low, high)` range of `A` in the forward pass (C.1); `"density"` for `(d, 1 / d)` with `d = 1 - sparsity`
        of the layer; None for no clipping.
      monotone: a block dropped in a sparsification phase stays dropped until the phase ends. Otherwise it may return,
        with whatever momentum the optimizer still holds for it.
      mask_every: steps between selections in a sparsification phase.
      logit_lr: learning rate of the logits as a multiple of that of the weights.
      reset_logits_at: kinds of phases (such as `("dense",)`) at whose start the logits are reset to 0; by default they
        are never reset.
      regrow: share of the active blocks that change places in the sparse phase, in [0, 1]; 0 for none, as in the paper.
        As in `rigl`, those with the smallest norm of their weights are dropped, and those with the largest gradient
        norm of the effective kernel are grown; those that were masked start at zero and keep their logits. At step `t`
        it is `regrow / 2 * (1 + cos(pi * t / end))` of them, with `end = regrow_until * total_steps`. `update` then
        needs the gradients: `sp.update(trainable, prune, updates, grads)`; `sparsify` passes them automatically.
      regrow_every: steps between such changes.
      regrow_until: share of the run after which the blocks stay as they are, in (0, 1].
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, a schedule that ends dense, or one that begins sparse with blocks ranked
        by attention. With `regrow`, also if the schedule is no single rise of the sparsity with a sparse phase after
        it, if no exchange is due in that phase, if `monotone` is false, and by `update`, without gradients.
    """
    if score not in ("attention", "effective"):
        raise ValueError(f'score must be "attention" or "effective", got {score!r}')
    if isinstance(clip, str) and clip != "density":
        raise ValueError(f'clip must be "density", a (low, high) pair or None, got {clip!r}')
    if not (clip is None or isinstance(clip, str)) and not (np.shape(clip) == (2,) and 0 <= clip[0] <= 1 <= clip[1]):
        raise ValueError(f"clip must be a range (low, high) around 1, the mean of the attention weights; got {clip}")
    if not logit_lr > 0:
        raise ValueError(f"logit_lr must be positive, got {logit_lr}")
    if isinstance(reset_logits_at, str) or set(reset_logits_at) - set(KINDS):
        raise ValueError(f"reset_logits_at takes a list of {', '.join(KINDS)}; got {reset_logits_at!r}")
    if score == "attention":
        check_start(phases, "attention weights", ', or choose by score="effective"')

    regrowth = dynamic_sparsity.by_gradient(regrow_every, regrow or 1, regrow_until)
    dynamic_sparsity.check(regrowth, "regrow_every", "regrow", "regrow_until")
    if regrow:
        _check_exchanges(regrowth, phases, monotone)

    def scale(weights: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array:
        attention = attention_weights(logits)
        if clip is None:
            return attention
        low, high = (1 - layer.sparsity, 1 / (1 - layer.sparsity)) if isinstance(clip, str) else clip
        return jnp.clip(attention, low, high)

    def weights(kernel: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array:
        if logits is None:
            return kernel
        attention = scale(kernel, logits, layer)
        return scale_blocks(kernel, 1 / jnp.where(attention > 0, attention, 1), layer)

    def effective_norm(weights: jax.Array, logits: Any, layer: LeafPlan, key: Any) -> jax.Array:
        return scale(weights, logits, layer) * block_norm(weights, logits, layer, key)

    def log_attention(weights: jax.Array, logits: Any, layer: LeafPlan, key: Any) -> jax.Array:
        # log A, minus a constant per layer unless layers compete: small logits keep all their digits.
        if options.get("scope") != "global":
            return logits
        return jnp.log(math.prod(layer.grid)) + jax.nn.log_softmax(logits, (-2, -1))

    return compose(
        Parametrisation(weights, scale, has_logits=True, attention=True),
        log_attention if score == "attention" else effective_norm,
        phases,
        block=block,
        sparsity=sparsity,
        monotone=monotone,
        mask_every=mask_every,
        logit_lr=logit_lr,
        reset_logits_at=reset_logits_at,
        regrow=regrowth if regrow else None,
        forget_masked=bool(regrow),
        **options,
    )


def _check_exchanges(regrowth: dynamic_sparsity.Regrowth, phases: Phases, monotone: bool) -> None:
    """Refuse a schedule in which blocks that are masked, and so lose their weights, are to come back with them."""
    check_phases(phases)
    kinds = [phase.kind for phase in phases.phases if phase.kind != DENSE or phase.start > 0]
    if kinds != [SPARSIFICATION, SPARSE]:
        raise ValueError(
            "regrow needs one rise of the sparsity and a sparse phase after it, because masked blocks lose their "
            f"weights; take phases.finetune({phases.total_steps}), for example, instead of\n{phases}"
        )
    if not monotone:
        raise ValueError("regrow needs monotone=True, because masked blocks lose their weights")
    steps = np.arange(phases.phases[-1].start, phases.total_steps)
    if not np.asarray(regrowth.due(phases, steps)).any():
        raise ValueError(
            f"regrow: no step of the phase {phases.phases[-1]} is a multiple of regrow_every={regrowth.every} before "
            f"regrow_until={regrowth.until} of {phases.total_steps} steps"
        )


def attention_weights(logits: jax.Array) -> jax.Array:
    """`A = N * softmax(logits)` over the `N` blocks of a layer; mean 1 (Algorithm 1).

    Args:
      logits: `(*stack, grid_r, grid_c)`; each stacked layer has its own softmax.
    """
    return math.prod(logits.shape[-2:]) * jax.nn.softmax(logits, axis=(-2, -1))


@algorithm(schedules.gradual_magnitude, control=True)
def gradual_magnitude(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    phases: Phases,
    mask_every: int = 1,
    monotone: bool = True,
    **options: Unpack[PruningOptions],
) -> Sparsifier:
    """Gradual magnitude pruning, a control: `magnitude` with the sparsity rising over a long sparsification phase.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.gradual_magnitude(total_steps)`.
      mask_every: steps between selections in the sparsification phase.
      monotone: a block once dropped stays dropped.
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    when: dict[str, Any] = {"mask_every": mask_every, "monotone": monotone}
    return compose(IDENTITY, block_norm, phases, block=block, sparsity=sparsity, **when, **options)


@algorithm(schedules.random, control=True)
def random(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    phases: Phases,
    seed: int | jax.Array = 0,
    **options: Unpack[PruningOptions],
) -> Sparsifier:
    """A fixed random mask, a control: every useful algorithm must beat it.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.random(total_steps)`.
      seed: which mask, unless `init` is given a key; may be traced, to `vmap` over masks.
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """

    return compose(IDENTITY, random_score, phases, block=block, sparsity=sparsity, seed=seed, **options)
