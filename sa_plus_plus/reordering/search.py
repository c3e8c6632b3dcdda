"""An order of each group of axes in which the best blocks hold as large a share of the scores as can be.

    max over permutations  Σ_l (sum of the k_l largest blocks of S_l) / (sum of S_l)

`S_l` has a score of each weight of layer `l`. This is coordinate ascent over the groups (`exchange` has one group).
"""

import math
from collections.abc import Mapping

import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import LeafPlan
from sa_plus_plus.reordering.axes import Axes
from sa_plus_plus.reordering.exchange import Kernel, arranged, largest
from sa_plus_plus.reordering.orders import Order, order_of

SWEEPS = 4  # limit on how often each group is visited
ENOUGH = 2e-3  # gain of a sweep, in the mean share of the layers, below which the search ends
Scores = dict[str, np.ndarray]


def search(axes: Axes, scores: Mapping[str, np.ndarray], layers: Mapping[str, LeafPlan]) -> Order:
    """The order found.

    Args:
      axes: the groups of the parameters.
      scores: by path, of each weight of each of the layers, not negative.
      layers: the pruned leaves, with the blocks, and how many stay.
    """
    order, current = order_of(axes, {}), {path: np.asarray(scores[path], np.float32) for path in layers}
    share = shares(current, layers)
    for _ in range(SWEEPS):
        before = share
        for factor, group in axes.groups.items():
            touched = [path for path in layers if any(place.path == path for place in group.places)]
            kernels = [k for path in touched for k in _kernels(axes, factor, layers[path], current[path])]
            if not kernels:
                continue
            sides = tuple(axes.sizes[other] for other in group.within)
            step = order_of(axes, {group.name: arranged(kernels).reshape(*sides, group.size)})
            moved = {path: step.leaf(axes.leaves[path], current[path]) for path in touched}
            after = share | shares(moved, {path: layers[path] for path in touched})
            if sum(after.values()) > sum(share.values()):
                current, share, order = current | moved, after, order.then(factor, step.permutations[group.name])
        if sum(share.values()) - sum(before.values()) < ENOUGH * len(layers):
            break
    return order


def shares(scores: Mapping[str, np.ndarray], layers: Mapping[str, LeafPlan]) -> dict[str, float]:
    """By path: the share of a layer's scores that its best blocks hold."""
    found = {}
    for path, layer in layers.items():
        matrices = blk.matrices(scores[path], layer.view)
        sums = _summed(_summed(matrices, layer.block[0], -2), layer.block[1], -1)
        flat = sums.reshape(math.prod(layer.stack), -1)
        total = float(flat.sum(dtype=np.float64))
        found[path] = float(flat[largest(flat, layer.kept_each)].sum(dtype=np.float64)) / total if total else 1.0
    return found


def _kernels(axes: Axes, factor: int, layer: LeafPlan, scores: np.ndarray) -> list[Kernel]:
    """A layer as one group sees it, once for each of its sides that the group permutes with an effect on its blocks."""
    leaf, group = axes.leaves[layer.path], axes.groups[factor]
    view = blk.view_of(layer.shape, layer.view)
    batch, rows, cols = ([f for axis in part for f in leaf[axis]] for part in view)
    total = float(scores.sum(dtype=np.float64))
    found = []
    for along, b_along, b_across, transposed in (
        (rows, *layer.block, False),
        (cols, *layer.block[::-1], True),
    ):
        if along.count(factor) != 1 or not total:
            continue
        at = along.index(factor)
        before, after = along[:at], along[at + 1 :]
        inner, outer = (math.prod(axes.sizes[f] for f in part) for part in (after, before))
        side = b_along // inner
        aligned = b_along % inner == 0 and (outer == 1 or group.size % side == 0)
        known = set(group.within) <= {*batch, *before}
        if not (aligned and known and 1 < side < group.size):  # one element to a block, or all, are at home anywhere
            continue
        matrices = blk.matrices(scores, layer.view)
        matrices = np.swapaxes(matrices, -1, -2) if transposed else matrices
        narrow = _summed(matrices, b_across, -1)
        number = [*batch, *before]  # the factors that stay, as axes
        wide = narrow.reshape(*(axes.sizes[f] for f in number), group.size, inner, -1).sum(-2)
        mine = [number.index(f) for f in group.within]
        others = [i for i in range(len(number)) if i not in mine]
        profile = wide.transpose(*mine, len(number), *others, len(number) + 1)
        # Blocks of one matrix are chosen together: its number is made of some axes of both kinds.
        found.append(Kernel(profile, len(mine), side, layer.kept_each, 1 / total, _stack(mine, others, len(batch))))
    return found


def _stack(mine: list[int], others: list[int], batch: int) -> tuple[int, ...]:
    """The axes of a profile that number matrices."""
    place = {axis: i for i, axis in enumerate(mine)} | {axis: len(mine) + 1 + i for i, axis in enumerate(others)}
    return tuple(place[axis] for axis in range(batch))


def _summed(array: np.ndarray, side: int, axis: int) -> np.ndarray:
    """Sums of `side` entries at a time along an axis, the last of which may be fewer."""
    return array if side == 1 else np.add.reduceat(array, np.arange(0, array.shape[axis], side), axis=axis)
