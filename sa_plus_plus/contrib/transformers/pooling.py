"""A sentence's embedding from the representations of its tokens."""

import jax
import jax.numpy as jnp


def pooled(x: jax.Array, real: jax.Array, pooling: str = "mean", normalised: bool = True) -> jax.Array:
    """Embeddings `(batch, width)`.

    Args:
      x: representations, `(batch, length, width)`.
      real: bool `(batch, length)`: false for padding.
      pooling: `"mean"`, of the real tokens, or `"cls"`, the first.
      normalised: whether they are scaled to length 1.
    """
    if pooling == "cls":
        y = x[:, 0]
    else:
        count = jnp.maximum(jnp.sum(real, 1, keepdims=True), 1)
        y = jnp.sum(jnp.where(real[..., None], x, 0), 1) / count.astype(x.dtype)
    return y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12) if normalised else y
