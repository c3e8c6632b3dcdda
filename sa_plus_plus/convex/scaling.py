"""Powers of two as units: numbers scaled by them keep every digit, and their squares neither overflow nor vanish."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def power_of_two(x: jax.Array) -> jax.Array:
    """The power of two next to a positive number; 1 for 0 and numbers that are not finite.

    Args:
      x: floating point, of any shape.
    """
    rounded = lax.reduce_precision(x, exponent_bits=jnp.finfo(x.dtype).nexp, mantissa_bits=0)
    return jnp.where((rounded > 0) & jnp.isfinite(rounded), rounded, 1)


@jax.jit  # so that the absolute values of a large array are not stored
def unit_of(tree: Any) -> jax.Array:
    """The power of two next to the largest absolute value; a constant in derivatives.

    Args:
      tree: a pytree of arrays of one dtype.
    """
    largest = [jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]
    return lax.stop_gradient(power_of_two(jnp.max(jnp.stack(largest))))


def norm(tree: Any) -> jax.Array:
    """2-norm of all entries.

    Args:
      tree: a pytree of arrays of one dtype.
    """
    unit = unit_of(tree)
    return unit * jnp.sqrt(sum(jnp.sum(jnp.square(leaf / unit)) for leaf in jax.tree.leaves(tree)))
