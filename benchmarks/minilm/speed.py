"""Milliseconds of a campaign's networks, on real sentences, by this package and by the dense engines.

Warm, a contender's calls follow one another, and its weights stay in the caches as far as they fit. Cold, the caches
are emptied before every call, by going through a buffer that is larger than they are. A server with a steady load sees
the former; one whose process or machine does other work between two requests, the latter.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from benchmarks.minilm.contenders import Setting
from benchmarks.minilm.networks import PRECISIONS, Network, Run, batches_of

_CALIBRATION = 8  # batches
Call = Callable[[], Any]


def measure(
    networks: Sequence[Network], setting: Setting, tokenizer: Any, texts: Sequence[str], rounds: int, engines: bool
) -> list[dict[str, Any]]:
    """Milliseconds of each network by each engine, warm and cold; all take turns.

    Args:
      networks: what is served.
      setting: the batch.
      tokenizer: of the encoder.
      texts: real ones.
      rounds: of alternating measurement.
      engines: whether the dense ones serve the dense networks too.
    """
    batches = batches_of(tokenizer, texts, setting.batch, setting.length, _CALIBRATION)
    calls: dict[tuple[str, str], Call] = {}
    for network in networks:
        for engine, run in network.runs(batches, PRECISIONS, engines).items():
            calls[network.folder, engine] = functools.partial(_done, run, batches[0])
    warm, cold = timing.alternate(calls, rounds), timing.alternate_cold(calls, rounds)
    return [
        {
            **{"network": name, "engine": engine, "batch": setting.batch, "length": setting.length},
            "warm": timing.spread(1e3 * warm[name, engine]),
            "cold": timing.spread(1e3 * cold[name, engine]),
        }
        for name, engine in calls
    ]


def _done(run: Run, x: np.ndarray) -> Any:
    return jax.block_until_ready(run(x))
