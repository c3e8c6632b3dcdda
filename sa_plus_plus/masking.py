"""Kernels scaled by block, kernels with masked blocks, and detection of changed parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import LeafPlan, map_layers
from sa_plus_plus.sharding import automatic
from sa_plus_plus.sparsifier import Masks, Params


def spread(grid: jax.Array, layer: LeafPlan) -> jax.Array:
    """Each number of a layer's grid repeated over its block: an array of the layer's shape."""
    return blk.spread(grid, layer.shape, layer.block, layer.view)


def times(weights: jax.Array, grid: jax.Array, layer: LeafPlan) -> jax.Array:
    """`weights * spread(grid)`, multiplied in at least float32 and returned in the weights' type."""
    wide = blk.widened(weights)
    return (wide * spread(grid.astype(wide.dtype), layer)).astype(weights.dtype)


def keep(weights: jax.Array, mask: jax.Array, layer: LeafPlan, otherwise: jax.Array | int = 0) -> jax.Array:
    """The weights of blocks where the mask is true, `otherwise` in the others."""
    return jnp.where(spread(mask, layer), weights, otherwise)


def zero_masked(params: Params, masks: Masks, layers: Mapping[str, LeafPlan]) -> Params:
    """The same parameters with masked blocks exactly zero."""

    def zeroed(params: Params, masks: Masks) -> Params:
        def exact(layer: LeafPlan | None, weights: jax.Array) -> jax.Array:
            return weights if layer is None else keep(weights, masks[layer.path], layer)

        return map_layers(exact, params, layers)

    return automatic(zeroed, lambda: params, params, masks)


def differs(given: jax.Array, handed: jax.Array) -> jax.Array:
    """Where `given` is not `handed` up to the rounding of `start + (handed - start)`, NaN included.

    The rounding is relative to the larger of the two numbers added, estimated by the largest of the array. `handed` is
    rounded to the type of `given` first: a loop may hold parameters of a narrower type than the trained weights.
    """
    given = jnp.asarray(given)
    a, b = blk.widened(given), blk.widened(handed.astype(given.dtype))
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return a != b
    tolerance = 4 * float(jnp.finfo(a.dtype).eps) * jnp.maximum(jnp.abs(a), jnp.max(jnp.abs(b), initial=0))
    if given.dtype.itemsize < handed.dtype.itemsize:  # rounded twice, so maybe off by one unit in the last place
        tolerance += float(jnp.finfo(given.dtype).eps) * jnp.abs(a)
    return ~(jnp.abs(a - b) <= tolerance)


def adopted(given: Any, weights: jax.Array) -> jax.Array:
    """An unpruned leaf as the loop has it, but `weights` where it differs only by rounding."""
    given = jnp.asarray(given)
    if not jnp.issubdtype(given.dtype, jnp.inexact):
        return given
    return jnp.where(differs(given, weights), given.astype(weights.dtype), weights)
