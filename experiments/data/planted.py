"""Click data with a known answer: shaped like Criteo's, but with planted relevant features.

A teacher network of the experiment's shape draws the clicks: embeddings of each feature's values, a first layer whose
blocks are zero except on the rows of a few features, ReLU, a logit. A student that prunes its first layer should keep
blocks on those rows. No more than that is identifiable: the order of the hidden units, and a rotation within a
feature's embedding, do not change the function, so the planted columns cannot be inferred from the data.
"""

from typing import NamedTuple

import numpy as np

from experiments.data.sources import Arrays, Dataset
from sa_plus_plus.checks import occupied

FEATURES, SIZE, HIDDEN = 39, 10, 400
_CHUNK = 65_536  # rows at a time
_DECAY = 0.8  # strength of a feature that matters, to that of the next stronger


class Teacher(NamedTuple):
    """The network that draws the clicks.

    Attributes:
      features: numbers of those that matter.
      tables: by feature, embeddings `(categories, 10)`.
      kernel: first layer, `(390, 400)`.
      readout: `(400,)`.
      scale: what its output is multiplied by to be a logit.
      bias: what is added then.
    """

    features: np.ndarray
    tables: tuple[np.ndarray, ...]
    kernel: np.ndarray
    readout: np.ndarray
    scale: float
    bias: float


def planted(
    rows: int = 1_000_000,
    held_out: int = 100_000,
    informative: int = 12,
    categories: int = 200,
    click_rate: float = 0.25,
    strength: float = 2.0,
    seed: int = 0,
) -> Dataset:
    """Rows of categories, Zipf-distributed with some missing, and clicks.

    Args:
      rows: of the training set.
      held_out: rows of the test set.
      informative: features that the clicks depend on, of 39.
      categories: how many values each feature has; value 0 is "missing", in 0 to 40% of the rows of a feature.
      click_rate: share of clicks, about.
      strength: standard deviation of the true logits.
      seed: of everything.

    Returns:
      `ids` `(39,)` int32 and `label` uint8.

    Raises:
      ValueError: if an argument is out of range.
    """
    if not 1 <= informative <= FEATURES or categories < 2 or not 0 < click_rate < 1:
        raise ValueError(
            f"informative must be in [1, {FEATURES}], categories at least 2 and click_rate in (0, 1): "
            f"got {informative}, {categories}, {click_rate}"
        )
    ids = _ids(rows + held_out, categories, seed, stream=0)
    network = teacher(informative, categories, click_rate, strength, seed)
    logits = true_logits(network, ids)
    chance = np.random.default_rng((seed, 2)).random(len(ids))
    label = (chance < 1 / (1 + np.exp(-logits))).astype(np.uint8)
    train, test = ({"ids": ids[part], "label": label[part]} for part in (slice(rows), slice(rows, None)))
    return Dataset(Arrays(train), Arrays(test), 2, (categories,) * FEATURES)


def teacher(
    informative: int = 12, categories: int = 200, click_rate: float = 0.25, strength: float = 2.0, seed: int = 0
) -> Teacher:
    """The network behind `planted` with the same arguments."""
    rng = np.random.default_rng((seed, 1))
    features = np.sort(rng.choice(FEATURES, informative, replace=False))
    tables = tuple(rng.normal(size=(categories, SIZE)).astype(np.float32) for _ in range(FEATURES))
    kernel = np.zeros((FEATURES * SIZE, HIDDEN), np.float32)
    for rank, feature in enumerate(rng.permutation(features)):
        # Each feature reaches a quarter of the units, block by block of ten, and less strongly than the one before.
        units = np.repeat(rng.random(HIDDEN // SIZE) < 0.25, SIZE)
        rows = slice(feature * SIZE, (feature + 1) * SIZE)
        kernel[rows] = _DECAY**rank * units * rng.normal(size=(SIZE, HIDDEN)) / np.sqrt(SIZE)
    readout = (rng.normal(size=HIDDEN) / np.sqrt(HIDDEN)).astype(np.float32)
    plain = Teacher(features, tables, kernel, readout, 1.0, 0.0)
    sample = _logits(plain, _ids(20_000, categories, seed, stream=3))
    scale = strength / float(sample.std())
    # The bias that gives the click rate on the sample: the rate grows with it, so by bisection.
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        rate = np.mean(1 / (1 + np.exp(-(scale * (sample - sample.mean()) + middle))))
        low, high = (middle, high) if rate < click_rate else (low, middle)
    return plain._replace(scale=scale, bias=low - scale * float(sample.mean()))


def true_logits(network: Teacher, ids: np.ndarray) -> np.ndarray:
    """Logits of rows `(rows, 39)` by the teacher: an upper bound for every student."""
    return np.concatenate([_logits(network, part) for part in np.split(ids, range(_CHUNK, len(ids), _CHUNK))])


def found_and_covered(kernel: np.ndarray, block: int, features: np.ndarray) -> tuple[float, float, float]:
    """Share of kept blocks on informative rows, share of informative features kept, and the chance level of the former.

    A block is on informative rows where any of its rows belongs to a feature that matters.

    Args:
      kernel: a pruned first layer, `(390, units)`.
      block: side of its blocks.
      features: numbers of those that matter.
    """
    kept = occupied(kernel, (block, block))
    rows = np.arange(kept.shape[0] * block).reshape(-1, block)
    owners = np.minimum(rows // SIZE, kernel.shape[0] // SIZE - 1)
    informative = np.isin(owners, features).any(axis=1)
    covered = [bool(kept[(owners == feature).any(axis=1)].any()) for feature in features]
    return float(kept[informative].sum() / max(kept.sum(), 1)), float(np.mean(covered)), float(informative.mean())


def _ids(rows: int, categories: int, seed: int, stream: int) -> np.ndarray:
    """Zipf's law within each feature, in an order of its own, with exponents from 0.8 to 1.4."""
    law, rng = np.random.default_rng((seed, 4)), np.random.default_rng((seed, stream))
    ids = np.empty((rows, FEATURES), np.int32)
    for feature in range(FEATURES):
        exponent, missing = law.uniform(0.8, 1.4), law.uniform(0, 0.4)
        weights = np.arange(1, categories, dtype=float) ** -exponent
        shares = np.concatenate([[missing], (1 - missing) * law.permutation(weights / weights.sum())])
        steps = np.cumsum(shares)
        ids[:, feature] = np.searchsorted(steps[:-1], rng.random(rows, np.float32), side="right")
    return ids


def _logits(network: Teacher, ids: np.ndarray) -> np.ndarray:
    hidden = np.zeros((len(ids), HIDDEN), np.float32)
    for feature in network.features:
        rows = slice(feature * SIZE, (feature + 1) * SIZE)
        hidden += (network.tables[feature] @ network.kernel[rows])[ids[:, feature]]
    return network.scale * (np.maximum(hidden, 0) @ network.readout) + network.bias
