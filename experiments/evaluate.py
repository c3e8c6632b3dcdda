"""Exact evaluation: every example counts once, on any batch size and number of devices."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ranking


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


class Ranked(NamedTuple):
    """A batch's scores, labels and weights, each `(batch,)`, or with a leading axis of seeds."""

    scores: jax.Array
    labels: jax.Array
    weight: jax.Array


def means(
    evaluate: Callable[[Any], tuple[dict[str, jax.Array], Ranked | None]], batches: Iterable[Any]
) -> dict[str, Any]:
    """Mean of each output over all batches, left on the device; and `auc`, which is not, where there is a ranking.

    Args:
      evaluate: `evaluate(batch)`: what `weighted_sums` gives, and what is to be ranked.
      batches: together, every example once.
    """
    totals: dict[str, jax.Array] = {}
    rankings: list[ranking.Auc] = []
    before: Ranked | None = None
    for batch in batches:
        sums, ranked = evaluate(batch)
        totals = {name: totals[name] + x if totals else x for name, x in sums.items()}
        _rank(rankings, before)  # while the device is busy with the batch just sent
        before = ranked
    _rank(rankings, before)
    weight = totals.pop("weight")
    result: dict[str, Any] = {name: x / weight for name, x in totals.items()}
    return result | ({"auc": np.array([r.value() for r in rankings])} if rankings else {})


def _rank(rankings: list[ranking.Auc], ranked: Ranked | None) -> None:
    """Add a batch to the rankings, one a seed."""
    if ranked is None:
        return
    scores, labels, weight = (np.atleast_2d(x) for x in ranked)
    rankings += [ranking.Auc() for _ in range(len(scores) - len(rankings))]
    for each, s, y, w in zip(rankings, scores, labels, np.broadcast_to(weight, scores.shape), strict=True):
        each.update(s[w > 0], y[w > 0])
