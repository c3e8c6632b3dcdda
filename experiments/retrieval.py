"""How well embeddings find what belongs together: recall, reciprocal rank, and neighbours kept."""

import numpy as np


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


def neighbours_kept(before: np.ndarray, after: np.ndarray, k: int = 10) -> float:
    """The mean share of each row's `k` nearest other rows by cosine that stay among its `k` nearest.

    Args:
      before: `(n, width)`, of length 1.
      after: `(n, other width)`, of length 1.
      k: fewer than `n`.

    Raises:
      ValueError: if there are not more than `k` rows.
    """
    if len(before) <= k:
        raise ValueError(f"{len(before)} rows have no {k} nearest others each: give more, or a smaller k")
    near = [_nearest(np.asarray(x, np.float32), k) for x in (before, after)]
    return float(np.mean([len({*a} & {*b}) / k for a, b in zip(*near, strict=True)]))


def _nearest(x: np.ndarray, k: int) -> np.ndarray:
    scores = x @ x.T
    np.fill_diagonal(scores, -np.inf)
    return np.argpartition(-scores, k - 1, axis=1)[:, :k]
