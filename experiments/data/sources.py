"""Where examples come from: one interface for arrays in memory and for records that are read one by one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Examples that can be had in any order.

    Attributes:
      in_memory: whether gathering is but copying, so that nothing is won by doing it ahead of time.
    """

    in_memory: bool

    def __len__(self) -> int:
        """Number of examples."""

    def gather(self, rows: np.ndarray) -> Batch:
        """The examples of these numbers, in this order, along the first axis of each array."""


class Arrays:
    """Examples in memory, along the first axis of arrays that become read-only.

    Args:
      arrays: by name, all of one length.

    Raises:
      ValueError: if their lengths differ, or there are none.
    """

    in_memory = True

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        lengths = {name: len(a) for name, a in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays of one data set must have one length, got {lengths}")
        self.arrays = {name: a.view() for name, a in arrays.items()}
        for a in self.arrays.values():
            a.flags.writeable = False  # data sets are shared by all that ask for them

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def gather(self, rows: np.ndarray) -> Batch:
        return {name: np.take(a, rows, axis=0) for name, a in self.arrays.items()}  # half the time of a[rows]


class Records:
    """Examples that are read, and decoded, one by one.

    Args:
      records: a random-access sequence of mappings from names to values. Where it has a method `__getitems__`, as the
        data sources of TFDS have, whole batches are asked of that.
      transform: turns a record into the mapping that is batched. Threads call it at the same time.
    """

    in_memory = False

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        transform: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        self.records, self.transform = records, transform

    def __len__(self) -> int:
        return len(self.records)

    def gather(self, rows: np.ndarray) -> Batch:
        """As `Source.gather`.

        Raises:
          ValueError: if the records' values differ in shape.
        """
        numbers = rows.tolist()
        read: Iterable[Mapping[str, Any]]
        if hasattr(self.records, "__getitems__"):
            read = self.records.__getitems__(numbers)
        else:
            read = (self.records[i] for i in numbers)
        parts = [self.transform(record) for record in read]
        return {name: _stacked(name, [part[name] for part in parts]) for name in parts[0]}


class Dataset(NamedTuple):
    """What a network is trained and tested on.

    Attributes:
      train: examples with, for image classification, `image` `(height, width, channels)`, float32 in [0, 1] or uint8
        as stored (a quarter of the bytes to gather and to send; the device makes them floats), and `label` int32.
      test: held-out examples of the same kind.
      classes: number of classes.
    """

    train: Source
    test: Source
    classes: int

    @property
    def example(self) -> Batch:
        """A batch of one, for its shapes and types."""
        return self.train.gather(np.arange(1))


def in_memory(source: Source, chunk: int = 1024) -> Arrays:
    """All of a source, read once.

    Args:
      source: of examples that are all of one shape.
      chunk: number of examples to read at a time.

    Returns:
      The same examples as arrays.
    """
    arrays: Batch = {}
    for start in range(0, len(source), chunk):
        part = source.gather(np.arange(start, min(start + chunk, len(source))))
        for name, values in part.items():
            if not start:
                arrays[name] = np.empty((len(source), *values.shape[1:]), values.dtype)
            arrays[name][start : start + len(values)] = values
    return Arrays(arrays)


def _stacked(name: str, values: Sequence[Any]) -> np.ndarray:
    shapes = {np.shape(value) for value in values}
    if len(shapes) > 1:
        few = ", ".join(map(str, sorted(shapes)[:3]))
        raise ValueError(f"records whose {name!r} differ in shape make no batch: {few}; give a transform to one shape")
    return np.stack(values)
