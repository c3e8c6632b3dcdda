"""Alternating timing of several contenders."""

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
