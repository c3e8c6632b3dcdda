"""Reordering of a run's units at some of its steps: on the host, between two steps."""

from typing import Any, NamedTuple

import jax
import numpy as np

import sa_plus_plus as sapp
from experiments.training.program import Program
from experiments.training.step import TrainState, of_seed, side_by_side


class Reordering(NamedTuple):
    """One reordering of one seed's network, in terms of JSON.

    Attributes:
      step: steps done before it.
      shares: by path, the share of the squared weights in the best blocks before and after, and in single weights.
      permutations: by the name of a group of axes, which unit came to each place.
    """

    step: int
    shares: dict[str, list[float]]
    permutations: dict[str, list[Any]]


def reordered(program: Program, state: TrainState, step: int) -> tuple[TrainState, list[Reordering]]:
    """A state after `step` steps with its units in an order found by the magnitudes of its weights, each seed's own.

    A network with weights that are not finite stays as it is.

    Args:
      program: the compiled config.
      state: it may be donated.
      step: steps done.

    Returns:
      The state, on the devices as before, and what was done with each seed.
    """
    if program.seeds == 1:
        state, done = _one(program, state, step)
        found = [done]
    else:
        pairs = [_one(program, of_seed(state, n), step) for n in range(program.seeds)]
        state, found = side_by_side([each for each, _ in pairs]), [done for _, done in pairs]
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, program.state), found


def _one(program: Program, state: TrainState, step: int) -> tuple[TrainState, Reordering]:
    setup, averages = program.setup, jax.tree.leaves(state.model_state)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(state.trainable)):
        return state, Reordering(step, {}, {})

    def outputs(params: Any, *rest: Any) -> Any:
        model_state, batch = rest if averages else (state.model_state, *rest)
        return setup.task.outputs(params, model_state, batch, training=False)[0]

    size, example = setup.config.batch_size, setup.task.dataset.example
    batch = {k: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for k, x in example.items()}
    found = sapp.reorder_state(
        setup.sparsifier,
        outputs,
        state.trainable,
        state.prune,
        state.opt_state,
        [(batch,)],
        model_state=state.model_state if averages else None,
    )
    new = state._replace(trainable=found.trainable, prune=found.prune, opt_state=found.opt_state)
    if averages:
        new = new._replace(model_state=found.model_state)
    shares = {path: list(share) for path, share in found.shares.items()}
    return new, Reordering(step, shares, {name: order.tolist() for name, order in found.order.permutations.items()})
