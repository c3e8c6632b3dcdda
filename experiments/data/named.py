"""Data sets by their own name, from TFDS or from local files."""

from experiments.data.from_files import cifar10_tar, idx_files
from experiments.data.from_tfds import tfds
from experiments.data.sources import Dataset


def mnist(local: str = "", data_dir: str = "", download: bool = False) -> Dataset:
    """MNIST: 60,000 + 10,000 grey images 28 x 28 of 10 digits.

    Args:
      local: directory with the four files that it was published as; "" for TFDS.
      data_dir: where TFDS keeps its data; "" for its own default.
      download: whether TFDS may download it.
    """
    return idx_files(local) if local else _from_tfds("mnist", data_dir, download)


def fashion_mnist(local: str = "", data_dir: str = "", download: bool = False) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey images 28 x 28 of 10 kinds of clothing. Arguments as of `mnist`."""
    return idx_files(local) if local else _from_tfds("fashion_mnist", data_dir, download)


def cifar10(local: str = "", data_dir: str = "", download: bool = False) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images 32 x 32 of 10 classes.

    Args:
      local: tar file of `train/<class>/<name>` and `test/<class>/<name>`; "" for TFDS.
      data_dir: where TFDS keeps its data; "" for its own default.
      download: whether TFDS may download it.
    """
    return cifar10_tar(local) if local else _from_tfds("cifar10", data_dir, download)


def _from_tfds(name: str, data_dir: str, download: bool) -> Dataset:
    try:
        return tfds(name, data_dir, download=download)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}\nOr have local files read: `local`, config.data.local in a config") from error
