"""Look up names from a config in a module; an unknown name is an error that suggests the closest match."""

import difflib
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def check(name: str, known: Sequence[str], where: str) -> str:
    """The name, if it is known.

    Raises:
      ValueError: naming the place, the nearest known name and all of them.
    """
    if name not in known:
        raise ValueError(
            f"{where}={name!r} is unknown; did you mean {nearest(name, known)!r}? Known: {', '.join(known)}"
        )
    return name


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that is most similar to this one."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def lookup(module: ModuleType, name: str, where: str, options: Mapping[str, Any]) -> Any:
    """`module.name(**options)` for a public name of the module.

    Raises:
      ValueError: if it has no such name; or if that takes no such option, or one of another type.
    """
    make = getattr(module, check(name, module.__all__, where))
    known = own_options(make)
    for option, value in options.items():
        if option not in known:
            likely = f"; did you mean {nearest(option, list(known))!r}?" if known else ";"
            raise ValueError(f"{where}={name!r} has no option {option!r}{likely} {described(name, known)}")
        if not _fits(value, known[option]):
            raise ValueError(f"{where}={name!r}: {option}={value!r} is of another type; {described(name, known)}")
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"{where}={name!r}: {error}") from error


def own_options(make: Callable[..., Any]) -> dict[str, Any]:
    """Options of a function, or of a flax module, by name: their defaults, `inspect.Parameter.empty` for none.

    >>> own_options(lambda widths, size=10, parent=None: None)
    {'widths': <class 'inspect._empty'>, 'size': 10}
    """
    parameters = inspect.signature(make).parameters
    return {name: found.default for name, found in parameters.items() if name not in ("parent", "name")}


def described(name: str, options: Mapping[str, Any]) -> str:
    """A sentence with the options that have a default, and these.

    >>> described("MLP", {"classes": 10, "widths": (67,)})
    'MLP takes classes=10 (int), widths=(67,) (tuple)'
    """
    there = {option: default for option, default in options.items() if default is not inspect.Parameter.empty}
    listed = ", ".join(f"{option}={default!r} ({type(default).__name__})" for option, default in there.items())
    return f"{name} takes {listed or 'no options'}"


def _fits(value: Any, default: Any) -> bool:
    """Whether a value may stand for a default: a whole number for a fractional one too, a list for a tuple."""
    if default is None or default is inspect.Parameter.empty:
        return True
    if isinstance(default, tuple | list):
        return isinstance(value, tuple | list) and all(_fits(each, default[0]) for each in value if default)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    kinds = {float: numbers.Real, int: numbers.Integral}
    return isinstance(value, kinds.get(type(default), type(default)))


def missing_extra(use: str, extra: str, error: ModuleNotFoundError) -> str:
    """What to install where an import has failed: a sentence.

    Args:
      use: what the package is needed for.
      extra: of `pyproject.toml` that brings it.
      error: of the import.
    """
    return f"{use} need the package {error.name}: pip install -e '.[{extra}]'"
