"""Which values a feature has in training, how often, and the ids they get."""

from typing import NamedTuple

import numpy as np

from experiments.data.criteo.columns import FIRST, MISSING, RARE

_LOW = np.uint64(0xFFFFFFFF)
_SMALL = 1 << 18  # entries: below that, merging costs more than waiting


def tally(keys: np.ndarray) -> np.ndarray:
    """Keys and how often each occurs: uint64, the key in the high half, the count in the low one, ascending."""
    values, counts = np.unique(keys, return_counts=True)
    return values.astype(np.uint64) << np.uint64(32) | counts.astype(np.uint64)


def merged(tallies: list[np.ndarray]) -> np.ndarray:
    """The tally of all."""
    entries = np.sort(np.concatenate(tallies))
    if not len(entries):
        return entries
    keys = entries >> np.uint64(32)
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts] << np.uint64(32) | np.add.reduceat(entries & _LOW, starts)


class Count:
    """The tally of one feature, from one block after another.

    Blocks wait until they have as many entries as the tally of those before: so each entry is merged a few times only.
    """

    def __init__(self) -> None:
        self._tallies = [np.empty(0, np.uint64)]
        self._waiting = 0

    def add(self, tally: np.ndarray) -> None:
        self._tallies.append(tally)
        self._waiting += len(tally)
        if self._waiting > max(len(self._tallies[0]), _SMALL):
            self.total()

    def total(self) -> np.ndarray:
        if self._waiting:
            self._tallies, self._waiting = [merged(self._tallies)], 0
        return self._tallies[0]


class Vocabulary(NamedTuple):
    """The ids of a feature's values.

    Attributes:
      keys: `(n,)`, uint32, ascending.
      ids: `(n,)`, int32, theirs: from `FIRST` on, the most frequent value first, of equally frequent ones the one with
        the smallest key.
    """

    keys: np.ndarray
    ids: np.ndarray

    @property
    def size(self) -> int:
        """Number of ids, with those for rare and for missing values."""
        return FIRST + len(self.keys)

    @property
    def by_id(self) -> np.ndarray:
        """`(n,)`, uint32: the keys of the ids from `FIRST` on."""
        return self.keys[np.argsort(self.ids)]


def vocabulary(total: np.ndarray, minimum_count: int) -> Vocabulary:
    """Of the values that a tally has at least so often."""
    frequent = total[(total & _LOW) >= minimum_count]
    keys, counts = (frequent >> np.uint64(32)).astype(np.uint32), (frequent & _LOW).astype(np.int64)
    ids = np.empty(len(keys), np.int32)
    ids[np.lexsort((keys, -counts))] = FIRST + np.arange(len(keys), dtype=np.int32)
    return Vocabulary(keys, ids)


def encode(words: Vocabulary, keys: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """`(n,)`, int32: the ids of keys."""
    if len(words.keys):
        place = np.minimum(np.searchsorted(words.keys, keys), len(words.keys) - 1)
        ids = np.where(words.keys[place] == keys, words.ids[place], np.int32(RARE))
    else:
        ids = np.full(len(keys), RARE, np.int32)
    ids[missing] = MISSING
    return ids
