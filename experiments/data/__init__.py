"""Data sets. The name in a config is the name of a function here that returns a `Dataset`."""

from experiments.data.arrays import Dataset, batches, padded_batches
from experiments.data.mnist import mnist5k

__all__ = ["Dataset", "batches", "mnist5k", "padded_batches"]
