"""A network's arguments: shapes and dtypes, batches, and which of its weights are arguments of a compiled call."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SMALL = 2**14  # bytes


def jitted(fn: Callable[..., Any], weights: Any) -> tuple[Any, list[Any]]:
    """`fn(weights, *inputs)` compiled, as a function of the large weights and the inputs; and the large weights.

    Small weights are constants of the compiled program, for a call takes a third of a microsecond per argument. The
    others are a flat list, so that a call does not flatten a tree.

    Args:
      fn: a function that can be jitted.
      weights: a tree of arrays.
    """
    arrays, structure = jax.tree.flatten(weights)
    passed = [a.nbytes > _SMALL for a in arrays]

    def called(given: Sequence[Any], *inputs: Any) -> Any:
        rest = iter(given)
        every = [next(rest) if large else a for a, large in zip(arrays, passed, strict=True)]
        return fn(jax.tree.unflatten(structure, every), *inputs)

    return jax.jit(called), [a for a, large in zip(arrays, passed, strict=True) if large]


def listed(calibration: Any, tree: Any = None, name: str = "calibration") -> list[Any]:
    """Calibration data as a list of batches.

    An array, a mapping or another pytree that is not a sequence is one batch. A tuple is one if it has the structure of
    the network's arguments. Any other iterable, such as a list, holds batches.

    Args:
      calibration: the data.
      tree: the structure of the network's arguments, if it is known.
      name: of the data, for errors.

    Raises:
      ValueError: for a tuple if the structure is not known, and for anything but a batch or several.
    """
    if isinstance(calibration, tuple):
        if tree is None:
            raise ValueError(
                f"{name} is a tuple, which may be several batches or one of several arguments: give a list, "
                "[batch, ...], in which a tuple is one batch of several arguments"
            )
        return [calibration] if jax.tree.structure(calibration) == tree else list(calibration)
    is_array = hasattr(calibration, "shape") and hasattr(calibration, "dtype")
    if is_array or isinstance(calibration, Mapping):
        return [calibration]
    if isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes):
        return list(calibration)
    if calibration is None or jax.tree_util.all_leaves([calibration]):
        raise ValueError(f"{name} must be a batch of inputs or a list of batches, got {calibration!r}")
    return [calibration]


def batches_of(traced: Any, calibration: Iterable[Any], pieces: int = 1) -> list[tuple[Any, ...]]:
    """The batches as tuples of arguments, checked; each is cut into `pieces`, since `traced` takes one at a time."""
    batches: list[tuple[Any, ...]] = []
    want = [(batch_of(v.shape, pieces), v.dtype) for v in traced.inputs]
    for number, batch in enumerate(listed(calibration, traced.input_tree)):
        batch = batch if isinstance(batch, tuple) else (batch,)
        leaves, tree = jax.tree.flatten(batch)
        got = [shape_and_type(x) for x in leaves]
        if tree != traced.input_tree or got != want:
            raise ValueError(
                f"calibration batch {number} is {shapes(got)}, but the network is made for {shapes(want)}: give "
                "batches of the examples' shapes"
            )
        numbers = [x for x, (_, dtype) in zip(leaves, got, strict=True) if jnp.issubdtype(dtype, jnp.inexact)]
        if not all(np.isfinite(np.asarray(x, np.float64)).all() for x in numbers):
            raise ValueError(f"calibration batch {number} has values that are not finite")
        batches += [jax.tree.unflatten(tree, piece) for piece in zip(*(_cut(x, pieces) for x in leaves), strict=True)]
    if not batches:
        raise ValueError("calibration has no batches: give some of typical inputs")
    return batches


def batch_of(shape: tuple[int, ...], pieces: int) -> tuple[int, ...]:
    """The shape of `pieces` arrays concatenated along their first axis."""
    return shape if pieces == 1 else (pieces * shape[0], *shape[1:])


def _cut(x: Any, pieces: int) -> Sequence[Any]:
    return [x] if pieces == 1 else np.split(np.asarray(x), pieces)


def shape_and_type(x: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype; for a value that is not a JAX array, those after conversion to one.

    Raises:
      TypeError: for what is no array or number.
    """
    try:
        return np.shape(x), jax.dtypes.canonicalize_dtype(jnp.result_type(x), allow_extended_dtype=True)
    except TypeError as error:
        raise TypeError(
            f"an input is {x!r:.80}, of type {type(x).__name__}, which is no array: bind it to the function instead"
        ) from error


def shapes(values: Sequence[tuple[tuple[int, ...], Any]]) -> str:
    """Shapes and dtypes, for errors."""
    return ", ".join(f"{dtype.name}[{', '.join(map(str, shape))}]" for shape, dtype in values)


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
