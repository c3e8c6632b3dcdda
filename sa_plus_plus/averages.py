"""An average of the weights of a network that is being pruned, which is pruned too."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sa_plus_plus import trees
from sa_plus_plus.blocks import at_least_float32

_SHORT = 2**16 - 1  # the most steps that 16 bits count


class EmaState(NamedTuple):
    """State of `ema`.

    Attributes:
      average: the parameters' averages, of at least 32 bits; None for integers, booleans and random keys.
      count: for each weight, the updates since it was last zero.
    """

    average: Any
    count: Any


class Ema(NamedTuple):
    """What `ema` returns.

    Attributes:
      init: `init(params) -> state`.
      update: `update(state, params) -> state`, after each step of the optimizer.
      params: `params(state, params) -> averaged params`, zero where `params` are.
    """

    init: Callable[[Any], EmaState]
    update: Callable[[EmaState, Any], EmaState]
    params: Callable[[EmaState, Any], Any]


def ema(decay: float) -> Ema:
    """The exponential moving average of a network's weights, with the zeros of the present network.

        ema = sapp.ema(0.999)
        average = ema.init(params)
        ...
        params = optax.apply_updates(params, updates)
        average = ema.update(average, params)  # the new line, in the jitted step
        ...
        sapp.check_pruned(ema.params(average, params), plan)

    While a network is pruned, blocks come and go, and a plain average of such networks is not pruned. This one is the
    average of each weight over the steps since it was last zero,

        a_n = sum_i decay^(n-i) w_i / sum_i decay^(n-i),    i = 1 ... n,

    so it is unbiased from the first step, a block that is removed is removed at once, and one that comes back does not
    remember what it was. It is an average of effective weights, those that the loss sees: of `params` in a loop with
    `sparsify`, and of `sp.apply(trainable, prune)` in the explicit form. Attention weights are thereby averaged with
    the weights that they multiply. (They start again at each phase: averaged on their own they would not fit.)

    All three are pure functions, for use under `jax.jit`, with donation and sharded parameters. A state takes six bytes
    for a float32 weight, eight for a decay above 0.9998. Narrower types are averaged in float32 and returned as they
    were. Leaves that are not of a floating type are those of the present network. `update` and `params` may be given
    more than `init` was, such as a whole Equinox model.

    Batch statistics belong to the weights with which they were measured: average them too, by
    `ema.init((params, batch_stats))`, or measure them again.

    Args:
      decay: from 0, the present network, to 1, the mean over all steps.

    Raises:
      ValueError: if `decay` is not a number from 0 to 1; by `update` and `params`, if the parameters are not the tree
        that `init` was given.
      TypeError: by `init`, if a leaf is not an array.
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise ValueError(f"decay={decay!r} is not a number from 0, the present network, to 1, the mean over all steps")
    forgets = decay**_SHORT < 1e-5  # then counts may stop there: the weight of an update has reached its limit
    counts, most = (jnp.uint16, _SHORT) if forgets else (jnp.uint32, 2**32 - 1)

    def init(params: Any) -> EmaState:
        weights = trees.inexact(trees.copy_arrays(params))
        average = jax.tree.map(lambda w: jnp.zeros_like(at_least_float32(w)), weights)
        return EmaState(average, jax.tree.map(lambda w: jnp.zeros_like(w, counts), weights))

    def update(state: EmaState, params: Any) -> EmaState:
        current = trees.match_state(params, state.average, "parameters")

        def counted(count: Any, w: Any) -> Any:
            return count if w is None else jnp.where(w == 0, counts(0), count + (count < counts(most)).astype(counts))

        def averaged(average: Any, count: Any, w: Any) -> Any:
            if w is None:
                return average
            w = jnp.asarray(w).astype(average.dtype)
            share = _share(decay, count).astype(average.dtype)
            moved = jnp.where(
                share == 1, w, average + share * (w - average)
            )  # the difference may round, or be no number
            return jnp.where(w == 0, 0, moved)

        count = jax.tree.map(counted, state.count, current, is_leaf=trees.is_none)
        average = jax.tree.map(averaged, state.average, count, current, is_leaf=trees.is_none)
        return trees.unalias(EmaState(average, count), state, params)

    def averaged_params(state: EmaState, params: Any) -> Any:
        current = trees.match_state(params, state.average, "parameters")

        def one(average: Any, count: Any, w: Any) -> Any:
            if w is None:
                return None
            w = jnp.asarray(w)
            return jnp.where((w == 0) | (count == 0), w, average.astype(w.dtype))

        averages = jax.tree.map(one, state.average, state.count, current, is_leaf=trees.is_none)
        return trees.unalias(trees.fill_none(averages, params), state, params)

    return Ema(init, update, averaged_params)


def _share(decay: float, count: jax.Array) -> jax.Array:
    """The weight of the last of `count` updates in their average, `(1 - decay) / (1 - decay^count)`."""
    n = jnp.maximum(count, 1).astype(jnp.float32)
    if decay in (0, 1):
        return jnp.ones_like(n) if decay == 0 else 1 / n
    return jnp.where(
        n == 1, 1.0, (1 - decay) / -jnp.expm1(n * math.log(decay))
    )  # the first as it is, to the last digit
