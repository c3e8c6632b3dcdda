"""Rewrites of operations that jax2onnx converts wrongly, or not at all, to others that it converts."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from sa_plus_plus.sparse.compiler.builder import called


def rewritten(fn: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """`fn` as primitive operations, some of them replaced, for arguments of the shapes of the examples.

    jax2onnx patches functions of flax and Equinox, each for some of its arguments; here it sees none of these. Replaced
    are:

    - `reduce_window_max`, which jax2onnx pools over all axes, where ONNX Runtime pools over three at most. Here it is
      over two axes at a time: the maximum over a window can be taken axis by axis.
    - `gather` of rows with a position for axes that it takes whole, as `jax.vmap` of a lookup writes it, which jax2onnx
      converts to another shape. Here such positions, which are always 0, are left out.

    Args:
      fn: of arrays to one array.
      examples: arrays, or their shapes and dtypes.
    """
    closed = jax.make_jaxpr(fn)(*examples)
    return lambda *args: _evaluate(closed, args)[0]


def _evaluate(closed: Any, args: Sequence[Any]) -> list[Any]:
    program, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    known = dict(zip(program.constvars, consts, strict=True)) | dict(zip(program.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for eqn in program.eqns:
        values = [read(atom) for atom in eqn.invars]
        inner = called(eqn)
        results = _apply(eqn, values) if inner is None else _evaluate(inner, values)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in program.outvars]


def _apply(eqn: Any, values: list[Any]) -> Sequence[Any]:
    rewrite = _REWRITES.get(eqn.primitive.name)
    if rewrite is not None and (result := rewrite(*values, **eqn.params)) is not None:
        return [result]
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


def _max_pool(x: Any, **windows: Any) -> Any:
    """The maxima, over two of the axes after the other; `windows` has a value for each axis under each name."""
    if windows.keys() != _NO_WINDOW.keys():
        return None
    by_axis = [{name: values[axis] for name, values in windows.items()} for axis in range(x.ndim)]
    pooled = [axis for axis, window in enumerate(by_axis) if window != _NO_WINDOW]
    for pair in (pooled[i : i + 2] for i in range(0, len(pooled), 2)):
        order = [axis for axis in range(x.ndim) if axis not in pair] + pair
        y = lax.transpose(x, order)
        others, sides = y.shape[: -len(pair)], y.shape[-len(pair) :]
        options = {name: (_NO_WINDOW[name], *(by_axis[axis][name] for axis in pair)) for name in windows}
        y = lax.reduce_window_max_p.bind(lax.reshape(y, (math.prod(others), *sides)), **options)
        x = lax.transpose(lax.reshape(y, (*others, *y.shape[1:])), np.argsort(order))
    return x


_NO_WINDOW: dict[str, Any] = {  # along an axis that is not pooled
    **dict.fromkeys(("window_dimensions", "window_strides", "base_dilation", "window_dilation"), 1),
    "padding": (0, 0),
}


def _lookup(x: Any, positions: Any, *, dimension_numbers: Any, slice_sizes: Any, mode: Any, **_: Any) -> Any:
    """The rows along one axis; None for any other kind of gather."""
    numbers, axes = dimension_numbers, dimension_numbers.start_index_map
    whole = [axis for axis in axes if slice_sizes[axis] == x.shape[axis]]
    looked_up = [(i, axis) for i, axis in enumerate(axes) if axis not in whole]
    in_bounds = mode in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if not (whole and len(looked_up) == 1 and in_bounds) or numbers.operand_batching_dims:
        return None
    (column, axis), lead = looked_up[0], positions.ndim - 1
    result = (*positions.shape[:-1], *(n for i, n in enumerate(slice_sizes) if i not in numbers.collapsed_slice_dims))
    rows_last = numbers.offset_dims == tuple(range(lead, len(result)))
    if slice_sizes[axis] != 1 or not rows_last or any(slice_sizes[i] != n for i, n in enumerate(x.shape) if i != axis):
        return None
    table = lax.transpose(x, [axis, *(i for i in range(x.ndim) if i != axis)])
    rows = jnp.take(table, positions[..., column], axis=0, mode="clip")
    return lax.reshape(rows, result)  # the axis of the lookup has length 1, wherever it is


_REWRITES: dict[str, Callable[..., Any]] = {"reduce_window_max": _max_pool, "gather": _lookup}
