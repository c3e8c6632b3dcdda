"""Live progress: a bar on a terminal, otherwise an occasional line."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import sa_plus_plus as sapp
from experiments.training.rows import Row

_SHORT = 10  # steps of a phase
_LINES = 20  # about how many of a run's rows are printed where there is no terminal


def console() -> Console:
    """The console, wide enough for tables if output goes to a file."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=120)


class Live:
    """Shows the rows of one run; call it with each.

    Args:
      title: what is running.
      total_steps: its length.
      metric: headline metric of the task.
      console: where to show it.
    """

    def __init__(self, title: str, total_steps: int, metric: str, console: Console) -> None:
        self._title, self._total, self._metric, self._console = title, total_steps, metric, console
        self._next_line = 0.0
        self._test = ""
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TextColumn("[dim]"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
        ]
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=total_steps, state="compiling")

    def __enter__(self) -> Self:
        self._bar.start()
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: {self._total} steps, compiling")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def __call__(self, row: Row) -> None:
        mean = {name: float(np.mean(x)) for name, x in row.values.items()}
        if f"test_{self._metric}" in mean:
            self._test = f" test {self._metric} {mean[f'test_{self._metric}']:.4f}"
        state = f"{row.phase:<14} sparsity {mean['sparsity']:.3f} loss {mean['train_loss']:.4f}{self._test}"
        self._bar.update(self._task, completed=row.step, state=f"{state} {row.rate:.0f} steps/s")
        if not self._console.is_terminal and (row.step >= self._next_line or row.step == self._total):
            left = (self._total - row.step) / max(row.rate, 1e-9)
            line = f"{self._title} {row.step:>7}/{self._total}  {state}  {row.rate:.0f} steps/s  {left:.0f} s left"
            self._console.print(line, highlight=False, soft_wrap=True)
            self._next_line = row.step + self._total / _LINES


def warn_of_short_phases(phases: Mapping[str, sapp.Phases], console: Console) -> None:
    """Warn if a network has hardly any steps to recover from pruning.

    Args:
      phases: schedules by the name of their algorithm.
      console: where to say it.
    """
    shortest = {name: min(p.stop - p.start for p in schedule.phases) for name, schedule in phases.items()}
    short = [f"{name} ({steps})" for name, steps in shortest.items() if steps < _SHORT]
    if short:
        console.print(
            f"Warning: phases of fewer than {_SHORT} steps (the shortest): {', '.join(short)}. Such a run is too short "
            "to judge an algorithm by: raise config.steps or config.epochs.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def sizes(shape: Sequence[int | None]) -> str:
    """`8×8` for `(8, 8)`, `1×all` for `(1, None)`."""
    return "×".join("all" if side is None else str(side) for side in shape)


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """A rich table of dicts with the same keys; the first column, which names the row, is never shortened."""
    result = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        result.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", no_wrap=i == 0)
    for row in rows:
        result.add_row(*(str(x) for x in row.values()))
    return result
