"""Alternating timing of several contenders, and a comparison of their results."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

Name = TypeVar("Name")


def alternate(
    contenders: Mapping[Name, Callable[[], Any]], rounds: int, at_least: float = 0.2, warmup: int = 2
) -> dict[Name, np.ndarray]:
    """Seconds per call of each contender, one value per round.

    In every round each contender is called, in turn, often enough to take `at_least` seconds; a contender's call must
    return only when its work is done. Its first call of a round is not timed: threads of the one before may still be
    busy-waiting for work, as ONNX Runtime's do for some tens of ms. Figures of one round were taken next to each
    other, so ratios between them hold though the machine's speed drifts.
    """
    repeats = {}
    for name, call in contenders.items():
        for _ in range(warmup):
            call()
        started = time.perf_counter()
        call()
        repeats[name] = max(1, round(at_least / (time.perf_counter() - started)))
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            call()
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - started) / repeats[name])
    return {name: np.array(s) for name, s in seconds.items()}


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
