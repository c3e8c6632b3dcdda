"""Transformers that normalise before each branch: GPT-2 and ViT-B/16 by their default sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sa_plus_plus.contrib.transformers.layers import Transformer, embedding, layers_of, with_positions


class Decoder(Transformer):
    """Predicts the next token, or byte, from those before: learned positions, causal attention, a tied output.

    Attributes, besides those of `Transformer`:
      vocabulary: number of different tokens.
      context: the longest sequence.
      tied: whether the embedding's table is the output's kernel too.
    """

    vocabulary: int = 50257
    context: int = 1024
    tied: bool = True
    epsilon: float = 1e-5
    approximate: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array, training: bool = False) -> jax.Array:
        """Logits `(batch, sequence, vocabulary)` float32 of the token after each of `tokens` `(batch, sequence)`.

        Raises:
          ValueError: if the sequence is longer than `context`.
        """
        dtype, sequence = jnp.dtype(self.dtype), tokens.shape[1]
        table = embedding(self.vocabulary, self.width, dtype, "token_embedding")
        x = with_positions(table(tokens.astype(jnp.int32)), self.context)
        x = layers_of(self, x, jnp.tril(jnp.ones((sequence, sequence), bool))[None, None], training)
        x = nn.LayerNorm(self.epsilon, dtype, name="norm")(x)
        logits = table.attend(x) if self.tied else nn.Dense(self.vocabulary, dtype=dtype, name="head")(x)
        return logits.astype(jnp.float32)


class ViT(Transformer):
    """Classifies images: patches become tokens, with learned positions, and layers follow.

    Attributes, besides those of `Transformer`:
      classes: number of classes; 0 for the representation that would be classified.
      patch: side of a patch, in pixels.
      class_token: whether a learned token before the patches is what is classified; else their mean is.
    """

    classes: int = 1000
    patch: int = 16
    class_token: bool = True

    @nn.compact
    def __call__(self, image: jax.Array, training: bool = False) -> jax.Array:
        """Logits `(batch, classes)` or, if `classes` is 0, a representation `(batch, width)`; float32.

        Args:
          image: `(batch, height, width, channels)`.
          training: whether dropout applies.

        Raises:
          ValueError: if patches do not tile the images.
        """
        dtype, (batch, *size, _) = jnp.dtype(self.dtype), image.shape
        if size[0] % self.patch or size[1] % self.patch:
            raise ValueError(f"patches of {self.patch} pixels do not tile images of {size[0]} x {size[1]}")
        window = (self.patch, self.patch)
        x = nn.Conv(self.width, window, window, padding="VALID", dtype=dtype, name="patch_embedding")(image)
        x = x.reshape(batch, -1, self.width)
        if self.class_token:
            token = self.param("class_token", nn.initializers.zeros, (self.width,)).astype(dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, self.width)), x], axis=1)
        x = with_positions(x, x.shape[1])
        x = layers_of(self, x, None, training)
        x = nn.LayerNorm(self.epsilon, dtype, name="norm")(x)
        x = x[:, 0] if self.class_token else jnp.mean(x, axis=1)
        x = x.astype(jnp.float32)
        return nn.Dense(self.classes, name="head")(x) if self.classes else x
