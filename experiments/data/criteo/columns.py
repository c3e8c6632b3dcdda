"""The columns of the data, and all options of their preparation."""

import dataclasses
import math

import numpy as np

NUMERIC = tuple(f"I{i}" for i in range(1, 14))
CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))
FEATURES = NUMERIC + CATEGORICAL
PARTS = ("train", "validation", "test")
RARE, MISSING, FIRST = 0, 1, 2  # ids of every feature: out of vocabulary, no value, the most frequent value


@dataclasses.dataclass(frozen=True)
class Options:
    """How the data are split and converted to ids.

    Attributes:
      train: share of the rows to train on, in (0, 1).
      validation: share of the rows to validate on.
      test: share of the rows to test on; the three sum to 1.
      order: "random", each row by a draw of its own, or "chronological", the first rows for training.
      seed: of the random division, a whole number from 0.
      minimum_count: categorical values seen less often in training share the out-of-vocabulary id of their feature.
      numeric_minimum_count: the same for the buckets of the numeric features.
      threshold: numbers up to this one, negative ones too, are buckets of their own; at least 1.
      base: of the logarithm of larger numbers, above 1.
      exponent: what their logarithm is raised to before it is rounded down, above 0.
      max_malformed: share of the lines that may be malformed and are left out then, in [0, 1).
      strict: whether the first malformed line ends the preparation.

    Raises:
      ValueError: if one of them is out of its range.
    """

    train: float = 0.72
    validation: float = 0.18
    test: float = 0.10
    order: str = "random"
    seed: int = 0
    minimum_count: int = 10
    numeric_minimum_count: int = 1
    threshold: int = 2
    base: float = math.e
    exponent: float = 2.0
    max_malformed: float = 1e-4
    strict: bool = False

    def __post_init__(self) -> None:
        shares = (self.train, self.validation, self.test)
        if not all(0 < share < 1 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-9):
            raise ValueError(f"train, validation and test must be shares above 0 that sum to 1, got {shares}")
        if self.order not in ("random", "chronological"):
            raise ValueError(f"order must be 'random' or 'chronological', got {self.order!r}")
        for name, least in (("seed", 0), ("minimum_count", 1), ("numeric_minimum_count", 1), ("threshold", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, above in (("base", 1), ("exponent", 0)):
            if not above < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above {above}, got {getattr(self, name)}")
        if not 0 <= self.max_malformed < 1:
            raise ValueError(f"max_malformed must be a share in [0, 1), got {self.max_malformed}")


def bucket(numbers: np.ndarray, options: Options) -> np.ndarray:
    """The buckets of numbers, growing with the number.

    Up to the threshold a number is its own bucket. Those above have buckets of their own, from `threshold + 1` on: by
    the logarithm alone 3 and 4 would share a bucket with 1.

    Args:
      numbers: `(n,)`, int32.
      options: threshold, base and exponent.

    Returns:
      `(n,)`, int32.
    """
    buckets = numbers.copy()
    large = np.flatnonzero(numbers > options.threshold)
    logarithm = np.log(numbers[large]) / math.log(options.base)
    first = options.threshold + 1
    buckets[large] = first + np.minimum(np.floor(logarithm**options.exponent), 2**31 - 1 - first)
    return buckets


def parts(first: int, count: int, total: int | None, options: Options) -> np.ndarray:
    """The part of each of consecutive lines: a function of its number alone, however the file is read.

    Args:
      first: number of the first line, from 0.
      count: how many lines.
      total: lines of the file; needed for the chronological order only.
      options: shares, order and seed.

    Returns:
      `(count,)`, uint8, indices into `PARTS`.
    """
    ends = (options.train, options.train + options.validation)
    if options.order == "chronological":
        position = np.arange(first, first + count)
        if total is None:
            raise ValueError("the chronological order needs the number of lines")
        return np.searchsorted([round(end * total) for end in ends], position, "right").astype(np.uint8)
    # Philox can begin at any multiple of four draws.
    draws = np.random.Generator(np.random.Philox(key=options.seed, counter=first // 4)).random(first % 4 + count)
    return np.searchsorted(ends, draws[first % 4 :], "right").astype(np.uint8)
