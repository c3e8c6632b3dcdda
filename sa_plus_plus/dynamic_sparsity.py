"""Dynamic sparse training: periodically, the weakest active blocks are replaced by as many others."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sa_plus_plus import blocks as blk
from sa_plus_plus.phases import SPARSE, Phases
from sa_plus_plus.planning import LeafPlan
from sa_plus_plus.sparsifier import Masks


class Regrowth(NamedTuple):
    """When blocks are replaced in sparse phases, and which are grown. Those of smallest norm are dropped.

    Attributes:
      growth: `growth(gradient, layer, key)`: a number per block, of the shape `layer.full_grid`: the higher, the sooner
        the block is grown. `gradient` is None if `by_gradient` is false.
      by_gradient: whether `growth` needs the loss's gradient with respect to the weights of masked blocks.
      every: steps between two changes.
      fraction: share of the active blocks that is replaced at first.
      until: share of the run after which the blocks stay as they are.
    """

    growth: Callable[[Any, LeafPlan, Any], jax.Array]
    by_gradient: bool
    every: int
    fraction: float
    until: float

    def due(self, phases: Phases, step: Any) -> jax.Array:
        """Whether blocks are replaced at a step: inside a sparse phase, but not at its start."""
        step = jnp.asarray(step)
        inside = phases.kind_in([SPARSE], step) & ~phases.is_boundary(step)
        return inside & (step % self.every == 0) & (step > 0) & (step < math.ceil(self.until * phases.total_steps))

    def share(self, phases: Phases, step: Any) -> jax.Array:
        """`fraction / 2 * (1 + cos(pi * step / end))` of the active blocks (RigL, section 3), float32."""
        end = self.until * phases.total_steps
        return self.fraction / 2 * (1 + jnp.cos(jnp.pi * jnp.asarray(step).astype(jnp.float32) / end))


def by_gradient(every: int, fraction: float, until: float) -> Regrowth:
    """Blocks are grown by the norm of their gradient (RigL).

    Args:
      every: steps between two changes.
      fraction: share of the active blocks that is replaced at first.
      until: share of the run after which the blocks stay as they are.
    """

    def growth(gradient: Any, layer: LeafPlan, key: Any) -> jax.Array:
        return blk.frobenius(gradient, layer.block, layer.view)

    return Regrowth(growth, True, every, fraction, until)


def check(regrowth: Regrowth, every: str = "mask_every", fraction: str = "fraction", until: str = "until") -> None:
    """Refuse options that are out of range, by the names that the algorithm gives them."""
    if regrowth.every < 1 or regrowth.every != int(regrowth.every):
        raise ValueError(f"{every} must be a whole number of steps from 1, got {regrowth.every}")
    for name, value in ((fraction, regrowth.fraction), (until, regrowth.until)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be a share in (0, 1], got {value}")


def regrow(
    choose: Callable[..., Masks],
    masks: Masks,
    norms: Mapping[str, jax.Array],
    growth: Mapping[str, jax.Array],
    kept: Mapping[str, int],
    share: jax.Array,
) -> Masks:
    """Masks of as many blocks, with `n = floor(share * kept)` blocks of each matrix replaced.

    The `kept - n` active blocks of largest norm stay, and the `n` others with the largest `growth` join them; these may
    be blocks that have just been dropped (RigL, algorithm 1).

    Args:
      choose: a function that chooses blocks by a score, from `select.keeping`.
      masks: by path, like the following arguments.
      norms: of the blocks.
      growth: the higher, the sooner a block is grown.
      kept: number of active blocks in each matrix.
      share: share of these that is replaced.
    """
    count = {path: jnp.floor(share * float(kept[path])).astype(jnp.int32) for path in masks}
    stay = choose(norms, {path: kept[path] - count[path] for path in masks}, masks)
    join = choose(growth, count, {path: ~stay[path] for path in masks}, stay)
    return {path: stay[path] | join[path] for path in masks}
