"""The click-through network of the paper's Criteo experiment: embeddings, three dense layers, one logit."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class ClickNet(nn.Module):
    """Every feature becomes an embedding; all of them side by side go through ReLU layers to a logit (section 4).

    Attributes:
      vocabulary: how many values each feature has; one number where ids are rows of the table already.
      size: of an embedding.
      widths: of the ReLU layers.
      dtype: that activations are computed in; parameters are float32.
      table_scale: standard deviation of the embeddings at the start.
    """

    vocabulary: Sequence[int]
    size: int = 10
    widths: Sequence[int] = (400, 400, 400)
    dtype: str = "float32"
    table_scale: float = 0.01

    @nn.compact
    def __call__(self, ids: jax.Array, training: bool = False) -> jax.Array:
        """Logits `(batch,)` float32 of ids `(batch, features)`, each in `[0, vocabulary[feature])`."""
        dtype = jnp.dtype(self.dtype)
        # One table for all features, so that there is one gather, and one scatter in the backward pass.
        init = nn.initializers.normal(self.table_scale)
        table = nn.Embed(sum(self.vocabulary), self.size, dtype=dtype, embedding_init=init, name="table")
        x = table(self.rows(ids)).reshape(ids.shape[0], -1)
        for i, width in enumerate(self.widths, 1):
            x = nn.relu(nn.Dense(width, dtype=dtype, name=f"hidden{i}")(x))
        return nn.Dense(1, dtype=dtype, name="logit")(x)[:, 0].astype(jnp.float32)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Which rows of the one table these ids look up: the values of a feature come after those of all before it."""
        return ids + np.cumsum([0, *self.vocabulary[:-1]]).astype(np.int32)
