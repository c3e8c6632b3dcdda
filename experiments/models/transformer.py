"""Transformers that normalise before each branch: GPT-2 and ViT-B/16 by their default sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.layers import embedding, stack, with_positions


class Decoder(nn.Module):
    """Predicts the next token, or byte, from those before: learned positions, causal attention, a tied output.

    Attributes:
      vocabulary: number of different tokens.
      context: the longest sequence.
      layers: how many.
      width: of a token, a multiple of `heads`.
      hidden: width of the feed-forward layers.
      heads: of the attention.
      tied: whether the embedding's table is the output's kernel too.
      epsilon: of layer normalisation.
      approximate: GELU by its tanh approximation instead of exactly.
      dropout: share of activations that is dropped in training.
      scan: whether the layers run in a loop, with stacked parameters; see `stack`.
      dtype: that activations are computed in; parameters are float32.
    """

    vocabulary: int = 50257
    context: int = 1024
    layers: int = 12
    width: int = 768
    hidden: int = 3072
    heads: int = 12
    tied: bool = True
    epsilon: float = 1e-5
    approximate: bool = True
    dropout: float = 0.0
    scan: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array, training: bool = False) -> jax.Array:
        """Logits `(batch, sequence, vocabulary)` float32 of the token after each of `tokens` `(batch, sequence)`.

        Raises:
          ValueError: if the sequence is longer than `context`.
        """
        dtype, sequence = jnp.dtype(self.dtype), tokens.shape[1]
        table = embedding(self.vocabulary, self.width, dtype, "token_embedding")
        x = with_positions(table(tokens.astype(jnp.int32)), self.context)
        x = nn.Dropout(self.dropout, deterministic=not training)(x)
        x = stack(
            x,
            self.layers,
            jnp.tril(jnp.ones((sequence, sequence), bool))[None, None],
            training,
            self.scan,
            heads=self.heads,
            hidden=self.hidden,
            epsilon=self.epsilon,
            approximate=self.approximate,
            dropout=self.dropout,
            dtype=dtype,
        )
        x = nn.LayerNorm(self.epsilon, dtype, name="norm")(x)
        logits = table.attend(x) if self.tied else nn.Dense(self.vocabulary, dtype=dtype, name="head")(x)
        return logits.astype(jnp.float32)


class ViT(nn.Module):
    """Classifies images: patches become tokens, with learned positions, and layers follow.

    Attributes:
      classes: number of classes.
      patch: side of a patch, in pixels.
      layers: how many.
      width: of a token, a multiple of `heads`.
      hidden: width of the feed-forward layers.
      heads: of the attention.
      class_token: whether a learned token before the patches is what is classified; else their mean is.
      epsilon: of layer normalisation.
      approximate: GELU by its tanh approximation instead of exactly.
      dropout: share of activations that is dropped in training.
      scan: whether the layers run in a loop, with stacked parameters; see `stack`.
      dtype: that activations are computed in; parameters are float32.
    """

    classes: int = 1000
    patch: int = 16
    layers: int = 12
    width: int = 768
    hidden: int = 3072
    heads: int = 12
    class_token: bool = True
    epsilon: float = 1e-12
    approximate: bool = False
    dropout: float = 0.0
    scan: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: jax.Array, training: bool = False) -> jax.Array:
        """Logits `(batch, classes)` float32 of images `(batch, height, width, channels)`.

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
        x = nn.Dropout(self.dropout, deterministic=not training)(x)
        x = stack(
            x,
            self.layers,
            None,
            training,
            self.scan,
            heads=self.heads,
            hidden=self.hidden,
            epsilon=self.epsilon,
            approximate=self.approximate,
            dropout=self.dropout,
            dtype=dtype,
        )
        x = nn.LayerNorm(self.epsilon, dtype, name="norm")(x)
        x = x[:, 0] if self.class_token else jnp.mean(x, axis=1)
        return nn.Dense(self.classes, name="head")(x.astype(jnp.float32))
