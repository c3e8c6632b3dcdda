"""A transformer layer and a stack of layers, shared by the decoder, the ViT and the encoders."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Layer(nn.Module):
    """Self-attention and a feed-forward network of two dense layers, each added to its input.

    x + attention(norm(x)), then x + feed_forward(norm(x)); with `post_norm`, norm(x + attention(x)) and
    norm(x + feed_forward(x)).

    Attributes:
      heads: of the attention; they share the width evenly.
      hidden: width of the feed-forward layer.
      post_norm: whether layer normalisation follows each sum, as in BERT, instead of preceding each branch.
      epsilon: of layer normalisation.
      approximate: GELU by its tanh approximation, as in GPT-2, instead of exactly.
      dropout: share of each branch's outputs that is dropped in training.
      dtype: that activations are computed in; None for that of the input. Parameters are float32.
    """

    heads: int
    hidden: int
    post_norm: bool = False
    epsilon: float = 1e-6
    approximate: bool = False
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, training: bool = False) -> jax.Array:
        """`(batch, sequence, width)`, like `x`; `mask` as for `attention`."""
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        norm1, norm2 = (nn.LayerNorm(self.epsilon, self.dtype, name=name) for name in ("norm1", "norm2"))
        dropped = nn.Dropout(self.dropout, deterministic=not training)

        def attend(x: jax.Array) -> jax.Array:
            return dropped(dense(width, name="out")(attention(x, self.heads, mask, dense)))

        def feed_forward(x: jax.Array) -> jax.Array:
            y = nn.gelu(dense(self.hidden, name="up")(x), approximate=self.approximate)
            return dropped(dense(width, name="down")(y))

        if self.post_norm:
            x = norm1(x + attend(x))
            return norm2(x + feed_forward(x))
        x = x + attend(norm1(x))
        return x + feed_forward(norm2(x))


def attention(x: jax.Array, heads: int, mask: jax.Array | None, dense: Callable[..., Any]) -> jax.Array:
    """softmax(q kᵀ / √d) v in each head, d its width; `(batch, sequence, width)` as `x`, before the output layer.

    Args:
      x: `(batch, sequence, width)`.
      heads: how many.
      mask: bool, broadcast to `(batch, heads, sequence, sequence)`: which positions (last axis) each position sees;
        None for all.
      dense: makes the layers `query`, `key` and `value`, submodules of the module that calls this. They are dense
        layers rather than flax's attention, so that each kernel is one matrix.

    Raises:
      ValueError: if the heads cannot share the width evenly.
    """
    batch, sequence, width = x.shape
    if width % heads:
        raise ValueError(f"the width must be a multiple of the number of heads, got width={width}, heads={heads}")
    q, k, v = (dense(width, name=name)(x).reshape(batch, sequence, heads, -1) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) / math.sqrt(width // heads)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    shares = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(x.shape)


class Transformer(nn.Module):
    """Common base of the decoder, the ViT and BERT.

    Attributes:
      layers: how many.
      width: of a token, a multiple of `heads`.
      hidden: width of the feed-forward layers.
      heads: of the attention.
      epsilon: of layer normalisation.
      approximate: GELU by its tanh approximation instead of exactly.
      dropout: share of activations that is dropped in training.
      scan: whether the layers run in a loop, with stacked parameters; see `stack`.
      dtype: that activations are computed in; parameters are float32.
    """

    layers: int = 12
    width: int = 768
    hidden: int = 3072
    heads: int = 12
    epsilon: float = 1e-12
    approximate: bool = False
    dropout: float = 0.0
    scan: bool = False
    dtype: str = "float32"


def layers_of(
    model: Transformer, x: jax.Array, mask: jax.Array | None, training: bool, post_norm: bool = False
) -> jax.Array:
    """Dropout and a transformer's layers, as submodules of the calling model; arguments as for `stack`."""
    return stack(
        nn.Dropout(model.dropout, deterministic=not training)(x),
        model.layers,
        mask,
        training,
        model.scan,
        heads=model.heads,
        hidden=model.hidden,
        post_norm=post_norm,
        epsilon=model.epsilon,
        approximate=model.approximate,
        dropout=model.dropout,
        dtype=jnp.dtype(model.dtype),
    )


def stack(
    x: jax.Array,
    count: int,
    mask: jax.Array | None = None,
    training: bool = False,
    scan: bool = False,
    **options: Any,
) -> jax.Array:
    """Layers one after another, submodules `layer1`, `layer2`, ... of the calling module.

    Args:
      x: `(batch, sequence, width)`.
      count: how many layers.
      mask: as of `attention`.
      training: whether dropout applies.
      scan: whether one submodule `layers`, whose parameters have a leading axis of layers, runs in a loop instead.
        A deep network compiles faster that way.
      options: of `Layer`.
    """
    if not scan:
        for i in range(count):
            x = Layer(**options, name=f"layer{i + 1}")(x, mask, training)
        return x

    def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return layer(x, mask, training), None

    loop = nn.scan(
        body,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=count,
    )
    x, _ = loop(Layer(**options, name="layers"), x, None)
    return x


def embedding(count: int, width: int, dtype: Any, name: str) -> nn.Embed:
    """A table of `count` learned vectors, for a submodule `name`, initialised small."""
    return nn.Embed(count, width, dtype, embedding_init=nn.initializers.normal(0.02), name=name)


def with_positions(x: jax.Array, context: int) -> jax.Array:
    """`x` `(batch, sequence, width)` plus a learned vector for each position, submodule `position_embedding`.

    Raises:
      ValueError: if the sequence is longer than `context`, the number of positions there are.
    """
    sequence, width = x.shape[1:]
    if sequence > context:
        raise ValueError(f"a sequence of {sequence} tokens is longer than the model's context of {context}")
    return x + embedding(context, width, x.dtype, "position_embedding")(jnp.arange(sequence))[None]
