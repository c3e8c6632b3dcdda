"""Calibration of a network: the range of each value, and the error of low precision."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.program import Program, assembled, computed, described
from sa_plus_plus.sparse.steps import Call, Linear, Traced, Variable


def listed(calibration: Any, tree: Any = None) -> list[Any]:
    """Calibration data as a list of batches.

    An array, a mapping or another pytree that is not a sequence is one batch. A tuple is one if it has the structure of
    the network's arguments. Any other iterable, such as a list, holds batches.

    Args:
      calibration: the data.
      tree: the structure of the network's arguments, if it is known.

    Raises:
      ValueError: for a tuple if the structure is not known, and for what is neither a batch nor holds some.
    """
    if isinstance(calibration, tuple):
        if tree is None:
            raise ValueError(
                "calibration is a tuple, which may be several batches or one of several arguments: give a list, "
                "[batch, ...], in which a tuple is one batch of several arguments"
            )
        return [calibration] if jax.tree.structure(calibration) == tree else list(calibration)
    is_array = hasattr(calibration, "shape") and hasattr(calibration, "dtype")
    if is_array or isinstance(calibration, Mapping):
        return [calibration]
    if isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes):
        return list(calibration)
    if calibration is None or jax.tree_util.all_leaves([calibration]):
        raise ValueError(f"calibration must be a batch of inputs or a list of batches, got {calibration!r}")
    return [calibration]


def batches_of(traced: Traced[Any], calibration: Iterable[Any], pieces: int = 1) -> list[tuple[Any, ...]]:
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


def ranges_of(traced: Traced[Call | Linear], batches: Sequence[Any]) -> dict[Variable, tuple[float, float]]:
    """Minimum and maximum of each value that layers take or return, over the calibration data."""
    program, weights = _plain(traced)
    layers = [step.layer for step in traced.steps if isinstance(step, Linear)]
    wanted = list(
        dict.fromkeys(v for layer in layers for v in (layer.x, layer.output, layer.residual) if v is not None)
    )
    if not wanted:
        return {}

    @jax.jit
    def ends(weights: Any, *inputs: Any) -> Any:
        values = computed(program, weights, inputs)
        arrays = [values.get(v).astype(jnp.float32) for v in wanted]
        return jnp.stack([jnp.stack([a.min(initial=0), a.max(initial=0)]) for a in arrays])  # ranges include 0

    seen = np.stack([np.asarray(ends(weights, *batch)) for batch in batches])
    if not np.isfinite(seen).all():
        bad = wanted[int(np.argmin(np.isfinite(seen).all((0, 2))))]
        layer = next(layer for layer in layers if bad in (layer.x, layer.output, layer.residual))
        raise ValueError(f"the network's values on the calibration data are not finite, at {described(layer)}")
    return {
        v: (float(low), float(high))
        for v, low, high in zip(wanted, seen[:, :, 0].min(0), seen[:, :, 1].max(0), strict=True)
    }


def errors_of(
    traced: Traced[Call | Linear], program: Program, weights: Any, batches: Sequence[Any]
) -> dict[Variable, float]:
    """Relative error of each layer's result against full precision, over the calibration data."""
    plain, full = _plain(traced)
    outputs = [step.layer.output for step in traced.steps if isinstance(step, Linear)]

    @jax.jit
    def squares(full: Any, weights: Any, *inputs: Any) -> Any:
        want, got = computed(plain, full, inputs), computed(program, weights, inputs)
        pairs = [(want.get(v).astype(jnp.float32), got.get(v).astype(jnp.float32)) for v in outputs]
        return jnp.stack([jnp.stack([jnp.sum((a - b) ** 2), jnp.sum(a**2)]) for a, b in pairs])

    if not outputs:
        return {}
    each = [np.asarray(squares(full, weights, *batch), np.float64) for batch in batches]
    off, size = np.moveaxis(np.sum(each, 0), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {v: float(np.sqrt(a / b)) for v, a, b in zip(outputs, off, size, strict=True)}


def _plain(traced: Traced[Call | Linear]) -> tuple[Program, list[Any]]:
    return assembled(traced, [None] * len(traced.steps), {}, None)


def batch_of(shape: tuple[int, ...], pieces: int) -> tuple[int, ...]:
    """The shape of `pieces` arrays concatenated along their first axis."""
    return shape if pieces == 1 else (pieces * shape[0], *shape[1:])


def _cut(x: Any, pieces: int) -> Sequence[Any]:
    return [x] if pieces == 1 else np.split(np.asarray(x), pieces)


def shape_and_type(x: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype; for a value that is not a JAX array, those after conversion to one."""
    return np.shape(x), jax.dtypes.canonicalize_dtype(jnp.result_type(x), allow_extended_dtype=True)


def shapes(values: Sequence[tuple[tuple[int, ...], Any]]) -> str:
    """Shapes and dtypes, for errors."""
    return ", ".join(f"{dtype.name}[{', '.join(map(str, shape))}]" for shape, dtype in values)
