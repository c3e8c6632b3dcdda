"""A transformer encoder that classifies sequences; BERT-base by its default sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-6  # of layer normalisation


class Encoder(nn.Module):
    """Logits `(batch, classes)` of embedded tokens `(batch, sequence, width)`, from the first token.

    Layer normalisation follows each residual sum, as in BERT. Embeddings, whose tables are not pruned, are left out.

    Attributes:
      classes: number of classes.
      layers: how many.
      width: of a token, a multiple of `heads`.
      hidden: width of the feed-forward layers.
      heads: of the attention.
    """

    classes: int = 2
    layers: int = 12
    width: int = 768
    hidden: int = 3072
    heads: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = _Layer(self.heads, self.hidden, name=f"layer{i + 1}")(x)
        return nn.Dense(self.classes, name="head")(x[:, 0])


class _Layer(nn.Module):
    """Self-attention and two dense layers, each added to what it is given."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, sequence, width = x.shape
        # `nn.Dense` rather than flax's attention, so that each kernel is one matrix.
        q, k, v = (
            nn.Dense(width, name=name)(x).reshape(batch, sequence, self.heads, -1) for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(jnp.float32(width // self.heads))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = nn.LayerNorm(EPSILON, name="norm1")(x + nn.Dense(width, name="out")(mixed))
        y = nn.gelu(nn.Dense(self.hidden, name="up")(x), approximate=False)
        return nn.LayerNorm(EPSILON, name="norm2")(x + nn.Dense(width, name="down")(y))
