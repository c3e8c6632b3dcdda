"""Common parts of all benchmarks: alternating timing, and result files."""

import datetime
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from experiments.outputs import report
from experiments.utils import files
from experiments.utils.timing import spread
from sa_plus_plus.timing import alternate

__all__ = ["RESULTS", "alternate", "alternate_cold", "save", "spread"]

Name = TypeVar("Name")
_BUFFER = 2**28  # bytes, more than most caches
_COLD = 5  # calls a round

RESULTS = pathlib.Path(__file__).parent / "results"


def save(name: str, content: Mapping[str, Any]) -> pathlib.Path:
    """Write `benchmarks/results/<name>.json` with versions, device and date."""
    path = RESULTS / f"{name}.json"
    today = datetime.date.today().isoformat()
    files.write_json(path, {**content, "versions": report.versions(), "date": today})
    return path


def alternate_cold(contenders: Mapping[Name, Callable[[], Any]], rounds: int) -> dict[Name, np.ndarray]:
    """Like `alternate`, of single calls after the caches were emptied: for each round, the median of some of them.

    The caches of one core, and those that it shares with others, are emptied by writing to a buffer that is larger than
    they are. That takes so long that threads which wait for work are asleep too.
    """
    buffer = np.zeros(_BUFFER // 4, np.float32)
    found: dict[Name, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            call()
            taken = []
            for _ in range(_COLD):
                buffer += 1
                started = time.perf_counter()
                call()
                taken.append(time.perf_counter() - started)
            found[name].append(float(np.median(taken)))
    return {name: np.array(seconds) for name, seconds in found.items()}
