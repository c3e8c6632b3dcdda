"""Random permutations of many examples, any part of which can be computed without the rest."""

import math

import numpy as np

_ROUNDS = 8  # four already pass for random to who sees few of the numbers; here all are seen


class LazyPermutation:
    """A random permutation of the numbers below `n`, computed where it is accessed.

    A Feistel network: with every number written as a pair of digits below about √n, each round adds to one digit a
    random function of the other, which can be undone, whatever the function. The functions are tables of √n random
    numbers. Pairs stand for slightly more than `n` numbers; those from `n` on are sent through again until they are
    not, which leaves a permutation of the others.

    Memory and the time to begin are of the order of √n; each number costs some 30 ns.

    Args:
      n: how many numbers, at least 1.
      seed: what the permutation is drawn from, as `np.random.default_rng` takes it.
    """

    def __init__(self, n: int, seed: int | tuple[int, ...]) -> None:
        self._n = n
        self._high = math.isqrt(n - 1) + 1
        self._low = -(-n // self._high)
        rng = np.random.default_rng(seed)
        self._tables = [
            rng.integers((self._high, self._low)[i % 2], size=(self._low, self._high)[i % 2]) for i in range(_ROUNDS)
        ]

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, positions: slice) -> np.ndarray:
        """The numbers at consecutive positions, int64."""
        numbers = self._sent_through(np.arange(*positions.indices(self._n)))
        while len(outside := np.flatnonzero(numbers >= self._n)):
            numbers[outside] = self._sent_through(numbers[outside])
        return numbers

    def _sent_through(self, numbers: np.ndarray) -> np.ndarray:
        high, low = np.divmod(numbers, self._low)
        for i, table in enumerate(self._tables):
            if i % 2:
                low += table[high]
                low -= self._low * (low >= self._low)
            else:
                high += table[low]
                high -= self._high * (high >= self._high)
        return high * self._low + low


def permutation(n: int, seed: int | tuple[int, ...], at_once: int = 1 << 22) -> np.ndarray | LazyPermutation:
    """A random permutation of the numbers below `n`, to be sliced.

    Args:
      n: how many numbers.
      seed: as `np.random.default_rng` takes it; with `n` it determines the permutation.
      at_once: up to this `n` the permutation is an array, quick to make and to keep; beyond, it is computed lazily: for
        33 million an array takes seconds and 264 MB.
    """
    return np.random.default_rng(seed).permutation(n) if n <= at_once else LazyPermutation(n, seed)
