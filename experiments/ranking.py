"""Area under the ROC curve, exactly, over examples that come in batches."""

import numpy as np

_PENDING = 2**20  # scores that are kept as they came before they are counted


class Auc:
    """The probability that a positive example scores higher than a negative one, ties counting half.

    Scores are counted by value, so that memory grows with the number of different scores and not of examples. The
    counts are integers and the result is exact but for one division.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._scores = np.empty(0)
        self._counts = np.empty((0, 2), np.int64)  # negatives, positives of each score

    def update(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch.

        Args:
          scores: `(batch,)`, finite.
          labels: `(batch,)` of 0 and 1.

        Raises:
          ValueError: if their lengths differ, or a label is neither 0 nor 1.
        """
        if scores.shape != labels.shape or scores.ndim != 1:
            raise ValueError(f"scores {scores.shape} and labels {labels.shape} must be vectors of one length")
        if not np.isin(labels, (0, 1)).all():
            raise ValueError(f"labels must be 0 or 1, got {labels[~np.isin(labels, (0, 1))][0]}")
        self._pending.append((scores.astype(np.float64), labels.astype(bool)))
        if sum(len(scores) for scores, _ in self._pending) > _PENDING:
            self._count()

    def value(self) -> float:
        """The area; NaN where all labels are the same, or a score was NaN."""
        self._count()
        negatives, positives = self._counts.T
        below = np.cumsum(negatives) - negatives
        pairs = negatives.sum() * positives.sum()
        if not pairs or np.isnan(self._scores).any():
            return float("nan")
        return float(np.sum(positives * (2 * below + negatives)) / (2 * pairs))

    def _count(self) -> None:
        """Bring what is pending into the counts."""
        scores = np.concatenate([self._scores, *(scores for scores, _ in self._pending)])
        new = [np.stack([~labels, labels], 1).astype(np.int64) for _, labels in self._pending]
        counts = np.concatenate([self._counts, *new])
        self._pending = []
        order = np.argsort(scores, kind="stable")
        scores, counts = scores[order], counts[order]
        first = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]])) if len(scores) else []
        self._scores = scores[first] if len(scores) else scores
        self._counts = np.add.reduceat(counts, first) if len(scores) else counts
