"""Spread of timings, and a comparison of results."""

from typing import Any

import numpy as np


def spread(ratios: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(ratios, (25, 50, 75))
    return {"median": round(float(median), 4), "q25": round(float(low), 4), "q75": round(float(high), 4)}


def difference(got: Any, want: Any) -> float:
    """The largest difference relative to the largest output; absolute if all outputs are zero.

    Raises:
      RuntimeError: if the outputs to compare with are not finite.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.isfinite(want).all():
        raise RuntimeError("the model's own results are not finite, so there is nothing to compare with")
    return float(np.abs(got - want).max() / (np.abs(want).max() or 1))
