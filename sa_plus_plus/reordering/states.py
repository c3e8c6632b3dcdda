"""The state of a training loop in another order of units: the same network, pruned by other blocks from there on."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sa_plus_plus import blocks as blk
from sa_plus_plus.phases import SPARSE
from sa_plus_plus.planning import LeafPlan, path_string
from sa_plus_plus.reordering.orders import Order
from sa_plus_plus.sparsifier import PruneState, Sparsifier, Trainable


class Training(NamedTuple):
    """What a training loop carries from step to step.

    Attributes:
      trainable: weights and logits.
      prune: masks, step, phase.
      opt_state: the optimizer's, for `trainable`.
    """

    trainable: Trainable
    prune: PruneState
    opt_state: optax.OptState


def check_step(sp: Sparsifier, prune: PruneState) -> None:
    """Refuse a step at which blocks are chosen already.

    Raises:
      ValueError: in a sparse phase.
    """
    phase = sp.phases.at(int(prune.step))
    if phase.kind == SPARSE:
        raise ValueError(
            f"after step {int(prune.step)} the schedule is in the phase {phase}, whose blocks are chosen: reorder in a "
            "dense or a sparsification phase, or at its start"
        )


def permuted(sp: Sparsifier, order: Order, training: Training, prefix: str = "") -> Training:
    """The state in another order; the effective parameters are those of before, permuted.

    Blocks are made of other weights, so all of them are active again, until the next step that chooses. A block's logit
    becomes the mean of the logits that its weights had, and the weights change so that each keeps its effective value.
    Leaves of the optimizer's state are permuted like the parameters, or treated like the logits, that they have the
    place and the shape of. Where weights change by a factor their moments do not, so a boundary of phases, at which
    moments restart, is the best time.

    Args:
      sp: the algorithm.
      order: of the parameters, or of a tree that has them.
      training: the state; every array on this process.
      prefix: of the parameters' paths in the order.

    Raises:
      ValueError: in a sparse phase; or for a leaf of the optimizer's state whose axes cannot be told.
    """
    trainable, prune, opt_state = training
    check_step(sp, prune)
    layers = sp.plan(trainable.params).pruned
    effective = _in_order(order, prefix, sp.apply(trainable, prune))
    logits = {path: _grid_in_order(order, prefix, layers[path], x) for path, x in trainable.logits.items()}
    moved = Trainable(_in_order(order, prefix, trainable.params), logits)
    prune = prune._replace(masks={path: jnp.ones_like(mask) for path, mask in prune.masks.items()})
    return Training(
        sp.sync_from_params(moved, prune, effective),
        prune,
        permuted_like(order, trainable, layers, opt_state, prefix),
    )


def permuted_like(
    order: Order,
    trainable: Trainable,
    layers: Mapping[str, LeafPlan],
    tree: Any,
    prefix: str = "",
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """An optimizer's state, or another tree that has trees like the trained ones, in another order.

    Args:
      order: as in `permuted`.
      trainable: what the optimizer trains.
      layers: the pruned leaves by path.
      tree: the state.
      prefix: as in `permuted`.
      is_leaf: what of the state stays as it is.

    Raises:
      ValueError: for a leaf at the place of a permuted one, but of another shape.
    """
    kinds = ((trainable.params, _leaf_in_order), (trainable.logits, _grid_of))
    trained = [
        (keys, path_string(keys), leaf, permute)
        for part, permute in kinds
        for keys, leaf in jax.tree_util.tree_leaves_with_path(part)
    ]

    def one(keys: Any, leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or np.size(leaf) < 2:
            return leaf
        at_its_place = [entry for entry in trained if entry[0] == keys[len(keys) - len(entry[0]) :]]
        at_its_place.sort(key=lambda entry: -len(entry[0]))  # the longest path that both trees have first
        for _, path, like, permute in at_its_place:
            if np.shape(leaf) == np.shape(like):
                return permute(order, prefix, layers, path, leaf)
        for _, path, like, permute in at_its_place:
            if permute(order, prefix, layers, path, like) is not like:
                raise ValueError(
                    f"cannot permute {path_string(keys)} of the optimizer's state: its shape {np.shape(leaf)} is "
                    f"not {np.shape(like)}, that of {path}, so it is not known which axes it has. Reorder before "
                    "training, or use an optimizer whose moments have the shapes of the parameters"
                )
        for place, path, like, permute in [] if at_its_place else trained:
            if _is_below(keys, place) and permute(order, prefix, layers, path, like) is not like:
                raise ValueError(
                    f"cannot permute {path_string(keys)} of the optimizer's state: it is one of several arrays for "
                    f"{path}, and it is not known which axes it has. Reorder before training, or use an optimizer "
                    "whose moments have the shapes of the parameters"
                )
        return leaf

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_leaf)


def _is_below(keys: tuple[Any, ...], place: tuple[Any, ...]) -> bool:
    """Whether a path leads through another, somewhere before its end."""
    return any(keys[i : i + len(place)] == place for i in range(len(keys) - len(place)))


def _in_order(order: Order, prefix: str, params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: _leaf_in_order(order, prefix, {}, path_string(keys), leaf), params
    )


def _leaf_in_order(order: Order, prefix: str, layers: Mapping[str, LeafPlan], path: str, leaf: Any) -> Any:
    return order.leaf(order.axes.leaves[prefix + path], leaf)


def _grid_of(order: Order, prefix: str, layers: Mapping[str, LeafPlan], path: str, grid: Any) -> Any:
    return _grid_in_order(order, prefix, layers[path], grid)


def _grid_in_order(order: Order, prefix: str, layer: LeafPlan, grid: Any) -> Any:
    """Numbers of the blocks once the weights are permuted: the means of those that their weights had."""
    wide = blk.expand_blocks(grid, layer.shape, layer.block, layer.view)
    moved = order.leaf(order.axes.leaves[prefix + layer.path], wide)
    if moved is wide:
        return grid
    sums = jnp.sum(blk.to_blocks(moved, layer.block, layer.view), (-3, -1))
    return (sums / blk.block_sizes(layer.shape, layer.block, layer.view).astype(sums.dtype)).astype(grid.dtype)
