"""Command lines: what the user got wrong is answered in a sentence and exit status 2, not in a traceback."""

import contextlib
import datetime
import difflib
import itertools
import pathlib
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

BAD_INPUT = 2  # exit status
DEFAULT_CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs" / "mnist.py"

# No default here: it would be read, overrides and all, where the flag is defined, out of reach of `_parse`.
CONFIG = config_flags.DEFINE_config_file("config", None, f"What to run; by default configs/{DEFAULT_CONFIG.name}.")


def run(main: Callable[[list[str]], None]) -> None:
    """`absl.app.run` without tracebacks for unknown config keys and unreadable config files."""
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    if not any(arg.lstrip("-").split("=")[0] == "config" for arg in argv[1:]):
        argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        while isinstance(error.args[0], Exception):  # ml_collections wraps the one that knows in others
            error = error.args[0]
        fail("no config key " + " ".join(error.args[0].split()) + _nearest_key(argv, error.args[0]))
    except (TypeError, ValueError, OSError, flags.Error) as error:
        fail(str(error))
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; options look like --config.steps=100")
    return rest


def _nearest_key(argv: list[str], message: str) -> str:
    """Where the message names no key instead: the nearest of the whole config, which may be in another section."""
    options = [arg.lstrip("-") for arg in argv[1:]]
    paths = [arg.removeprefix("config=") for arg in options if arg.startswith("config=")]
    paths += [after for arg, after in itertools.pairwise(options) if arg == "config"]
    if "Did you mean" in message or not paths:
        return ""
    known = list(_keys(runpy.run_path(paths[-1])["get_config"]()))
    wrong = [arg.split("=")[0].removeprefix("config.") for arg in options if arg.startswith("config.")]
    for key in wrong:
        if key not in known and any(part in message for part in key.split(".")):
            return f'; did you mean "{difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]}"?'
    return ""


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key in config:
        yield prefix + key
        if isinstance(config[key], ConfigDict):
            yield from _keys(config[key], f"{prefix}{key}.")


@contextlib.contextmanager
def users_mistakes() -> Iterator[None]:
    """Around the checks of what the user asked for, not around the run itself: there a traceback is wanted."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        fail(str(error))


def prepare_workdir(path: str | None, name: str, result: str, overwrite: bool) -> pathlib.Path:
    """Make the work directory, without a `result`; where none is given, a new one under runs/, by `name` and the time.

    Raises:
      FileExistsError: if it holds a file `result` already and `overwrite` is false.
      OSError: if it cannot be written to.
    """
    if path is None:
        path = f"runs/{name}-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S-%f')[:-3]}"
    workdir = pathlib.Path(path)
    if (workdir / result).exists() and not overwrite:
        raise FileExistsError(f"{workdir} holds the result of a run: choose another --workdir or pass --overwrite")
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):  # raises now rather than at the end of the run
        (workdir / result).unlink(missing_ok=True)  # where it stands, the run beside it is complete
        return workdir


def fail(message: str) -> NoReturn:
    print(f"Cannot run: {message}", file=sys.stderr)
    sys.exit(BAD_INPUT)
