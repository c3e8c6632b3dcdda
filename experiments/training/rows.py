"""Measurements during a run, as occasional rows."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import sa_plus_plus as sapp


class Row(NamedTuple):
    """The state of a run after `step` steps. Arrays have one entry per seed.

    Attributes:
      step: steps done.
      phase: kind of phase of the next step.
      values: by name: `train_loss`, `sparsity` and the like, and `test_...` where it was evaluated.
      rate: steps per second since the last row.
      learning_rate: of the last step.
    """

    step: int
    phase: str
    values: dict[str, np.ndarray]
    rate: float
    learning_rate: float

    def of_seed(self, n: int) -> dict[str, Any]:
        """One seed's part, flat, as `metrics.jsonl` has it: nothing of the clock, so that runs can be compared."""
        values = {name: float(x[n]) for name, x in self.values.items()}
        return {"step": self.step, "phase": self.phase, "learning_rate": self.learning_rate, **values}


class Rows:
    """The rows of a session: added when they are dispatched, written when the device can be waited for.

    Args:
      phases: the schedule.
      first: steps done when the session begins.
      on_row: called with each row as it is written.
    """

    def __init__(self, phases: sapp.Phases, first: int, on_row: Callable[[Row], None]) -> None:
        self.all: list[Row] = []
        self._phases, self._on_row = phases, on_row
        self._added: tuple[int, Mapping[str, jax.Array | np.ndarray]] | None = None
        self._step, self._time = first, time.perf_counter()  # when the last row was written

    def add(self, done: int, values: Mapping[str, jax.Array | np.ndarray]) -> None:
        """The values after `done` steps, `learning_rate` among them; they may still be being computed."""
        self._added = done, values

    def write(self) -> None:
        """Wait for the row that was added, if any, and hand it over."""
        if self._added is None:
            return
        (done, values), self._added = self._added, None
        host = {name: np.atleast_1d(x) for name, x in values.items()}
        now = time.perf_counter()
        rate = (done - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = done, now
        learning_rate = float(host.pop("learning_rate")[0])
        self.all.append(Row(done, self._phases.at(done).kind, host, rate, learning_rate))
        self._on_row(self.all[-1])

    def of(self, done: int) -> dict[str, np.ndarray]:
        """What is written of a step; nothing where it has no row."""
        return self.all[-1].values if self.all and self.all[-1].step == done else {}

    @property
    def lost(self) -> bool:
        """Whether at the last row no seed's loss was finite any more."""
        return bool(self.all) and none_finite(self.all[-1].values["train_loss"])


def none_finite(losses: np.ndarray) -> bool:
    """Whether every seed's loss is NaN or infinite."""
    return not np.isfinite(losses).any()
