"""Embeddings by a published encoder as what another network learns from: computed once, and kept in a file."""

import functools
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from experiments.data.sources import Batch, Dataset, Source, in_memory
from experiments.models.sentences import bert_of, directory, embed, params_of
from experiments.utils import files
from sa_plus_plus.files import write_atomically

BATCH = 64
_STEP = 16  # tokens


class WithTarget:
    """A source whose examples also have `target`, a row of an array that is made when it is first needed.

    Args:
      source: the examples.
      make: `make() -> (len(source), width)`.
      width: of a row.
    """

    def __init__(self, source: Source, make: Callable[[], np.ndarray], width: int) -> None:
        self.in_memory, self.draws = source.in_memory, source.draws
        self._source, self._make, self._width = source, make, width

    def __len__(self) -> int:
        return len(self._source)

    @functools.cached_property
    def _target(self) -> np.ndarray:
        return self._make()

    def gather(self, rows: np.ndarray, random: np.ndarray | None = None) -> Batch:
        """As `Source.gather`."""
        return self._source.gather(rows, random) | {"target": np.asarray(self._target[rows], np.float32)}


def with_targets(dataset: Dataset, model: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Dataset:
    """A data set of sentences, each with its embedding by the published encoder.

    Args:
      dataset: with `tokens` and `real`, as `data.sentences` makes it.
      model: the directory of the encoder; "" for the one in the package.
      folder: where the embeddings are kept, by the text's and the weights' checksum; made where it is not there.
    """
    width = bert_of(model).width

    def part(source: Source) -> WithTarget:
        return WithTarget(source, lambda: embeddings(source, model, pathlib.Path(folder).expanduser()), width)

    return dataset._replace(train=part(dataset.train), test=part(dataset.test))


def embeddings(source: Source, model: str | os.PathLike[str], folder: pathlib.Path) -> np.ndarray:
    """The published encoder's embeddings `(len(source), width)` float32 of all sentences, read if they are there."""
    arrays = in_memory(source).arrays
    digest = hashlib.sha256(files.sha256(directory(model) / "model.safetensors").encode())
    for name in ("tokens", "real"):
        digest.update(f"{arrays[name].shape} ".encode() + arrays[name].tobytes())
    path = folder / f"{digest.hexdigest()[:24]}.npy"
    if not path.exists():
        logging.info("%s: embedding %s sentences once", path, f"{len(source):,}")
        found = _computed(model, arrays)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.save(file, found))
    return np.load(path, mmap_mode="r")


def _computed(model: str | os.PathLike[str], arrays: Batch) -> np.ndarray:
    bert = bert_of(model)
    params: Any = jax.device_put(params_of(model, bert))
    embedded = jax.jit(functools.partial(embed, bert))
    return in_batches(functools.partial(embedded, params), arrays["tokens"], arrays["real"])


def in_batches(run: Callable[..., Any], tokens: np.ndarray, real: np.ndarray, batch: int = BATCH) -> np.ndarray:
    """`run(tokens, real)` of any number of sentences, those of similar length together, without most of the padding.

    Lengths are rounded up to multiples of 16, so that `run` sees few shapes. The last batch of a length is filled up
    with its first sentence.

    Args:
      run: of a batch, `(batch, width)`; padding must not change it.
      tokens: `(n, length)`, at least one.
      real: `(n,)`, how many of the tokens are not padding.
      batch: sentences at a time.
    """
    lengths = np.minimum(-(-np.maximum(real, 1) // _STEP) * _STEP, tokens.shape[1])
    found: np.ndarray | None = None
    for length in np.unique(lengths):
        of_length = np.flatnonzero(lengths == length)
        for start in range(0, len(of_length), batch):
            rows = of_length[start : start + batch]
            filled = np.r_[rows, np.full(batch - len(rows), rows[0])]
            result = np.asarray(run(tokens[filled, :length], real[filled]))[: len(rows)]
            if found is None:
                found = np.empty((len(tokens), *result.shape[1:]), result.dtype)
            found[rows] = result
    assert found is not None  # there is at least one sentence
    return found
