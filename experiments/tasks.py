"""What is trained: a model on a data set, with its loss and metric. The training loop knows nothing else of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from experiments import data, models, naming


class Task(NamedTuple):
    """A problem for the training loop.

    Attributes:
      metric: name of the headline metric among the outputs; higher is better.
      dataset: training and test arrays.
      init: `init(key) -> params`.
      outputs: `outputs(params, batch) -> {name: (batch,)}`: values per example, `loss` among them. The loop minimises
        the mean of `loss`, and reports the mean of each.
    """

    metric: str
    dataset: data.Dataset
    init: Callable[[jax.Array], Any]
    outputs: Callable[[Any, Any], dict[str, jax.Array]]


def classification(config: ml_collections.ConfigDict) -> Task:
    """Image classification by cross-entropy, measured by accuracy."""
    dataset = naming.lookup(data, config.data.name, "config.data.name", config.data.options)
    model = naming.lookup(models, config.model, "config.model", {"classes": dataset.classes})

    def outputs(params: Any, batch: Any) -> dict[str, jax.Array]:
        logits = model.apply({"params": params}, batch["image"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return {"loss": loss, "accuracy": (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)}

    def init(key: jax.Array) -> Any:
        return model.init(key, dataset.train["image"][:1])["params"]

    return Task("accuracy", dataset, init, outputs)
