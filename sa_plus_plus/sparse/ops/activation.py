"""Activation functions that an operation can apply to its result."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu", "relu6", "hard_swish"]


def activate(activation: Activation, y: Any) -> Any:
    """The activation function of a value."""
    functions: dict[str, Callable[[Any], Any]] = {
        "relu": jax.nn.relu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "silu": jax.nn.silu,
        "relu6": jax.nn.relu6,
        "hard_swish": jax.nn.hard_swish,
    }
    return y if activation == "none" else functions[activation](y)
