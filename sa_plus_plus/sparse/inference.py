"""Functions for inference alone: what they answer where JAX would differentiate them, or for other shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


def inference(run: Callable[..., Any], what: str) -> Callable[..., Any]:
    """The same function, which says in a sentence that it has no derivative.

    Args:
      run: of arrays.
      what: it is, and what to differentiate instead.
    """
    wrapped = jax.custom_jvp(run)

    @wrapped.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(f"there is no derivative of {what}")

    return wrapped


def instead(want: Sequence[Any], got: Sequence[Any]) -> str:
    """What to do with inputs of other shapes or types than a network was made for.

    Args:
      want: shapes and dtypes that it was made for, in pairs.
      got: those of the inputs.
    """
    if any(type(n) is not int for shape, _ in got for n in shape):
        return "its sizes are fixed, so export or trace it with numbers for all of them"
    if [here for _, here in got] != [there for _, there in want]:
        return "convert them to the types that it was made for"
    if any(there for there, _ in want) and [here for here, _ in got] == [there[1:] for there, _ in want]:
        return "give it the whole batch, whose axis is missing, and leave out any `jax.vmap` around it"
    return "make another for these, or pad them to that shape"
