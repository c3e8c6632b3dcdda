"""Functions of the user's, named as `package.module:function`, and the network that one makes of a checkpoint."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sa_plus_plus.planning import path_string
from sa_plus_plus.sparse.arguments import listed


class Network(NamedTuple):
    """A network and examples of its inputs.

    Attributes:
      fn: `fn(params, *inputs)`.
      batches: tuples of inputs, at least one.
    """

    fn: Callable[..., Any]
    batches: list[tuple[Any, ...]]


def is_reference(text: str) -> bool:
    """Whether a text has the form of `package.module:function`.

    Args:
      text: of an option.
    """
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text) is not None


def load(reference: str, option: str) -> Callable[..., Any]:
    """The function that is named; modules are found from the working directory too.

    Args:
      reference: `package.module:function`.
      option: its option, for errors.

    Raises:
      ValueError: if it is not named like that, there is none, or its module cannot be imported.
    """
    if not is_reference(reference):
        raise ValueError(
            f"{option}={reference} must name a function as package.module:function, such as my_model:network"
        )
    module_name, _, name = reference.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` has it, and the command `sapp` has not
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name):
            here = f"it is looked for in {os.getcwd()} and among the installed packages"
            raise ValueError(f"{option}={reference}: there is no module {error.name}; {here}") from error
        raise ValueError(f"{option}={reference}: its module cannot be imported: {_told(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            defined = [n for n, x in vars(found).items() if callable(x) and getattr(x, "__module__", "") == module_name]
            has = f": it has {', '.join(defined)}" if defined else ", nor any other function"
            raise ValueError(f"{option}={reference}: {module_name} has no {part}{has}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{option}={reference} is no function but {type(found).__name__}")
    return found


def network(reference: str, params: Any) -> tuple[Network, Any]:
    """The network that a function makes of parameters, and these as JAX arrays.

    Args:
      reference: `package.module:function`.
      params: the checkpoint's arrays.

    Raises:
      ValueError: if there is no such function, it fails, what it returns is not as it should be, or its network cannot
        be called with the parameters and examples; with the function's own error.
    """
    option, function = f"--function={reference}", load(reference, "--function")
    params = jax.tree.map(jnp.asarray, params)
    called = f"{reference}(params), where params are {_described(params)}"
    try:
        made = function(params)
    except Exception as error:
        raise ValueError(f"{option}: {called} failed: {_told(error)}") from error
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]):
        raise ValueError(
            f"{option}: {called} must return (fn, examples), the function fn(params, *inputs) and a list of batches of "
            f"its inputs; it returned {_kind(made)}"
        )
    fn = made[0]
    try:
        batches = [batch if isinstance(batch, tuple) else (batch,) for batch in listed(made[1])]
    except ValueError as error:
        raise ValueError(f"{option}: the examples that it returned: {error}") from error
    if not batches:
        raise ValueError(f"{option}: it returned no examples: give a list of one batch at least")
    try:
        jax.eval_shape(fn, params, *batches[0])
    except Exception as error:
        inputs = ", ".join(f"{x.dtype}{list(x.shape)}" for x in map(jnp.asarray, jax.tree.leaves(batches[0])))
        raise ValueError(f"{option}: its fn(params, {inputs}) failed: {_told(error)}") from error
    return Network(fn, batches), params


def _described(params: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    first = ", ".join(f"{path_string(path)} {list(x.shape)}" for path, x in leaves[:3])
    return f"{len(leaves)} arrays, {first}{', …' if len(leaves) > 3 else ''}"


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _kind(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of {len(made)}: {', '.join(type(x).__name__ for x in made)}"
    return type(made).__name__
