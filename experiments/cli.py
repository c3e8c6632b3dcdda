"""Command lines: what the user got wrong is answered in a sentence and exit status 2, not in a traceback."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import app, flags, logging

BAD_INPUT = 2  # exit status


def run(main: Callable[[list[str]], None]) -> None:
    """`absl.app.run` without tracebacks for unknown config keys and unreadable config files."""
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, flags.Error) as error:
        fail(" ".join(str(error).split()))
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; options look like --config.steps=100")
    return rest


@contextlib.contextmanager
def users_mistakes() -> Iterator[None]:
    """Around the checks of what the user asked for, not around the run itself: there a traceback is wanted."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    print(f"Cannot run: {message}", file=sys.stderr)
    sys.exit(BAD_INPUT)
