"""How well embeddings keep what is near what."""

import numpy as np


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
