"""Shapes and dtypes of a network's arguments, and batches of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def batches_of(traced: Any, calibration: Iterable[Any], pieces: int = 1) -> list[tuple[Any, ...]]:
    """The batches as tuples of arguments, checked; each is cut into `pieces`, since `traced` takes one at a time."""
    batches: list[tuple[Any, ...]] = []
    want = [(batch_of(v.shape, pieces), v.dtype) for v in traced.inputs]
    for number, batch in enumerate(calibration):
        batch = batch if isinstance(batch, tuple) else (batch,)
        leaves, tree = jax.tree.flatten(batch)
        got = [shape_and_type(x) for x in leaves]
        if tree != traced.input_tree or got != want:
            raise ValueError(
                f"calibration batch {number} is {shapes(got)}, but the network is made for {shapes(want)}: give "
                "batches of the examples' shapes"
            )
        if not all(np.isfinite(np.asarray(x, np.float64)).all() for x in leaves):
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
    """Shape and dtype; for a value that is not a JAX array, those after conversion to one."""
    return np.shape(x), jax.dtypes.canonicalize_dtype(jnp.result_type(x))


def shapes(values: Sequence[tuple[tuple[int, ...], Any]]) -> str:
    """Shapes and dtypes, for errors."""
    return ", ".join(f"{np.dtype(dtype).name}{list(shape)}" for shape, dtype in values)
