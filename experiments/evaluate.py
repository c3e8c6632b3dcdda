"""Exact evaluation: every example counts once, on any batch size and number of devices."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp


def weighted_sums(outputs: dict[str, jax.Array], weight: jax.Array) -> dict[str, jax.Array]:
    """Sum of each output over a batch's real examples, and of their weights.

    Args:
      outputs: by name, `(batch,)`.
      weight: `(batch,)`: 1 for an example, 0 for padding.
    """
    # Not a product: padding may give NaN.
    sums = jax.tree.map(lambda x: jnp.sum(jnp.where(weight > 0, x.astype(jnp.float32), 0)), outputs)
    return sums | {"weight": jnp.sum(weight)}


def mean(outputs: dict[str, jax.Array], weight: jax.Array | None) -> dict[str, jax.Array]:
    """Mean of each output over a batch; with weights, over its real examples, 0 where there are none."""
    if weight is None:
        return jax.tree.map(jnp.mean, outputs)
    sums = weighted_sums(outputs, weight)
    count = jnp.maximum(sums.pop("weight"), 1)
    return {name: x / count for name, x in sums.items()}


def means(evaluate: Callable[[Any], dict[str, jax.Array]], batches: Iterable[Any]) -> dict[str, jax.Array]:
    """Mean of each output over all batches, left on the device.

    Args:
      evaluate: `evaluate(batch)`: what `weighted_sums` gives.
      batches: together, every example once.
    """
    totals: dict[str, jax.Array] = {}
    for batch in batches:
        totals = {name: totals[name] + x if totals else x for name, x in evaluate(batch).items()}
    weight = totals.pop("weight")
    return {name: x / weight for name, x in totals.items()}
