"""A pruned network beside the dense one: milliseconds, and how far apart their outputs are."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import timing
from sa_plus_plus.contrib.commands.functions import Network
from sa_plus_plus.planning import LeafPlan, Plan, map_layers
from sa_plus_plus.sparse.specialize import specialized

ROUNDS = 7
JAX, DENSE, PRUNED = "dense, run by JAX", "dense, specialised", "pruned, specialised"


class Difference(NamedTuple):
    """How far apart two networks' outputs are on the examples.

    Attributes:
      largest: absolute difference.
      of: the largest absolute output of the network that it is compared with.
    """

    largest: float
    of: float


class Comparison(NamedTuple):
    """A pruned network beside the dense one.

    Attributes:
      milliseconds: of a call with the first batch, by what runs: medians, measured alternately.
      rounding: the specialised network against the same weights run by JAX.
      pruning: the pruned network against the dense one, both run by JAX; None if that is not known.
      inputs: shapes of the batch.
    """

    milliseconds: dict[str, float]
    rounding: Difference
    pruning: Difference | None
    inputs: str

    @property
    def dense(self) -> float:
        """Milliseconds of the faster dense network."""
        return min(self.milliseconds[JAX], self.milliseconds[DENSE])


def compare(network: Network, params: Any, dense: Any, plan: Plan | None) -> Comparison:
    """Time a network and look at its outputs.

    Args:
      network: its function and examples.
      params: of the pruned network.
      dense: of the dense one; None if they are not known: zeros of the pruned kernels are then filled to time it.
      plan: of the pruned network.
    """
    batch = network.batches[0]
    full = dense if dense is not None else map_layers(_filled, params, plan.pruned if plan else {})
    jitted = jax.jit(network.fn)
    fast = specialized(functools.partial(network.fn, params), batch, plan=plan)  # the networks are compared here
    calls = {
        JAX: functools.partial(jitted, full, *batch),
        DENSE: functools.partial(specialized(functools.partial(network.fn, full), batch), *batch),
        PRUNED: functools.partial(fast, *batch),
    }
    seconds = timing.alternate({name: functools.partial(_finish, call) for name, call in calls.items()}, ROUNDS)
    outputs = [[f(p, *b) for b in network.batches] for f, p in ((jitted, params), (jitted, full))]
    return Comparison(
        {name: 1000 * float(np.median(values)) for name, values in seconds.items()},
        _difference(fast(*batch), outputs[0][0]),
        None if dense is None else _difference(*outputs),
        ", ".join(f"{x.dtype} {'×'.join(map(str, x.shape))}" for x in map(jnp.asarray, jax.tree.leaves(batch))),
    )


def _finish(call: Any) -> None:
    jax.block_until_ready(call())


def _filled(layer: LeafPlan | None, leaf: Any) -> Any:
    if layer is None:
        return leaf
    noise = np.random.default_rng(0).normal(size=leaf.shape) * (float(jnp.std(leaf.astype(jnp.float32))) or 1.0)
    return jnp.where(leaf == 0, jnp.asarray(noise, leaf.dtype), leaf)


def _difference(got: Any, want: Any) -> Difference:
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        if np.size(a)
    ]
    largest = max((float(np.abs(a - b).max()) for a, b in pairs), default=0.0)
    return Difference(largest, max((float(np.abs(b).max()) for _, b in pairs), default=0.0))
