"""Random convex problems of one shape, so that one program serves them all."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import convex
from sa_plus_plus.convex.groups import Groups
from sa_plus_plus.convex.problems import Problem

Kind = Literal["least squares", "logistic"]
KINDS: tuple[Kind, ...] = ("least squares", "logistic")

SAMPLES, SIZES = 40, (1, 2, 3, 4, 2)
FEATURES = sum(SIZES)


class Amount(NamedTuple):
    """The amount of each experiment to run."""

    lemma_instances: int = 25  # of each kind
    theorem_instances: int = 150  # of each kind
    wide_instances: int = 40
    promise_instances: int = 24  # of each setting
    recovery_seeds: int = 20
    digits: int = 1500
    blocks: tuple[int, ...] = (4, 8, 16, 32)
    replacements: int = 12


QUICK = Amount(2, 3, 2, 2, 2, 200, (2, 4), 2)


def keys(seed: int, count: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def instance(key: jax.Array, kind: Kind) -> tuple[Problem, Groups]:
    """Correlated features, five groups of 1 to 4 coordinates in a random order, a planted solution and noise."""
    a, b, c, d = jax.random.split(key, 4)
    x = jax.random.normal(a, (SAMPLES, FEATURES)) + 0.5 * jax.random.normal(d, (SAMPLES, 1))
    beta = jax.random.normal(b, (FEATURES,)) * (jnp.arange(FEATURES) % 2)
    y = x @ beta + jax.random.normal(c, (SAMPLES,))
    ids = jax.random.permutation(d, jnp.asarray(np.repeat(np.arange(len(SIZES)), SIZES)))
    groups = Groups(ids, (FEATURES,), len(SIZES), "partition")
    if kind == "least squares":
        return convex.problems.least_squares(x, y), groups
    return convex.problems.logistic(x, (y > 0).astype(x.dtype), 1e-3), groups
