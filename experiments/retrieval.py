"""How well embeddings find what belongs together: recall, reciprocal rank, and neighbours kept."""

import numpy as np

from sa_plus_plus.contrib.transformers.retrieval import neighbours_kept

__all__ = ["neighbours_kept", "ranks", "retrieval"]


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
