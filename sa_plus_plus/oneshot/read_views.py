"""How a function multiplies by each of its parameters: the views of kernels, read off rather than guessed."""

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import planning
from sa_plus_plus.plan_options import PlanOptions
from sa_plus_plus.planning import Plan, path_string
from sa_plus_plus.sparse.compiler.frontend import layer_tracer
from sa_plus_plus.sparse.compiler.ir import Layer
from sa_plus_plus.views import View

Shape = tuple[int, ...]
BATCH, ROWS, COLS = range(3)  # places in a view


def views_of(
    fn: Callable[..., Any], params: Any, *examples: Any, paths: Collection[str] | None = None
) -> dict[str, View]:
    """How each parameter is read as matrices, by tracing a function that multiplies by it.

    For `plan` and all algorithms, `views=sapp.views_of(model.apply, params, x)`, if a plan marks a layer `assumed` or
    `perhaps a depthwise kernel`: names and shapes alone do not tell how a leaf is used. Rows are the axes that are
    contracted with an input, columns those of the result; axes of which each product takes one element enumerate
    matrices, as in stacked layers. Found are products and convolutions with a leaf that is at most cast, transposed,
    sliced or reshaped, also in a `scan` of up to 128 steps.

    Args:
      fn: `fn(params, *examples)`, jittable.
      params: tree of arrays.
      *examples: inputs, or their shapes and dtypes.
      paths: of the leaves to look at; by default all floating-point leaves of two axes and more.

    Returns:
      The views by path. They leave out what `fn` does not multiply by, such as tables that are only looked up,
      depthwise kernels, and leaves with an axis that is contracted in one of these products and not in another. A
      convolution in groups has the matrix of one group's inputs. Products in `cond`, `while` and longer loops are not
      seen.
    """
    leaves = {path_string(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items() if _may_be_kernel(leaf)}
    wanted = shapes.keys() if paths is None else shapes.keys() & set(paths)
    traced = layer_tracer(fn, params, wanted, *examples)(params)
    found: dict[str, list[View | None]] = {}
    for layer in traced.layers:
        if layer.origin is not None and not layer.spec.depthwise:
            path = layer.origin.path
            found.setdefault(path, []).append(_view(layer, shapes[path]))
    every = {path: [view for view in each if view] for path, each in found.items() if None not in each}
    return {path: each[0] for path, each in every.items() if len(set(each)) == 1}


def plan_for(
    fn: Callable[..., Any],
    params: Any,
    batches: Sequence[tuple[Any, ...]],
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    **options: Unpack[PlanOptions],
) -> Plan:
    """`plan` for a function: where names and shapes leave it open how a leaf is read, the function tells.

    Args:
      fn: `fn(params, *inputs)`.
      params: tree of arrays.
      batches: the inputs of some calls, of which the first is looked at.
      block: as `plan` takes it.
      sparsity: as `plan` takes it.
      **options: as `plan` takes them; views that are given have precedence.

    Raises:
      TypeError: if the function is none, or as `plan` does.
      ValueError: as `plan` does.
    """
    if not callable(fn):
        raise TypeError(f"the first argument is the function, fn(params, *inputs); got {type(fn).__name__}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last plan warns
        guessed = planning.plan(params, block=block, sparsity=sparsity, **options)
    open_to = [leaf.path for leaf in guessed.leaves if leaf.is_open]
    if open_to and batches:
        read_off = views_of(fn, params, *batches[0], paths=open_to)
        options = {**options, "views": {**(options.get("views") or {}), **read_off}}
    return planning.plan(params, block=block, sparsity=sparsity, **options)


def _may_be_kernel(leaf: Any) -> bool:
    return np.ndim(leaf) > 1 and np.size(leaf) > 0 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _view(layer: Layer, shape: Shape) -> View | None:
    """The view of a leaf of which a layer's kernel is a matrix; None if one axis is part of both sides."""
    assert layer.origin is not None
    places = np.asarray(layer.origin.positions).reshape(-1, layer.spec.kernel.shape[-1])
    down, across = places[:, 0], places[0]
    if not np.array_equal(places, down[:, None] + (across - across[0])):
        return None  # the place of an entry is no sum of its row's and its column's
    rows, cols = (_turns(line, shape) for line in (down, across))
    if rows.keys() & cols.keys():
        return None
    roles = _roles(shape, rows.keys(), cols.keys())
    # A convolution's rows are its window and then its inputs; the order of a product's is free: as they lie in memory.
    key = rows.get if len(layer.spec.kernel.shape) > 2 else None
    batch, in_rows, in_cols = ([axis for axis, role in enumerate(roles) if role == each] for each in range(3))
    if not in_rows or not in_cols:
        return None
    return View(tuple(batch), tuple(sorted(in_rows, key=key and (lambda axis: key(axis, -1)))), tuple(in_cols))


def _turns(line: np.ndarray, shape: Shape) -> dict[int, int]:
    """How often each axis of a leaf changes along a line of places, for those that do; the slowest have fewest."""
    changes = (int(np.count_nonzero(np.diff(index))) for index in np.unravel_index(line, shape))
    return {axis: n for axis, n in enumerate(changes) if n}


def _roles(shape: Shape, rows: Collection[int], cols: Collection[int]) -> list[int]:
    """The part of a view, `BATCH`, `ROWS` or `COLS`, that each axis of a leaf belongs to.

    One of length 1 goes with the axis after it, or before it if it is the last, so that no axes have to change places.
    """
    long = {axis: ROWS if axis in rows else COLS if axis in cols else BATCH for axis, n in enumerate(shape) if n > 1}
    roles = []
    for axis in range(len(shape)):
        beside = next((other for other in long if other >= axis), max(long, default=None))
        role = ROWS if beside is None else long[beside]
        roles.append(role if axis in long or role != BATCH else ROWS)
    short = [axis for axis in range(len(shape)) if axis not in long]
    if short and ROWS not in roles:
        roles[short[0]] = ROWS
    if short and COLS not in roles:
        roles[short[-1]] = COLS
    return roles
