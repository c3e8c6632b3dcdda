"""The values of a feature in training, their counts, and their ids."""

from typing import NamedTuple

import numpy as np

from experiments.data.criteo.columns import FIRST, MISSING, RARE

_LOW = np.uint64(0xFFFFFFFF)
_SMALL = 1 << 18  # entries: below that, merging costs more than waiting


def tally(keys: np.ndarray) -> np.ndarray:
    """Keys and their counts: uint64, the key in the high half, the count in the low one, ascending."""
    values, counts = np.unique(keys, return_counts=True)
    return values.astype(np.uint64) << np.uint64(32) | counts.astype(np.uint64)


def merged(tallies: list[np.ndarray]) -> np.ndarray:
    """The tally of all."""
    entries = np.concatenate(tallies)
    entries.sort()
    if not len(entries):
        return entries
    keys = entries >> np.uint64(32)
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts] << np.uint64(32) | np.add.reduceat(entries & _LOW, starts)


class Count:
    """The tally of one feature, accumulated block by block.

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
      keys: `(n,)`, uint32: those of the ids from `FIRST` on. The most frequent value comes first, of equally frequent
        ones the one with the smallest key.
      tables: where to look for a key, one after the other.
    """

    keys: np.ndarray
    tables: list["_Table"]

    @property
    def size(self) -> int:
        """Number of ids, with those for rare and for missing values."""
        return FIRST + len(self.keys)


class _Table(NamedTuple):
    """Keys and ids by the hash of the key; keys that share a hash are in the next table, except for one."""

    factor: np.uint32
    shift: np.uint32
    keys: np.ndarray
    ids: np.ndarray

    def slots(self, keys: np.ndarray) -> np.ndarray:
        return keys * self.factor >> self.shift


def vocabulary(total: np.ndarray, minimum_count: int) -> Vocabulary:
    """Vocabulary of the values that occur at least `minimum_count` times."""
    frequent = total[(total & _LOW) >= minimum_count]
    keys, counts = (frequent >> np.uint64(32)).astype(np.uint32), (frequent & _LOW).astype(np.int64)
    keys = keys[np.lexsort((keys, -counts))]
    return Vocabulary(keys, _tables(keys))


def _tables(keys: np.ndarray) -> list[_Table]:
    ids, tables, rng = FIRST + np.arange(len(keys), dtype=np.int32), [], np.random.default_rng(0)
    while len(keys):
        bits = 2 + len(keys).bit_length()  # at most a quarter full
        factor = np.uint32(rng.integers(2**31) * 2 + 1)
        table = _Table(factor, np.uint32(32 - bits), np.zeros(1 << bits, np.uint32), np.zeros(1 << bits, np.int32))
        slots = table.slots(keys)
        table.keys[slots], table.ids[slots] = keys, ids
        lost = table.keys[slots] != keys
        keys, ids = keys[lost], ids[lost]
        tables.append(table)
    return tables


def encode(words: Vocabulary, keys: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """The ids of keys.

    By hashing, since a binary search takes ten times as long.

    Args:
      words: the vocabulary.
      keys: `(n,)`, uint32.
      missing: `(n,)`, bool.

    Returns:
      `(n,)`, int32.
    """
    ids, rest = np.full(len(keys), RARE, np.int32), None
    for table in words.tables:
        slots = table.slots(keys)
        there, found = table.ids[slots], table.keys[slots] == keys  # an empty slot is found by key 0, and holds RARE
        if rest is None:
            np.copyto(ids, there, where=found)
        else:
            ids[rest[found]] = there[found]
        lost = np.flatnonzero(~found & (there != RARE))  # one whose slot is empty is in no later table either
        keys, rest = keys[lost], lost if rest is None else rest[lost]
    ids[missing] = MISSING
    return ids
