"""How well embeddings find what belongs together: recall, reciprocal rank, and neighbours kept."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments import tasks
from experiments.data.sentences import tokenize
from experiments.models import sentences
from experiments.models.published_embeddings import in_batches
from experiments.outputs import workdir
from experiments.training import weights
from sa_plus_plus.contrib.transformers.retrieval import neighbours_kept

QUERY, TEXT = 32, 128  # tokens


class Pairs(NamedTuple):
    """Queries and texts as `tokenize` gives them; text `i` belongs to query `i`."""

    queries: dict[str, np.ndarray]
    texts: dict[str, np.ndarray]


class Embedded(NamedTuple):
    """The pairs' embeddings, `(pairs, width)` each, of length 1."""

    queries: np.ndarray
    texts: np.ndarray


def ranks(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The rank of each query's own document among all, from 1, by cosine; equals count as before it.

    Args:
      queries: `(n, width)`, of length 1.
      documents: `(n, width)`, of length 1; document `i` belongs to query `i`.

    Returns:
      `(n,)` int.
    """
    scores = np.asarray(queries, np.float32) @ np.asarray(documents, np.float32).T
    own = np.diagonal(scores)[:, None]
    return np.count_nonzero(scores >= own, 1)  # itself counts as one


def retrieval(queries: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    """Recall at 1 and at 10, and the mean reciprocal rank. Arguments as for `ranks`."""
    rank = ranks(queries, documents)
    return {
        "recall@1": float(np.mean(rank <= 1)),
        "recall@10": float(np.mean(rank <= 10)),
        "mrr": float(np.mean(1 / rank)),
    }


def tokenized(encoder: sentences.SentenceEncoder, pairs: tuple[list[str], list[str]], limit: int = 0) -> Pairs:
    """Pairs as tokens: queries cut to `QUERY`, texts to `TEXT`, or to what the encoder takes if that is less.

    Args:
      encoder: whose tokenizer it is.
      pairs: as `data.sentences.pairs_of` gives them.
      limit: take the first so many; 0 for all.
    """
    lengths = (min(length, encoder.model.context) for length in (QUERY, TEXT))
    columns = (column[: limit or None] for column in pairs)
    return Pairs(*(tokenize(encoder.tokenizer, column, n) for column, n in zip(columns, lengths, strict=True)))


def embedded(run: Callable[[np.ndarray, np.ndarray], Any], pairs: Pairs) -> Embedded:
    """All pairs' embeddings; `run(tokens, real)` gives those of a batch."""
    return Embedded(*(in_batches(run, part["tokens"], part["real"]) for part in pairs))


def quality(ours: Embedded, published: Embedded) -> dict[str, float]:
    """The measures of a table's row."""
    cosine = float(np.mean(np.sum(ours.queries * published.queries, -1)))
    kept = neighbours_kept(published.queries, ours.queries)
    return {"cosine": cosine, "neighbours": kept, **retrieval(*ours)}


def runner(model: Any, params: Any) -> Callable[[np.ndarray, np.ndarray], Any]:
    """`run(tokens, real)`, the embeddings of a batch by an encoder."""
    return functools.partial(_embed(model), jax.device_put(params))


@functools.lru_cache(maxsize=8)
def _embed(model: Any) -> Any:
    """Compiled once for all networks of the same sizes."""
    return jax.jit(functools.partial(sentences.embed, model))


def of_run(path: pathlib.Path, folder: str = "") -> tuple[Any, Any]:
    """The model and the parameters that a run has left.

    Args:
      path: its directory.
      folder: of the published encoder that it began with; "" for the one in the package.

    Raises:
      ValueError: if there is no finished run, or it is one of another task.
    """
    if workdir.result_of(path) is None:
        raise ValueError(f"{path} holds no finished run")
    config = ml_collections.ConfigDict(json.loads((path / workdir.CONFIG).read_text()))
    if config.task != tasks.sentence_embedding.__name__:
        raise ValueError(
            f"{path} holds a run of the task {config.task!r}, not of {tasks.sentence_embedding.__name__!r}"
        )
    model = sentences.bert_of(folder or config.data.options.get("model", ""), **config.model_options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return model, weights.read(str(path), shapes, {}, "--runs").params
