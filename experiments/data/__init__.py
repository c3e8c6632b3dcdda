"""Data sets and batches. `experiments.data.catalog` has the data sets that a config can name."""

from experiments.data.pipeline import TrainIterator, eval_batches, train_iterator
from experiments.data.published import declared
from experiments.data.sources import Arrays, Batch, Dataset, Records, Source

__all__ = [
    "Arrays",
    "Batch",
    "Dataset",
    "Records",
    "Source",
    "TrainIterator",
    "declared",
    "eval_batches",
    "train_iterator",
]
