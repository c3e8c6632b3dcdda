"""Command lines: user errors give one sentence and exit status 2, not a traceback."""

import contextlib
import datetime
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from experiments.utils.registry import check, described, nearest, own_options

BAD_INPUT, DIVERGED, PREEMPTED, DISK_FULL = 2, 3, 4, 5  # exit status
DEFAULT_CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs" / "mnist.py"

# No default here: it would be read with its overrides where the flag is defined, out of reach of `parse`.
CONFIG = config_flags.DEFINE_config_file("config", None, f"What to run; by default configs/{DEFAULT_CONFIG.name}.")


class _Parser(ConfigFileFlagParser):
    """Suggests the closest match for a mistyped file, and keeps the config to suggest one for a mistyped key.

    Of the model's own options, which a config need not list, those that the command line sets join it here.
    """

    config: Any = None
    overrides: Mapping[str, str]  # of the command line

    def parse(self, path: str) -> Any:
        file = pathlib.Path(path.split(":")[0])  # what follows a colon is for `get_config`
        if not file.is_file():
            there = [str(other) for other in file.parent.glob("*.py")]
            raise ValueError(
                f"no such file; did you mean {nearest(str(file), there)}?"
                if there
                else f"no such file, and no config in {file.parent.absolute()}"
            )
        self.config = super().parse(path)
        with self.config.unlocked():
            for key, default in _model_options(self.config, self.overrides).items():
                option = key.removeprefix(_MODEL)
                if key in self.overrides and option not in self.config.model_options:
                    self.config.model_options[option] = default
        return self.config


_MODEL = "config.model_options."


def _model_options(config: Any, overrides: Mapping[str, str]) -> dict[str, Any]:
    """By key, the defaults of the options that the model has: the command line's model, or else the config's.

    Raises:
      ValueError: if there is no such model.
    """
    if not any(key.startswith(_MODEL) for key in overrides) or "model_options" not in config:
        return {}
    from experiments import models  # noqa: PLC0415 - heavy imports, only for who sets such an option

    name = overrides.get("config.model", config.model)
    own = own_options(getattr(models, check(name, models.__all__, "config.model")))
    return {_MODEL + option: default for option, default in own.items() if default is not inspect.Parameter.empty}


_PARSER = flags.FLAGS["config"].parser = _Parser("config")

# As for `jax.distributed.initialize`; on clusters that JAX detects, `--distributed` alone is enough.
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the processes of several hosts in one run.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def run(main: Callable[[list[str]], None]) -> None:
    """`absl.app.run` without tracebacks for unknown config keys and unreadable config files."""
    logging.set_verbosity(logging.WARNING)

    def start(argv: list[str]) -> None:
        _join_hosts()
        main(argv)

    app.run(start, flags_parser=parse)


def parse(argv: list[str]) -> list[str]:
    """`absl.flags.FLAGS(argv)`; invalid arguments are reported by `fail`."""
    if not any(arg.lstrip("-").split("=")[0] == "config" for arg in argv[1:]):
        argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
    overrides = _PARSER.overrides = _overrides(argv)
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, LookupError, TypeError, ValueError, OSError, flags.Error) as error:
        if not isinstance(_PARSER.config, ConfigDict):
            if isinstance(error, AttributeError | LookupError):
                raise  # the config file's own
            fail(str(error))
        try:
            own = _model_options(_PARSER.config, overrides)
        except ValueError:  # which is the error at hand
            fail(str(error))
        known = list(dict.fromkeys([*_keys(_PARSER.config), *own]))
        wrong = [key for key in overrides if key not in known]
        said = f"no config key {wrong[0]!r}; did you mean {nearest(wrong[0], known)!r}?" if wrong else f"{error};"
        if own and _MODEL in said.partition("; did")[0]:
            model = overrides.get("config.model", _PARSER.config.model)
            said += f" {described(model, {key.removeprefix(_MODEL): default for key, default in own.items()})}"
        fail(said.removesuffix(";"))
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; options look like --config.steps=100")
    return rest


def _overrides(argv: list[str]) -> dict[str, str]:
    """What options such as `--config.optimizer.name=sgd`, `--config.seed 3` and `--noconfig.dense_twin` set, by key."""
    found = [(re.match(r"--?(?:no)?(config\.[^=\[]+)(?:=(.*))?", arg, re.DOTALL), i) for i, arg in enumerate(argv)]
    return {one[1]: (argv[i + 1 : i + 2] or [""])[0] if one[2] is None else one[2] for one, i in found[1:] if one}


def _keys(config: ConfigDict, prefix: str = "config.") -> Iterator[str]:
    for key in config:
        yield prefix + key
        if isinstance(config[key], ConfigDict):
            yield from _keys(config[key], f"{prefix}{key}.")


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """For the checks of the user's input, not for the run itself, where a traceback is wanted."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:  # the last names the package to install
        fail(str(error))


def workdir_path(path: str | None, name: str) -> pathlib.Path:
    """The requested work directory, or a new one under runs/ named after `name` and the time."""
    if path is None:
        path = f"runs/{name}-{datetime.datetime.now().strftime('%Y%m%d-%H%M%S-%f')[:-3]}"
    return pathlib.Path(path)


def cache_compilations(directory: pathlib.Path) -> None:
    """Keep compiled programs on disk for the next run, unless JAX is already told where (or not to)."""
    if jax.config.values["jax_compilation_cache_dir"] is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(directory / ".jax_cache"))


def _join_hosts() -> None:
    """Join the processes of several hosts in one run, if `--distributed` is set."""
    if not _DISTRIBUTED.value:
        return
    jax.distributed.initialize(
        coordinator_address=_COORDINATOR.value, num_processes=_PROCESSES.value, process_id=_PROCESS.value
    )


def fail(message: str, status: int = BAD_INPUT) -> NoReturn:
    print(f"Cannot run: {message}", file=sys.stderr)
    sys.exit(status)
