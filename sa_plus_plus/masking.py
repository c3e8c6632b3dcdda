"""Kernels scaled by block, and kernels with masked blocks."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import LeafPlan, map_layers
from sa_plus_plus.sharding import automatic
from sa_plus_plus.sparsifier import Masks, Params


def expand_blocks(grid: jax.Array, layer: LeafPlan) -> jax.Array:
    """Each number of a layer's grid repeated over its block: an array of the layer's shape."""
    return blk.expand_blocks(grid, layer.shape, layer.block, layer.view)


def scale_blocks(weights: jax.Array, grid: jax.Array, layer: LeafPlan) -> jax.Array:
    """`weights * expand_blocks(grid)`, multiplied in at least float32 and returned in the weights' type."""
    wide = blk.at_least_float32(weights)
    return (wide * expand_blocks(grid.astype(wide.dtype), layer)).astype(weights.dtype)


def apply_mask(weights: jax.Array, mask: jax.Array, layer: LeafPlan, otherwise: jax.Array | int = 0) -> jax.Array:
    """The weights of blocks where the mask is true, `otherwise` in the others."""
    return jnp.where(expand_blocks(mask, layer), weights, otherwise)


@automatic(lambda layers, params, masks: params)
def zero_masked(layers: Mapping[str, LeafPlan], params: Params, masks: Masks) -> Params:
    """The same parameters with masked blocks exactly zero."""

    def zeroed(layer: LeafPlan | None, weights: jax.Array) -> jax.Array:
        return weights if layer is None else apply_mask(weights, masks[layer.path], layer)

    return map_layers(zeroed, params, layers)
