"""The algorithms by name, each with its own schedule."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from sa_plus_plus import phases as schedules
from sa_plus_plus.compose import PruningOptions, check_phases
from sa_plus_plus.phases import Phases
from sa_plus_plus.sparsifier import Sparsifier

Constructor = TypeVar("Constructor", bound=Callable[..., Sparsifier])


class Algorithm(NamedTuple):
    """An entry of `ALGORITHMS`.

    Attributes:
      make: the constructor, `make(*, phases, **options) -> Sparsifier`.
      schedule: its own schedule, `schedule(total_steps, **options) -> Phases`.
      control: whether it is a control for comparison and not one of the paper's algorithms.
    """

    make: Callable[..., Sparsifier]
    schedule: Callable[..., Phases]
    control: bool


ALGORITHMS: dict[str, Algorithm] = {}


def algorithm(schedule: Callable[..., Phases], control: bool = False) -> Callable[[Constructor], Constructor]:
    """Register a constructor in `ALGORITHMS` by its name, and make it report unknown options itself.

    Args:
      schedule: `schedule(total_steps, **options) -> Phases`, the algorithm's own.
      control: whether it is a control.

    Raises:
      ValueError: if an algorithm of that name exists.
      TypeError: if the constructor takes anything but keywords, or `schedule` does not take `total_steps`.
    """
    if not callable(schedule) or "total_steps" not in inspect.signature(schedule).parameters:
        raise TypeError(f"write @algorithm(schedule), with a schedule such as phases.acdc; got {schedule!r}")

    def register(make: Constructor) -> Constructor:
        if make.__name__ in ALGORITHMS:
            raise ValueError(f"there is an algorithm {make.__name__!r} already: choose another name")
        parameters = inspect.signature(make).parameters.values()
        if odd := [p.name for p in parameters if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]:
            raise TypeError(f"{make.__name__} must take keywords alone, def {make.__name__}(*, {odd[0]}, ...)")
        known, suggested = options_of(make), _schedule_name(schedule, make.__name__)

        @functools.wraps(make)
        def checked(**options: Any) -> Sparsifier:
            for name in options:
                if name not in known:
                    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                    raise TypeError(
                        f"{make.__name__}() got an unexpected keyword argument {name!r}; did you mean {nearest!r}? "
                        f"It takes {', '.join(known)}"
                    )
            if "phases" in options:
                check_phases(options["phases"], suggested)
            return make(**options)

        ALGORITHMS[make.__name__] = Algorithm(checked, schedule, control)
        return checked  # type: ignore[return-value]

    return register


def _schedule_name(schedule: Callable[..., Phases], algorithm: str) -> str | None:
    """How a user writes the schedule: as that of the algorithm, where several share one function."""
    names = (algorithm, getattr(schedule, "__name__", ""))
    in_phases = (f"phases.{name}" for name in names if getattr(schedules, name, None) is schedule)
    return next(in_phases, names[1] or None)


def options_of(make: Callable[..., Sparsifier]) -> tuple[str, ...]:
    """The names of all options that a constructor takes, those of `PruningOptions` last."""
    parameters = inspect.signature(make).parameters.values()
    of_algorithm = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
    common = PruningOptions.__annotations__ if any(p.kind == p.VAR_KEYWORD for p in parameters) else ()
    return tuple(dict.fromkeys((*of_algorithm, *common)))


def own_options(make: Callable[..., Sparsifier]) -> Mapping[str, Any]:
    """The options that only this constructor has, with their defaults."""
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.default is not p.empty}
