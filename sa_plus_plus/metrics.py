"""Metrics of masks and attention weights: pure functions, cheap enough for every step."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sa_plus_plus import blocks as blk
from sa_plus_plus.algorithms import attention_weights
from sa_plus_plus.planning import Plan
from sa_plus_plus.sparsifier import Masks, Trainable


def _zero_weights(masks: Masks, plan: Plan) -> dict[str, jax.Array]:
    layers = plan.pruned.items()
    sizes = {path: blk.block_sizes(la.shape, la.block, la.view).astype("float32") for path, la in layers}
    return {path: jnp.sum(jnp.where(masks[path], 0, sizes[path])) for path in sizes}


def layer_sparsity(masks: Masks, plan: Plan) -> dict[str, jax.Array]:
    """Share of masked weights in each pruned layer; an edge block counts only its real weights.

    Args:
      masks: `prune.masks`.
      plan: `sp.plan(params)`.
    """
    return {path: zero / float(plan.pruned[path].weights) for path, zero in _zero_weights(masks, plan).items()}


def kernel_sparsity(masks: Masks, plan: Plan) -> jax.Array:
    """Share of masked weights among those of all the network's kernels, pruned or not; float32 scalar.

    Args:
      masks: `prune.masks`.
      plan: `sp.plan(params)`.
    """
    zero = sum(_zero_weights(masks, plan).values(), jnp.zeros((), jnp.float32))
    return zero / float(max(plan.kernel_weights, 1))


def churn(before: Masks, after: Masks) -> dict[str, jax.Array]:
    """How far a selection differs from an earlier one, per layer: `1 - |both| / |either|` over the kept blocks.

    0 for the same blocks, 1 for none in common (Jaccard distance).

    Args:
      before: masks of one selection.
      after: masks of another, of the same layers.
    """

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a ^ b) / jnp.maximum(jnp.sum(a | b), 1)

    return {path: distance(before[path], mask) for path, mask in after.items()}


def attention(trainable: Trainable) -> dict[str, dict[str, jax.Array]]:
    """Entropy and range of the attention weights `A = N softmax(L)` of each layer that has them.

    Args:
      trainable: its logits are `(*stack, grid_r, grid_c)` by path.

    Returns:
      By path: `entropy` of `A / N` over its maximum `log N`, so in [0, 1]: 1 if all blocks weigh the same, near 0
      if one block has all the weight, averaged over stacked layers; `min` and `max` of `A`, before clipping.
    """
    result: dict[str, dict[str, Any]] = {}
    for path, logits in trainable.logits.items():
        weights = attention_weights(logits)
        share, log_share = jax.nn.softmax(logits, (-2, -1)), jax.nn.log_softmax(logits, (-2, -1))
        entropy = -jnp.mean(jnp.sum(share * log_share, (-2, -1)))
        result[path] = {
            "entropy": entropy / jnp.log(max(math.prod(logits.shape[-2:]), 2)),
            "min": jnp.min(weights),
            "max": jnp.max(weights),
        }
    return result
