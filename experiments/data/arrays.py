"""Data sets that fit in memory."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]


class Dataset(NamedTuple):
    """Arrays by name, with the examples along the first axis.

    Attributes:
      train: `image` `(n, height, width, channels)` float32 and `label` `(n,)` int32, say.
      test: the same of the held-out examples.
      classes: number of classes.
    """

    train: Batch
    test: Batch
    classes: int


def size(arrays: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(arrays.values())))


def batches(arrays: Batch, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Endless batches from step `start` on: each epoch is a permutation of its own, drawn from `(seed, epoch)`.

    A batch may span two epochs; every example is seen once an epoch. A step's batch depends on nothing but the
    arguments, so a stream may begin anywhere.
    """
    n = size(arrays)
    if not 0 < batch_size <= n:
        raise ValueError(f"batch_size must be between 1 and the {n} training examples, got {batch_size}")
    epoch, order = -1, np.empty(0, np.int64)
    for step in range(start, 2**62):
        index = []
        for e in {step * batch_size // n: None, ((step + 1) * batch_size - 1) // n: None}:
            if e != epoch:
                epoch, order = e, np.random.default_rng((seed, e)).permutation(n)
            index.append(order[max(step * batch_size - e * n, 0) : max((step + 1) * batch_size - e * n, 0)])
        rows = np.concatenate(index)
        yield {name: a[rows] for name, a in arrays.items()}


def padded_batches(arrays: Batch, batch_size: int) -> list[Batch]:
    """All examples once, in order, in batches of one size; `weight` is 1 for an example, 0 for the last's padding."""
    n = size(arrays)
    result = []
    for i in range(math.ceil(n / batch_size)):
        rows = np.arange(i * batch_size, (i + 1) * batch_size)
        batch = {name: a[np.minimum(rows, n - 1)] for name, a in arrays.items()}
        result.append(batch | {"weight": (rows < n).astype(np.float32)})
    return result
