"""Transformer encoders as in BERT, with normalisation after each sum; the default sizes are those of BERT-base."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sa_plus_plus.contrib.transformers.layers import Transformer, embedding, layers_of, stack, with_positions

EPSILON = 1e-6  # epsilon of the layer normalisation of `Encoder`


class Encoder(nn.Module):
    """Logits `(batch, classes)` of embedded tokens `(batch, sequence, width)`, from the first token.

    Embeddings, whose tables are not pruned, are left out.

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
        x = stack(x, self.layers, heads=self.heads, hidden=self.hidden, post_norm=True, epsilon=EPSILON)
        return nn.Dense(self.classes, name="head")(x[:, 0])


class Bert(Transformer):
    """BERT: tokens, positions and token types embedded and normalised, layers, and a classifier of the first token.

    Attributes, besides those of `Transformer`:
      classes: number of classes; 0 for the tokens' representations.
      vocabulary: number of different tokens.
      types: number of token types.
      context: the longest sequence.
    """

    classes: int = 2
    vocabulary: int = 30522
    types: int = 2
    context: int = 512

    @nn.compact
    def __call__(
        self, tokens: jax.Array, types: jax.Array | None = None, real: jax.Array | None = None, training: bool = False
    ) -> jax.Array:
        """Logits `(batch, classes)`, or representations `(batch, sequence, width)` if `classes` is 0; float32.

        Args:
          tokens: `(batch, sequence)`, each in `[0, vocabulary)`.
          types: of the tokens, as `tokens`, each in `[0, types)`; None for all 0.
          real: as `tokens`, bool: false for padding, which no token attends to; None where there is none.
          training: whether dropout applies.

        Raises:
          ValueError: if the sequence is longer than `context`.
        """
        dtype = jnp.dtype(self.dtype)
        types = jnp.zeros_like(tokens) if types is None else types
        x = embedding(self.vocabulary, self.width, dtype, "token_embedding")(tokens.astype(jnp.int32))
        x = with_positions(x, self.context)
        x += embedding(self.types, self.width, dtype, "type_embedding")(types.astype(jnp.int32))
        x = nn.LayerNorm(self.epsilon, dtype, name="norm")(x)
        mask = None if real is None else real[:, None, None].astype(bool)
        x = layers_of(self, x, mask, training, post_norm=True)
        if not self.classes:
            return x.astype(jnp.float32)
        x = jnp.tanh(nn.Dense(self.width, dtype=dtype, name="pooler")(x[:, 0]))
        return nn.Dense(self.classes, name="head")(x.astype(jnp.float32))
