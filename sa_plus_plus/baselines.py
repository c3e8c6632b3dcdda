"""Algorithms of other papers, adapted to blocks, as controls for comparisons."""

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from sa_plus_plus import blocks as blk
from sa_plus_plus import dynamic_sparsity, select
from sa_plus_plus import phases as schedules
from sa_plus_plus.algorithms import block_norm, random_score
from sa_plus_plus.compose import IDENTITY, Parametrisation, PruningOptions, check_phases, check_start, compose
from sa_plus_plus.dynamic_sparsity import Regrowth
from sa_plus_plus.masking import scale_blocks
from sa_plus_plus.phases import Phases
from sa_plus_plus.planning import LeafPlan
from sa_plus_plus.registry import algorithm
from sa_plus_plus.sparsifier import Sparsifier


@algorithm(schedules.rigl, control=True)
def rigl(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    phases: Phases,
    mask_every: int = 100,
    fraction: float = 0.3,
    until: float = 0.75,
    seed: int | jax.Array = 0,
    **options: Unpack[PruningOptions],
) -> Sparsifier:
    """RigL with blocks (Evci et al., Rigging the Lottery, ICML 2020, arXiv 1911.11134): sparse from the first step.

    It starts from a random mask. Every `mask_every` steps, in sparse phases, `fraction / 2 * (1 + cos(pi * t / end))`
    of the active blocks, with `end = until * total_steps`, are replaced: those with the smallest Frobenius norm are
    dropped, and those with the largest gradient norm are grown, starting at zero. The number of active blocks stays
    constant. `update` needs the gradients, as in the paper: `sp.update(trainable, prune, updates, grads)`; `sparsify`
    passes them automatically. In a step that replaces blocks, the optimizer also sees the gradients of masked blocks,
    so that a new block starts with one step of momentum; the paper does not specify this.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.rigl(total_steps)`.
      mask_every: steps between changes.
      fraction: share of the blocks in use that change places at first, in (0, 1].
      until: share of the run after which the blocks stay as they are, in (0, 1].
      seed: which mask to start from, unless `init` is given a key; may be traced.
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense; by `update`, without gradients.
    """

    regrow = dynamic_sparsity.by_gradient(mask_every, fraction, until)
    return _dynamic(regrow, phases, block=block, sparsity=sparsity, seed=seed, **options)


@algorithm(schedules.sparse_evolutionary, control=True)
def sparse_evolutionary(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    phases: Phases,
    mask_every: int = 100,
    fraction: float = 0.3,
    until: float = 0.75,
    seed: int | jax.Array = 0,
    **options: Unpack[PruningOptions],
) -> Sparsifier:
    """SET, sparse evolutionary training, with blocks (Mocanu et al., Nature Communications 2018, arXiv 1707.04780).

    Like `rigl`, but new blocks are chosen at random. As in the RigL paper's comparisons, blocks of smallest norm are
    dropped, fewer each time; the original SET drops the same share each time, of the positive and negative weights
    nearest to zero. New blocks start at zero, where the original SET draws random weights.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.sparse_evolutionary(total_steps)`.
      mask_every: steps between changes.
      fraction: share of the blocks in use that change places at first, in (0, 1].
      until: share of the run after which the blocks stay as they are, in (0, 1].
      seed: for the initial mask and the new blocks, unless `init` is given a key; may be traced.
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """

    def growth(gradient: Any, layer: LeafPlan, key: Any) -> jax.Array:
        return random_score(gradient, None, layer, key)

    regrow = Regrowth(growth, False, mask_every, fraction, until)
    return _dynamic(regrow, phases, block=block, sparsity=sparsity, seed=seed, **options)


def _dynamic(regrow: Regrowth, phases: Phases, **options: Any) -> Sparsifier:
    return compose(IDENTITY, random_score, phases, regrow=regrow, forget_masked=True, **options)


@algorithm(schedules.movement, control=True)
def movement(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    phases: Phases,
    mask_every: int = 1,
    **options: Unpack[PruningOptions],
) -> Sparsifier:
    """Block movement pruning (Lagunas et al., EMNLP 2021, arXiv 2109.04838), after Sanh et al. (NeurIPS 2020, arXiv
    2005.07683).

    Each block has a trainable score, 0 at the start, with the straight-through gradient of the mask:
    `dL/dS_B = sum over the block of dL/dW' * W`, with `W' = W * spread(mask)` the effective kernel. Under SGD of rate
    `r` the score is `-r` times the sum of these over the steps: high where weights moved away from zero. Masked blocks
    keep their weights, their scores keep training, and they may return until the last phase. The highest-scoring blocks
    are kept, as in the version of Sanh et al. for a given sparsity (`top_v`), along this library's sparsity curve.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.movement(total_steps)`.
      mask_every: steps between selections in the sparsification phase.
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, or a schedule that begins sparse or ends dense.
    """
    check_start(phases, "scores")
    parametrisation = Parametrisation(*IDENTITY[:2], has_logits=True, straight_through=True)
    when: dict[str, Any] = {"mask_every": mask_every, "monotone": False}
    return compose(parametrisation, _logits, phases, block=block, sparsity=sparsity, **when, **options)


def _logits(weights: jax.Array, logits: Any, layer: LeafPlan, key: Any) -> jax.Array:
    return logits


@algorithm(schedules.group_lasso, control=True)
def group_lasso(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    phases: Phases,
    strength: float = 5.0,
    **options: Unpack[PruningOptions],
) -> Sparsifier:
    """Group LASSO by proximal steps (Yuan and Lin, JRSS B 2006; Parikh and Boyd, Proximal Algorithms, 2014, 6.5.4).

    Each update outside sparse phases is followed by the proximal map of `tau * sum of ||W_B||_F`,

        W_B <- max(0, 1 - tau / ||W_B||_F) * W_B.

    The penalty that leaves a given number of blocks is not known beforehand, so it follows from the target: in each
    step and layer `tau` is `strength / total_steps` times the `kept`-th largest norm, that of the last block to stay,
    which thus never becomes zero. When the sparse phase begins, the blocks of largest norm are kept.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.group_lasso(total_steps)`.
      strength: of the penalty, positive and less than the number of steps: a block without gradient is zero after
        `1 / strength` of the run, if its norm is that of the last block to stay. The default did as well as 20 and
        better than 1 on held-out training images of Fashion-MNIST (LeNet-300-100, 97% of the 8 x 8 blocks).
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    _check_strength(strength, phases)

    def proximal_step(layer: LeafPlan, weights: jax.Array, logits: Any) -> tuple[jax.Array, Any]:
        norms = blk.frobenius(weights, layer.block, layer.view)
        threshold = strength / phases.total_steps * _last_kept(norms, layer.kept_each)
        return scale_blocks(weights, blk.soft_threshold(norms, threshold), layer), logits

    return compose(IDENTITY, block_norm, phases, block=block, sparsity=sparsity, proximal_step=proximal_step, **options)


def _last_kept(norms: jax.Array, kept: int) -> jax.Array:
    """The `kept`-th largest norm of each matrix, `(*stack, 1, 1)`."""
    chosen = select.top_k_per_layer({"": norms}, {"": kept})[""]
    return jnp.min(jnp.where(chosen, norms, jnp.inf), axis=(-2, -1), keepdims=True)


def _check_strength(strength: float, phases: Any) -> None:
    check_phases(phases)
    if not 0 < strength < phases.total_steps:
        raise ValueError(f"strength must be between 0 and {phases.total_steps}, the number of steps; got {strength}")


@algorithm(schedules.d_gating, control=True)
def d_gating(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    phases: Phases,
    depth: int = 3,
    strength: float = 4.0,
    **options: Unpack[PruningOptions],
) -> Sparsifier:
    """D-Gating (Kolb, Frost, Bischl and Ruegamer, NeurIPS 2025, arXiv 2509.23898): sparsity by weight decay on factors.

    Each block is the product of trained weights and `D - 1` scalar gates, `W_B * g_1 * ... * g_(D-1)`. A squared norm
    on all factors, `lambda / D * (||W_B||^2 + sum of g_d^2)`, has the minima of the penalty `||W_B||^(2/D)` on the
    products, which is the group LASSO for `D = 2` and non-convex for larger `D`.

    All gates of a block start at 1, so they stay equal: a single logit `l` represents them, `g = 1 + l`, with the
    gradient of one gate. The penalty is decoupled from the optimizer: after each update outside sparse
    phases weights and gates are multiplied by `1 - strength / total_steps`. When the sparse phase begins, the effective
    blocks of largest norm are kept.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.d_gating(total_steps)`.
      depth: the number `D` of factors, an integer of at least 2.
      strength: of the penalty, positive and less than the number of steps: a factor without gradient shrinks to
        `exp(-strength)` of its value over a whole run. The default did best of 1, 4 and 8, on the same data as that of
        `group_lasso`.
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """
    _check_strength(strength, phases)
    if depth < 2 or depth != int(depth):
        raise ValueError(f"depth must be a number of factors, an integer from 2; got {depth}")
    left = 1 - strength / phases.total_steps

    def scale(weights: jax.Array, logits: jax.Array, layer: LeafPlan) -> jax.Array:
        gate = 1 + logits
        fixed = jax.lax.stop_gradient(gate)
        return (fixed + (gate - fixed) / (depth - 1)) ** (depth - 1)  # the gradient of one gate, not of their sum

    def weights(kernel: jax.Array, logits: Any, layer: LeafPlan) -> jax.Array:
        if logits is None:
            return kernel
        factors = scale(kernel, logits, layer)
        return scale_blocks(kernel, 1 / jnp.where(factors != 0, factors, 1), layer)

    def score(weights: jax.Array, logits: jax.Array, layer: LeafPlan, key: Any) -> jax.Array:
        return jnp.abs(scale(weights, logits, layer)) * blk.frobenius(weights, layer.block, layer.view)

    def decay(layer: LeafPlan, weights: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (left * blk.at_least_float32(weights)).astype(weights.dtype), left * (1 + logits) - 1

    parametrisation = Parametrisation(weights, scale, has_logits=True)
    return compose(parametrisation, score, phases, block=block, sparsity=sparsity, proximal_step=decay, **options)
