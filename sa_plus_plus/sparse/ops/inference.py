"""Functions for inference only: the error when JAX differentiates them."""

from collections.abc import Callable
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
