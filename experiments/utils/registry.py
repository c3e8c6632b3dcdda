"""Look up names from a config in a module; an unknown name is an error that suggests the closest match."""

import difflib
from collections.abc import Mapping, Sequence
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
      ValueError: if it has no such name, or that takes no such option.
    """
    make = getattr(module, check(name, module.__all__, where))
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"{where}={name!r}: {error}") from error
