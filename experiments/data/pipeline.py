"""Batches of a source: endless shuffled ones for training, every example once for evaluation.

The order depends only on the number of examples, the seed and the step, not on the source, the number of hosts or the
number of worker processes: a run resumed on other hosts continues as it would have, and a data set gives the same
batches from disk as from memory. Prefetching, by threads or processes, is done by grain.
"""

import atexit
import math
import weakref
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from experiments.data.shuffle import LazyPermutation, permutation
from experiments.data.sources import Batch, Source

_ENDLESS = 2**62  # steps; grain wants a length
_BATCHES_AHEAD = 2  # the records of each are read by several threads at once


class TrainIterator(grain.DatasetIterator[Batch]):
    """Endless batches with a state; made by `train_iterator`.

    A grain iterator, so that checkpointing made for these takes it too. Nothing is read before the first batch is
    asked for. To be closed where there are worker processes; the end of the program does so too.
    """

    def __init__(self, batches: "_Shuffled", workers: int) -> None:
        super().__init__()
        self._batches, self._workers = batches, workers
        self._step = 0
        self._skipped = 0
        self._reader: grain.DatasetIterator[Batch] | None = None

    def __next__(self) -> Batch:
        self._assert_not_closed()
        if self._batches.source.in_memory:  # there is nothing to do ahead of time
            batch = self._batches[self._step]
        else:
            if self._reader is None:
                self._reader = iter(_ahead(self._batches, self._workers, self._step))
                _reading.add(self)
            batch = next(self._reader)
        self._step += 1
        if "weight" in batch:
            self._skipped += int(np.sum(batch["weight"] == 0))
        return batch

    @property
    def skipped(self) -> int:
        """How many of the examples so far had weight 0: they could not be decoded. On this host."""
        return self._skipped

    def get_state(self) -> dict[str, int]:
        """The state for `set_state`, as JSON; the same on all hosts, except for what each skipped."""
        return {"step": self._step, "skipped": self._skipped, **self._batches.identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of another iterator.

        Args:
          state: of an iterator over as many examples, with the same batch size and seed; hosts and workers may differ.

        Raises:
          ValueError: if it is the state of another stream.
        """
        expected = self._batches.identity()
        found = {name: state.get(name) for name in expected}
        if found != expected:
            raise ValueError(f"the state belongs to a stream with {found}, this one has {expected}")
        self._stop()
        self._step, self._skipped = int(state["step"]), int(state["skipped"])

    def close(self) -> None:
        """Stop prefetching; no more batches can be read."""
        self._stop()
        super().close()

    def __str__(self) -> str:
        return f"TrainIterator(step={self._step})"

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


_reading: weakref.WeakSet[TrainIterator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop all iterators at exit: grain's processes and shared memory outlive the modules needed to stop them."""
    for iterator in list(_reading):
        iterator.close()


def train_iterator(
    source: Source, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1, workers: int = 0
) -> TrainIterator:
    """Endless shuffled batches: each epoch has its own permutation, drawn from `(seed, epoch)`.

    A batch may span two epochs; every example is seen once an epoch, by all hosts together.

    Args:
      source: the examples.
      batch_size: of all hosts together; each gets an equal part.
      seed: of the order.
      process_index: this host, which gets rows `[process_index * b, (process_index + 1) * b)` of the global batch,
        where `b = batch_size / process_count`.
      process_count: number of hosts. The global batches do not depend on it.
      workers: processes that read and decode ahead; with 0, threads of this one do. A program with workers needs an
        `if __name__ == "__main__"` guard, since they import it. In-memory sources need neither and use neither.

    Returns:
      An iterator with `get_state()` and `set_state(state)`.

    Raises:
      ValueError: if the batch is larger than the source, or cannot be dealt out to the hosts evenly.
    """
    if not 0 < batch_size <= len(source):
        raise ValueError(f"batch_size must be between 1 and the {len(source)} training examples, got {batch_size}")
    share = _share(batch_size, process_index, process_count)
    return TrainIterator(_Shuffled(source, batch_size, int(seed), share), workers)


def eval_batches(
    source: Source, batch_size: int, process_index: int = 0, process_count: int = 1, workers: int = 0
) -> grain.IterDataset[Batch]:
    """Every example once over all hosts, in order, in equal batches, the same number on each host.

    Args:
      source: the examples.
      batch_size: of all hosts together.
      process_index: this host.
      process_count: number of hosts.
      workers: as in `train_iterator`.

    Returns:
      An iterable, to be run through as often as wanted, of batches with `weight`: 1 for an example, 0 for the copies
      of the last example that pad the last batch, and for examples that have no weight of their own.

    Raises:
      ValueError: if the batch is empty or cannot be dealt out to the hosts evenly.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size of the evaluation must be at least 1, got {batch_size}")
    return _ahead(_Padded(source, batch_size, _share(batch_size, process_index, process_count)), workers)


class _Shuffled:
    """This host's part of the batch of every step, as a random-access source for grain."""

    def __init__(self, source: Source, batch_size: int, seed: int, share: range) -> None:
        self.source, self.batch_size, self.seed, self.share = source, batch_size, seed, share
        self._orders: dict[
            int, np.ndarray | LazyPermutation
        ] = {}  # orders of the last two epochs: they take time to make

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> Batch:
        position = step * self.batch_size + self.share.start
        stop = step * self.batch_size + self.share.stop
        parts = []
        while position < stop:
            epoch, offset = divmod(position, len(self.source))
            parts.append(self._order(epoch)[offset : offset + stop - position])
            position += len(parts[-1])
        rows = np.concatenate(parts)
        if not self.source.draws:
            return self.source.gather(rows)
        # Drawn for the global batch, so that they do not depend on the number of hosts.
        random = np.random.default_rng((self.seed, step, 1)).random((self.batch_size, self.source.draws), np.float32)
        return self.source.gather(rows, random[self.share.start : self.share.stop])

    def identity(self) -> dict[str, int]:
        """Everything that determines the global batches, except the examples themselves."""
        return {"examples": len(self.source), "batch_size": self.batch_size, "seed": self.seed}

    def _order(self, epoch: int) -> np.ndarray | LazyPermutation:
        orders = self._orders
        if epoch not in orders:
            order = permutation(len(self.source), (self.seed, epoch))
            # A new dictionary, since other threads may be looking into the old one.
            orders = self._orders = {**dict(list(orders.items())[-1:]), epoch: order}
        return orders[epoch]


class _Padded:
    """This host's part of every batch of the evaluation, as a random-access source for grain."""

    def __init__(self, source: Source, batch_size: int, share: range) -> None:
        self.source, self.batch_size, self.share = source, batch_size, share

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        rows = number * self.batch_size + np.arange(self.share.start, self.share.stop)
        batch = self.source.gather(np.minimum(rows, len(self.source) - 1))
        real = (rows < len(self.source)).astype(np.float32)
        return batch | {"weight": real * batch.get("weight", 1)}


def _share(batch_size: int, process_index: int, process_count: int) -> range:
    """This host's rows of a global batch."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be between 0 and {process_count - 1}, got {process_index}")
    if batch_size % process_count:
        raise ValueError(f"a batch size of {batch_size} cannot be dealt out evenly to {process_count} processes")
    size = batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def _ahead(batches: "_Shuffled | _Padded", workers: int, start: int = 0) -> grain.IterDataset[Batch]:
    """The batches from `start` on, prefetched if preparing them takes longer than passing them on."""
    chosen = grain.MapDataset.source(batches).slice(slice(start, None))
    if batches.source.in_memory:
        return chosen.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers == 0:
        return chosen.to_iter_dataset(
            grain.ReadOptions(num_threads=_BATCHES_AHEAD, prefetch_buffer_size=_BATCHES_AHEAD)
        )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its own flags before it starts processes
    one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return chosen.to_iter_dataset(one_thread).mp_prefetch(options)
