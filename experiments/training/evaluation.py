"""Exact evaluation: every example counts once, on any batch size and number of devices."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import roc_auc_score


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
    """Mean of each output over a batch; with weights, over its real examples, 0 if there are none."""
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
    ranked: list[Ranked] = []  # 9 bytes an example: 75 MB for the eight million that Criteo validates on
    before: Ranked | None = None
    for batch in batches:
        sums, latest = evaluate(batch)
        totals = {name: totals[name] + x if totals else x for name, x in sums.items()}
        if before is not None:  # fetched while the device is busy with the batch just sent
            ranked.append(jax.tree.map(np.atleast_2d, before))
        before = latest
    if before is not None:
        ranked.append(jax.tree.map(np.atleast_2d, before))
    weight = totals.pop("weight")
    result: dict[str, Any] = {name: x / weight for name, x in totals.items()}
    return result | ({"auc": _aucs(ranked)} if ranked else {})


def _aucs(ranked: list[Ranked]) -> np.ndarray:
    """The area under the ROC curve for each seed."""
    real = np.concatenate([batch.weight[0] > 0 for batch in ranked])
    scores, labels = (np.concatenate([batch[field] for batch in ranked], axis=1)[:, real] for field in (0, 1))
    return np.array([auc(s, y) for s, y in zip(scores, labels, strict=True)])


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a positive example scores higher than a negative one, ties counting half.

    Args:
      scores: `(examples,)`.
      labels: `(examples,)` of 0 and 1.

    Returns:
      The area under the ROC curve; NaN where all labels are the same, or a score is not finite, as when a run has
      diverged: scikit-learn would raise.
    """
    if not np.isfinite(scores).all() or len(np.unique(labels)) < 2:
        return float("nan")
    return float(roc_auc_score(labels, scores))
