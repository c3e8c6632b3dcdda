"""What a campaign's networks are worth: retrieval with their embeddings."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments import retrieval
from experiments.models import sentences
from experiments.utils import files

Run = Callable[[np.ndarray, np.ndarray], Any]  # of tokens, and how many are not padding


class Judge:
    """Measures encoders on the same pairs, each once: what it finds is kept in a file.

    Args:
      pairs: as `data.sentences.pairs_of` gives them.
      limit: how many of them, 0 for all.
      model: directory of the published encoder; "" for the one in the package.
    """

    def __init__(self, pairs: tuple[list[str], list[str]], limit: int, model: str) -> None:
        self.encoder = sentences.load(model)
        self.pairs = retrieval.tokenized(self.encoder, pairs, limit)
        self._about = hashlib.sha256(json.dumps([pairs, limit]).encode()).hexdigest()[:16]

    @functools.cached_property
    def published(self) -> retrieval.Embedded:
        """The published encoder's embeddings."""
        return retrieval.embedded(retrieval.runner(self.encoder.model, self.encoder.params), self.pairs)

    def __call__(self, file: pathlib.Path, make: Callable[[], Run]) -> dict[str, float]:
        """The measures of what `make()` returns, unless the file has them."""
        try:
            kept = json.loads(file.read_text())
            if kept["pairs"] == self._about:
                return dict(kept["quality"])
        except (OSError, ValueError, LookupError, TypeError):
            pass  # not measured yet, or on other pairs
        found = retrieval.quality(retrieval.embedded(make(), self.pairs), self.published)
        files.write_json(file, {"pairs": self._about, "quality": found})
        return found
