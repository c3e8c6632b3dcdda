"""Sources of examples: one interface for arrays in memory and for records that are read one by one."""

import concurrent.futures
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Examples with random access.

    Attributes:
      in_memory: whether gathering is but copying, so that nothing is won by doing it ahead of time.
      draws: how many random numbers it takes to vary an example; 0 where examples are not varied.
    """

    in_memory: bool
    draws: int

    def __len__(self) -> int:
        """Number of examples."""

    def gather(self, rows: np.ndarray, random: np.ndarray | None = None) -> Batch:
        """The examples of these numbers, in this order, along the first axis of each array.

        Args:
          rows: their numbers.
          random: `(len(rows), draws)`, uniform in [0, 1): how each is varied; None for not at all.
        """


class Arrays:
    """Examples in memory, along the first axis of arrays that become read-only.

    Args:
      arrays: by name, all of one length.
      vary: `vary(batch, random) -> batch`: the batch, each example varied by its row of `random`.
      draws: the columns of `random`.

    Raises:
      ValueError: if their lengths differ, or there are none.
    """

    in_memory = True

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        vary: Callable[[Batch, np.ndarray], Batch] | None = None,
        draws: int = 0,
    ) -> None:
        self.vary, self.draws = vary, draws
        lengths = {name: len(a) for name, a in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays of one data set must have one length, got {lengths}")
        self.arrays = {name: a.view() for name, a in arrays.items()}
        for a in self.arrays.values():
            a.flags.writeable = False  # data sets are shared by all that ask for them

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def gather(self, rows: np.ndarray, random: np.ndarray | None = None) -> Batch:
        batch = {name: np.take(a, rows, axis=0) for name, a in self.arrays.items()}  # half the time of a[rows]
        return batch if self.vary is None or random is None else self.vary(batch, random)


class RandomAccess(Protocol):
    """Records with random access, such as a sequence of mappings."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Mapping[str, Any]: ...


class Records:
    """Examples that are read, and decoded, one by one.

    Args:
      records: mappings from names to values, in any order. Where it has a method `__getitems__`, as the
        data sources of TFDS have, whole batches are asked of that.
      transform: `transform(record)` turns a record into the mapping that is batched; `transform(record, random)` with
        as many numbers as `draws`, or with None, where there are any. Threads call it at the same time.
      draws: how many random numbers it takes.
    """

    in_memory = False

    def __init__(
        self,
        records: RandomAccess,
        transform: Callable[..., Mapping[str, Any]] = dict,
        draws: int = 0,
    ) -> None:
        self.records, self.transform, self.draws = records, transform, draws

    def __len__(self) -> int:
        return len(self.records)

    def gather(self, rows: np.ndarray, random: np.ndarray | None = None) -> Batch:
        """As `Source.gather`, on as many threads as there are cores.

        Raises:
          ValueError: if the records' values differ in shape.
        """
        batch: Batch = {}
        values = self._values(rows[:1], None if random is None else random[:1])
        for name, value in next(iter(values)).items():
            batch[name] = np.empty((len(rows), *np.shape(value)), np.asarray(value).dtype)
            batch[name][0] = value

        def fill(start: int) -> None:
            stop = min(start + _AT_ONCE, len(rows))
            part = None if random is None else random[start:stop]
            for i, example in enumerate(self._values(rows[start:stop], part), start):
                for name, array in batch.items():
                    if np.shape(example[name]) != array.shape[1:]:
                        raise ValueError(
                            f"records whose {name!r} differ in shape make no batch: {array.shape[1:]}, "
                            f"{np.shape(example[name])}; give a transform to one shape"
                        )
                    array[i] = example[name]

        for _ in _pool().map(fill, range(1, len(rows), _AT_ONCE)):
            pass
        return batch

    def _values(self, rows: np.ndarray, random: np.ndarray | None) -> Iterable[Mapping[str, Any]]:
        numbers = rows.tolist()
        read: Iterable[Mapping[str, Any]]
        if hasattr(self.records, "__getitems__"):
            read = self.records.__getitems__(numbers)
        else:
            read = (self.records[i] for i in numbers)
        if not self.draws:
            return map(self.transform, read)
        return map(self.transform, read, [None] * len(rows) if random is None else random)


class Dataset(NamedTuple):
    """The training and test examples of a network.

    Attributes:
      train: examples with, for image classification, `image` `(height, width, channels)`, float32 in [0, 1] or uint8
        as stored (a quarter of the bytes to gather and to send; the device makes them floats), and `label` int32. What
        examples of other kinds have is said where they are made.
      test: held-out examples of the same kind.
      classes: number of classes; for text, of different tokens.
      vocabulary: where examples are rows of categories, `ids` `(features,)`: how many values each feature has.
      columns: where examples are rows of a table, `row` `(features,)`: the features' names.
      files: where the examples were read from, to notice changes; directories stand for all files in them.
    """

    train: Source
    test: Source
    classes: int
    vocabulary: tuple[int, ...] = ()
    columns: tuple[str, ...] = ()
    files: tuple[pathlib.Path, ...] = ()

    @property
    def features(self) -> tuple[str, ...]:
        """Names of an example's values in order: those of the columns, or `row,column,channel` of a pixel."""
        return self.columns or tuple(",".join(map(str, i)) for i in np.ndindex(self.example["image"].shape[1:]))

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
      The same examples as arrays; those that are in memory already are not copied.
    """
    if isinstance(source, Arrays):
        return Arrays(source.arrays)
    arrays: Batch = {}
    for start in range(0, len(source), chunk):
        part = source.gather(np.arange(start, min(start + chunk, len(source))))
        for name, values in part.items():
            if not start:
                arrays[name] = np.empty((len(source), *values.shape[1:]), values.dtype)
            arrays[name][start : start + len(values)] = values
    return Arrays(arrays)


_AT_ONCE = 16  # records to a call: enough that handing them out costs nothing


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
    """This process's threads for reading and decoding."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "records")
