"""A line of progress on the terminal, for what takes longer than a moment."""

import contextlib
import contextvars
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_INTERVAL = 0.1  # seconds between two items that are shown


class _Line:
    """What is being done, and within what."""

    def __init__(self, name: str, outer: "_Line | None"):
        self.name, self.outer, self.text = name, outer, ""
        self.due = 0.0  # when the next item may be shown
        self.width = 0  # columns of the terminal that it has written

    def __str__(self) -> str:
        mine = f"{self.name}: {self.text}" if self.text else self.name
        return mine if self.outer is None else f"{self.outer} · {mine}"


_current: contextvars.ContextVar[_Line | None] = contextvars.ContextVar("current", default=None)


@contextlib.contextmanager
def doing(name: str) -> Iterator[None]:
    """A line on stderr while the block runs, overwritten by `say` and `each`, and erased at last, also after an error.

        with doing("one_shot"):
            for layer in each(layers, "layer"):
                ...

    shows `one_shot: layer 12 of 52, about 40 s left`. A line within another is shown after it. Nothing is written where
    stderr is no terminal, or if the environment variable `SAPP_PROGRESS` is 0.

    Args:
      name: what is done.
    """
    line = _Line(name, _current.get())
    token = _current.set(line)
    try:
        yield
    finally:
        _current.reset(token)
        _write(line, "")


def say(text: str) -> None:
    """Show what is being done now; nothing outside `doing`.

    Args:
      text: a few words.
    """
    line = _current.get()
    if line is not None:
        line.text = text
        line.due = time.monotonic() + _INTERVAL
        if _wanted():
            _write(line, str(line))


def each(items: Iterable[T], noun: str, total: int | None = None) -> Iterator[T]:
    """The items, each shown when it is reached.

    Args:
      items: to go through.
      noun: what one of them is, `layer`.
      total: number of items; by default their length.
    """
    several = len(items) if total is None else total  # type: ignore[arg-type]
    began = time.monotonic()
    for i, item in enumerate(items):
        line, now = _current.get(), time.monotonic()
        if line is not None and now >= line.due:
            left = (now - began) / i * (several - i) if i else 0
            say(f"{noun} {i + 1} of {several}" + (f", about {_time(left)} left" if left >= 1 else ""))
        yield item


def _wanted() -> bool:
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return terminal and os.environ.get("SAPP_PROGRESS", "") != "0"


def _write(line: _Line, text: str) -> None:
    text = text[: shutil.get_terminal_size().columns - 1]
    if text or line.width:
        sys.stderr.write("\r" + text.ljust(line.width) + ("" if text else "\r"))
        sys.stderr.flush()
    line.width = len(text)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
