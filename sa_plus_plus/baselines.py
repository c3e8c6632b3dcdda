"""Algorithms of other papers, brought to blocks: what a comparison asks for, as controls."""

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from sa_plus_plus import blocks as blk
from sa_plus_plus import phases as schedules
from sa_plus_plus.composition import IDENTITY, PruningOptions, compose
from sa_plus_plus.phases import Phases
from sa_plus_plus.planning import LeafPlan
from sa_plus_plus.registry import algorithm
from sa_plus_plus.rewiring import Rewiring
from sa_plus_plus.sparsifier import Sparsifier


def _drawn(weights: jax.Array, logits: Any, layer: LeafPlan, key: Any) -> jax.Array:
    return jax.random.uniform(key, layer.full_grid, jnp.float32)


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
    of the blocks in use, `end = until * total_steps`, change places: those of least Frobenius norm go, and those of the
    largest norm of the loss's gradient come, at zero. As many blocks are in use throughout. `update` needs the
    gradients, as does an update in the paper: `sp.update(trainable, prune, updates, grads)`; `sparsify` hands them over
    itself. Where blocks are about to change places, the optimizer too is given the gradients of masked blocks, so that
    a block that comes in brings a momentum of one step; the paper does not say.

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

    def growth(gradient: Any, layer: LeafPlan, key: Any) -> jax.Array:
        return blk.frobenius(gradient, layer.block, layer.view)

    rewires = Rewiring(growth, True, mask_every, fraction, until)
    return _dynamic(rewires, phases, block=block, sparsity=sparsity, seed=seed, **options)


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

    As `rigl`, but blocks come in at random. As in the comparisons of RigL's paper, blocks of least norm go, fewer and
    fewer of them; SET's own drops the same share each time, of the weights nearest to zero on either side. New blocks
    start at zero, where SET's own weights are drawn.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      phases: usually `phases.sparse_evolutionary(total_steps)`.
      mask_every: steps between changes.
      fraction: share of the blocks in use that change places at first, in (0, 1].
      until: share of the run after which the blocks stay as they are, in (0, 1].
      seed: of the mask to start from and of what comes in, unless `init` is given a key; may be traced.
      **options: see `PruningOptions`.

    Raises:
      ValueError: for options out of range, or a schedule that ends dense.
    """

    def growth(gradient: Any, layer: LeafPlan, key: Any) -> jax.Array:
        return _drawn(gradient, None, layer, key)

    rewires = Rewiring(growth, False, mask_every, fraction, until)
    return _dynamic(rewires, phases, block=block, sparsity=sparsity, seed=seed, **options)


def _dynamic(rewires: Rewiring, phases: Phases, **options: Any) -> Sparsifier:
    return compose(IDENTITY, _drawn, phases, rewires=rewires, forget_masked=True, **options)
