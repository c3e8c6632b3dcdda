"""Alternating timing of several contenders."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

Name = TypeVar("Name")


def alternate(
    contenders: Mapping[Name, Callable[[], Any]],
    rounds: int,
    at_least: float = 0.2,
    warmup: int = 2,
    settle: float = 0.1,
) -> dict[Name, np.ndarray]:
    """Seconds per call of each contender, one value per round.

    In every round each contender is called, in turn, often enough to take `at_least` seconds; a contender's call must
    return only when its work is done. Figures of one round were taken next to each other, so ratios between them hold
    though the machine's speed drifts.

    Args:
      contenders: what is called, by name.
      rounds: of all contenders in turn.
      at_least: seconds of timed calls of a contender in a round; one call at least.
      warmup: calls of each before all rounds.
      settle: seconds of calls, one at least, that are not timed at the start of a contender's turn. Threads of the one
        before may still be busy-waiting for work: those of an inference engine do so for some 40 ms, and whoever comes
        next has a core less until they sleep.
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
            started = time.perf_counter()
            call()
            while time.perf_counter() - started < settle:
                call()
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - started) / repeats[name])
    return {name: np.array(s) for name, s in seconds.items()}
