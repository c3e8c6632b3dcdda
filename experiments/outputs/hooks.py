"""Hooks during a run: progress on the screen, metrics.jsonl, TensorBoard, a profile, and stop requests."""

import contextlib
import pathlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from jax.experimental import multihost_utils
from rich.console import Console

import sa_plus_plus as sapp
from experiments.outputs import progress
from experiments.outputs.workdir import METRICS, Metrics
from experiments.training import loop
from experiments.training.rows import Row
from experiments.training.step import TrainState

_PROFILED = range(10, 15)  # steps of a session: past compilation and warm-up


class Observer:
    """The hooks of one run in one directory; a context manager. Only the first host writes.

    Args:
      path: the run's directory.
      title: what is running.
      total_steps: its length.
      metric: the task's headline metric.
      console: the screen.
      profile: whether to write a trace of a few steps to `path/profile`, for TensorBoard or Perfetto.
      attention: whether the histograms of the logits show the attention weights that they stand for.
    """

    def __init__(
        self,
        path: pathlib.Path,
        title: str,
        total_steps: int,
        metric: str,
        console: Console,
        profile: bool = False,
        attention: bool = True,
    ) -> None:
        self._path, self._profile, self._attention = path, profile, attention
        self._first = 0
        self._writes = jax.process_index() == 0
        self._live = progress.Live(title, total_steps, metric, console)
        self._terminated = threading.Event()
        self._metrics: Metrics | None = None
        self._board: Any = None

    @property
    def hooks(self) -> loop.Hooks:
        return loop.Hooks(self._on_start, self._on_row, self._on_state, self._on_step)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of the run, including those of earlier sessions."""
        return self._metrics.rows if self._metrics else []

    def __enter__(self) -> Self:
        self._old_handler = signal.getsignal(signal.SIGTERM)  # before the new one can be called
        signal.signal(signal.SIGTERM, self._on_sigterm)
        if self._writes:
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.ExitStack() as stack:  # each of them, whatever becomes of the others
            if self._board:
                stack.callback(self._board.close)
            if self._metrics:
                stack.callback(self._metrics.close)
            if self._writes:
                stack.callback(self._live.__exit__, kind, error, tb)
            signal.signal(signal.SIGTERM, self._old_handler)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._terminated.set()
        if callable(self._old_handler):  # the sweep must stop even if this run is past its last step
            self._old_handler(number, frame)

    def _on_start(self, step: int) -> None:
        self._first = step
        if self._writes:
            self._metrics = Metrics(self._path / METRICS, step)
            self._board = tensorboardX.SummaryWriter(str(self._path / "tensorboard"), purge_step=step)

    def _on_row(self, row: Row) -> None:
        if not self._writes:
            return
        self._live(row)
        assert self._metrics is not None  # since the start
        self._metrics.add(row.of_seed(0))
        shown: dict[str, np.ndarray | float] = {
            **row.values,
            "learning_rate": row.learning_rate,
            "steps_per_s": row.rate,
        }
        for name, value in shown.items():
            self._board.add_scalar(name, float(np.mean(value)), row.step)

    def _on_state(self, step: int, state: TrainState) -> None:
        for path, logits in state.trainable.logits.items():
            weights = multihost_utils.process_allgather(logits, tiled=True) if jax.process_count() > 1 else logits
            if self._writes:
                shown = sapp.attention_weights(jnp.asarray(weights)) if self._attention else weights
                kind = "attention" if self._attention else "logits"
                self._board.add_histogram(f"{kind}/{path}", np.asarray(shown).ravel(), step)

    def _on_step(self, done: int) -> bool:
        if self._profile and self._writes and done - self._first == _PROFILED.start:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing Python's calls has crashed the interpreter
            jax.profiler.start_trace(str(self._path / "profile"), profiler_options=options)
        if self._profile and self._writes and done - self._first == _PROFILED.stop:
            jax.profiler.stop_trace()
        if jax.process_count() > 1:  # the hosts must agree on the step at which they stop
            return multihost_utils.reached_preemption_sync_point(done)
        return self._terminated.is_set()
