"""One group's order: elements are exchanged between places so that the best blocks hold more.

An element has a profile in each kernel: its scores in each block that it may be part of. Given which blocks are kept, a
place is worth to an element the part of its profile that is kept there. Elements change places in pairs, in many pairs
at a time, while that gains something; then the blocks are chosen anew. Each round raises the sum.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUNDS = 80  # limit on choices of the blocks
EXCHANGES = 50  # limit on steps of exchanges between two choices
CLUSTERINGS = 12  # limit on rounds of k-means
ENOUGH = 1e-4  # relative gain of a round below which it ends


class Kernel(NamedTuple):
    """A kernel as a group sees it.

    Attributes:
      profile: `(*copies, size, ..., blocks across)`: the scores of each of the group's elements, summed over blocks on
        the kernel's other side. Each of the copies has an order of its own.
      copies: number of axes that number copies.
      side: number of the group's elements in a block.
      kept: number of blocks that stay in each matrix.
      scale: of the scores.
      stack: axes that number matrices.
    """

    profile: np.ndarray
    copies: int
    side: int
    kept: int
    scale: float
    stack: tuple[int, ...]

    def chosen(self, sums: np.ndarray) -> np.ndarray:
        """Mask of the best blocks, of the shape of their sums, whose axes are those of the profile."""
        front = (*self.stack, *(axis for axis in range(sums.ndim) if axis not in self.stack))
        moved = sums.transpose(front)
        mask = largest(moved.reshape(math.prod(moved.shape[: len(self.stack)]), -1), self.kept)
        return mask.reshape(moved.shape).transpose(np.argsort(front))


def largest(rows: np.ndarray, kept: int) -> np.ndarray:
    """Mask of the `kept` largest entries of each row."""
    mask = np.zeros(rows.shape, bool)
    if kept:
        np.put_along_axis(mask, np.argpartition(-rows, kept - 1, axis=1)[:, :kept], True, axis=1)
    return mask


def arranged(kernels: Sequence[Kernel]) -> np.ndarray:
    """An order `(copies, size)` of a group: the element at each place.

    The better of two: from the order as it is, and from one with elements of similar profiles beside each other.

    Args:
      kernels: those that have the group.
    """
    first = kernels[0]
    size = first.profile.shape[first.copies]
    side = functools.reduce(math.gcd, (kernel.side for kernel in kernels))
    as_it_is = np.tile(np.arange(size), (math.prod(first.profile.shape[: first.copies]), 1))
    starts = [as_it_is, _clustered(kernels, as_it_is, side)]
    return max((_improved(kernels, start, side) for start in starts), key=lambda found: found[0])[1]


def _improved(kernels: Sequence[Kernel], order: np.ndarray, side: int) -> tuple[float, np.ndarray]:
    """The sum of the best blocks and an order in which it is larger, if there is one near."""
    value, worth = _worth(kernels, order, side)
    for _ in range(ROUNDS):
        order = _exchanged(worth, order, side)
        last, (value, worth) = value, _worth(kernels, order, side)
        if value - last < ENOUGH * abs(value):
            break
    return value, order


def _clustered(kernels: Sequence[Kernel], order: np.ndarray, side: int) -> np.ndarray:
    """Clusters of equal size of elements whose profiles have similar directions, by k-means."""
    copies, size = order.shape
    profile = np.concatenate([k.scale * k.profile.reshape(copies, size, -1) for k in kernels], axis=2)
    profile /= np.maximum(np.linalg.norm(profile, axis=2, keepdims=True), np.finfo(np.float32).tiny)
    for _ in range(CLUSTERINGS):
        placed = np.take_along_axis(profile, order[:, :, None], axis=1)
        centres = np.add.reduceat(placed, np.arange(0, size, side), axis=1)
        before, order = order, _exchanged(profile @ centres.swapaxes(1, 2), order, side)
        if (before == order).all():
            break
    return order


def _worth(kernels: Sequence[Kernel], order: np.ndarray, side: int) -> tuple[float, np.ndarray]:
    """The sum of the best blocks, and what each place is worth to each element, `(copies, size, places)`."""
    copies, size = order.shape
    places = -(-size // side)
    value, worth = 0.0, np.zeros((copies, size, places), np.float32)
    for kernel in kernels:
        profile = kernel.profile.reshape(copies, size, -1)
        placed = np.take_along_axis(profile, order[:, :, None], axis=1)
        sums = np.add.reduceat(placed, np.arange(0, size, kernel.side), axis=1)
        shape = list(kernel.profile.shape)
        shape[kernel.copies] = sums.shape[1]
        mask = kernel.chosen(sums.reshape(shape)).reshape(sums.shape)
        value += kernel.scale * float(np.sum(sums, where=mask, dtype=np.float64))
        each = mask.astype(np.float32) * np.float32(kernel.scale)
        found = profile @ each.swapaxes(1, 2)
        worth += found.repeat(kernel.side // side, axis=2)[:, :, :places]
    return value, worth


def _exchanged(worth: np.ndarray, order: np.ndarray, side: int) -> np.ndarray:
    """The order after exchanges of elements between places, each of which gains."""
    copies, size, places = worth.shape
    order = np.pad(order, ((0, 0), (0, places * side - size)), constant_values=-1)
    numbers, tolerance = np.arange(places), 1e-6 * float(worth.max())
    # For each place and each other one: which of its elements gains most by moving there, and how much.
    best, gain = np.empty((copies, places, places), int), np.empty((copies, places, places), np.float32)
    copy, place = np.divmod(np.arange(copies * places), places)
    for _ in range(EXCHANGES):
        elements = order.reshape(copies, places, side)[copy, place]
        moves = worth[copy[:, None], elements]
        moves -= np.take_along_axis(moves, np.broadcast_to(place[:, None, None], (*elements.shape, 1)), 2)
        moves[elements < 0] = -np.inf
        best[copy, place] = moves.argmax(1)
        gain[copy, place] = moves.max(1)
        both = gain + gain.swapaxes(1, 2)
        both[:, numbers, numbers] = -np.inf
        partner = both.argmax(2)
        mutual = (np.take_along_axis(partner, partner, 1) == numbers) & (partner > numbers)
        copy, one = np.nonzero(mutual & (np.take_along_axis(both, partner[..., None], 2)[..., 0] > tolerance))
        if not len(copy):
            break
        other = partner[copy, one]
        left, right = one * side + best[copy, one, other], other * side + best[copy, other, one]
        order[copy, left], order[copy, right] = order[copy, right], order[copy, left]
        copy, place = np.concatenate([copy, copy]), np.concatenate([one, other])  # what has changed
    return order[:, :size]
