"""Sizes and shapes of published data sets, for planning a run without the data."""

import numpy as np

from experiments.data.sources import Batch, Dataset

# Training and test examples, classes, side of an image (None: option `size`), channels.
_PUBLISHED = {
    "mnist": (60_000, 10_000, 10, 28, 1),
    "fashion_mnist": (60_000, 10_000, 10, 28, 1),
    "cifar10": (50_000, 10_000, 10, 32, 3),
    "imagenet": (1_281_167, 50_000, 1000, None, 3),
    "imagenette": (9_469, 3_925, 10, None, 3),
}


_CRITEO = (33_005_244, 8_251_311, (4,) * 39)  # the sizes of its vocabularies depend on how it is prepared


class Blank:
    """A number of examples of zeros, all of class 0."""

    in_memory = True
    draws = 0

    def __init__(self, examples: int, name: str, shape: tuple[int, ...], dtype: type) -> None:
        self._examples, self._name, self._shape, self._dtype = examples, name, shape, dtype

    def __len__(self) -> int:
        return self._examples

    def gather(self, rows: np.ndarray, random: np.ndarray | None = None) -> Batch:
        values: np.ndarray = np.zeros((len(rows), *self._shape), self._dtype)
        return {self._name: values, "label": np.zeros(len(rows), np.int32)}


def declared(name: str, size: int | None = None) -> Dataset | None:
    """A data set's numbers and shapes, with blank examples.

    Args:
      name: as in a config.
      size: of its images in pixels squared, where that is an option.

    Returns:
      None for a data set that is not published under that name.
    """
    if name == "criteo":
        train, test, vocabulary = _CRITEO
        to_train, to_test = (Blank(n, "ids", (len(vocabulary),), np.int32) for n in (train, test))
        return Dataset(to_train, to_test, 2, vocabulary)
    if name not in _PUBLISHED:
        return None
    train, test, classes, side, channels = _PUBLISHED[name]
    side = side or size or 224
    to_train, to_test = (Blank(n, "image", (side, side, channels), np.uint8) for n in (train, test))
    return Dataset(to_train, to_test, classes)
