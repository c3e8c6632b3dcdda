"""Which kernels are pruned, in which blocks, and how many blocks stay."""

import collections
import difflib
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from sa_plus_plus import blocks as blk
from sa_plus_plus import layouts, select, views
from sa_plus_plus.cut_off import last_layers, warn_of_outputs_cut_off
from sa_plus_plus.names import named_as_kernel, non_kernel_kind
from sa_plus_plus.plan_options import MIN_BLOCKS, Overrides, PlanOptions, Views, check_options
from sa_plus_plus.plans import OUTPUTS, VECTORS, LeafPlan, Plan
from sa_plus_plus.views import View

_OUTPUTS_FIRST = ("weight", "weight_ih", "weight_hh")  # attributes of Equinox's modules


def path_string(path: tuple[Any, ...]) -> str:
    """A leaf's key path as text, `Dense_0/kernel`; the `.value` that flax.nnx puts under each variable is omitted.

    Args:
      path: the keys of a leaf, as `jax.tree_util.tree_leaves_with_path` gives them.
    """
    if len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_layers(fn: Callable[..., Any], params: Any, layers: Mapping[str, LeafPlan], *rest: Any) -> Any:
    """`fn(layer or None, leaf, *leaves of rest)` over a parameter tree: layer is None if the leaf is not pruned."""
    return jax.tree_util.tree_map_with_path(lambda path, *x: fn(layers.get(path_string(path)), *x), params, *rest)


def plan(
    params: Any,
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    min_blocks: int = MIN_BLOCKS,
    where: Callable[[str], bool] = named_as_kernel,
    overrides: Overrides | None = None,
    views: Views | None = None,
    min_kept: int | str | None = None,
) -> Plan:
    """Decide which leaves of a parameter tree are pruned (paper, C.1).

    A leaf is read as one matrix or, if it holds stacked layers, as several, each pruned on its own. It is pruned if it
    is a kernel of 2 to 5 dimensions (not counting axes of stacked layers), `where(path)` holds, and a matrix's grid has
    at least `min_blocks` blocks, including partial blocks on the edges.
    `k = floor((1 - sparsity) * blocks)` blocks of each matrix are kept.

    Args:
      params: tree of arrays, or of anything with `shape` and `dtype` (`jax.eval_shape` will do).
      block: `(b_r, b_c)` over the kernel's matrix, or one integer for a square. None in a pair is the whole side:
        `(1, None)` prunes rows (inputs), `(None, 1)` columns (neurons, channels, filters).
      sparsity: share of the blocks to remove, in [0, 1).
      min_blocks: kernels with fewer blocks in a matrix stay dense.
      where: predicate on the path of a leaf, `Dense_0/kernel`; by default `named_as_kernel`. Kernels that are, or may
        be, depthwise stay dense whatever it says, as do first layers for grey images, which look the same. Such a
        kernel is pruned if its own path, not a pattern, is in `overrides` or `views`.
      overrides: by path or shell-style pattern (`*/Conv_0/kernel`): `dict(block=..., sparsity=..., min_blocks=...,
        min_kept=...)` to use there. A leaf's own path applies before the first pattern that matches.
      views: by path or pattern, how leaves are read as matrices: `"d (h k)"`, `"[l] i o"`, `"o i -> i o"` (see
        `views.as_view`). A pattern passes over leaves with another number of axes. By default `layouts.guess` decides
        by names and biases; `print(plan)` shows the result, and where it is an assumption.
      min_kept: number of blocks that each matrix keeps at least, whatever the sparsity; or `"outputs"`: a block in each
        column of the grid, so that no output is cut off. With `scope="global"` no layer keeps less either. By default
        `"outputs"` for last layers, whose number of outputs is no kernel's number of inputs, and 0 for others.

    Raises:
      ValueError: if an option is out of range, a pattern or the predicate matches nothing, or no pruned leaf, nothing
        is left to prune, a layer would keep no block, two leaves have the same path, or a view does not fit.
      TypeError: if a layer to be pruned is not floating point, or `where` is not callable.

    Warns:
      UserWarning: once for a plan, naming the layers that keep fewer blocks than their grids have columns: outputs
        without any weight are constant.
    """
    return planner(
        block=block,
        sparsity=sparsity,
        min_blocks=min_blocks,
        where=where,
        overrides=overrides,
        views=views,
        min_kept=min_kept,
    )(params)


def planner(
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    **options: Unpack[PlanOptions],
) -> Callable[[Any], Plan]:
    """`plan` with these options as a function of the parameters, which computes the plan of a tree only once.

    It remembers the plans of a few trees by their leaves' paths, shapes and dtypes, and keeps no array alive.

    Args: those of `plan`, checked at once.

    Raises:
      ValueError, TypeError: see `plan`.
    """
    defaults, checked = check_options(block, sparsity, **options)
    where, views = options.get("where", named_as_kernel), options.get("views") or {}

    @functools.lru_cache(maxsize=8)
    def plan_leaves(leaves: tuple[_Leaf, ...]) -> Plan:
        return _plan_leaves(leaves, defaults, where, checked, views)

    return lambda params: plan_leaves(_leaves(params))


def readings(params: Any, views: Views | None = None) -> tuple[LeafPlan, ...]:
    """How each leaf is read as matrices, with one block a weight and nothing pruned.

    Args:
      params: as `plan` takes it.
      views: as `plan` takes them.

    Raises:
      ValueError: if the tree has no leaves, or a view does not fit.
    """
    leaves = _leaves(params)
    found = _readings(leaves, views or {}, {})
    return tuple(_layer(leaf, 1, 0.0, 1, 0, lambda path: False, found.get(leaf.path)) for leaf in leaves)


class _Leaf(NamedTuple):
    """What a plan depends on in a leaf of a parameter tree."""

    path: str
    attribute: str  # the last of its keys that is an attribute, as in Equinox's modules; empty if none is
    shape: tuple[int, ...]
    dtype: Any


def _leaves(params: Any) -> tuple[_Leaf, ...]:
    def leaf_of(keys: tuple[Any, ...], leaf: Any) -> _Leaf:
        attributes = [key.name for key in keys if isinstance(key, jax.tree_util.GetAttrKey)]
        shape, dtype = tuple(getattr(leaf, "shape", ())), getattr(leaf, "dtype", None)
        return _Leaf(path_string(keys), attributes[-1] if attributes else "", shape, dtype)

    leaves = tuple(leaf_of(keys, leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(params))
    if not leaves:
        raise ValueError(f"the parameter tree has no leaves: {params!r:.80}")
    return leaves


def _plan_leaves(
    leaves: tuple[_Leaf, ...],
    defaults: dict[str, Any],
    where: Callable[[str], bool],
    overrides: dict[str, dict[str, Any]],
    views: Views,
) -> Plan:
    paths = [leaf.path for leaf in leaves]
    if repeated := [path for path, n in collections.Counter(paths).items() if n > 1]:
        raise ValueError(f"two leaves of the parameter tree have the path {repeated[0]!r}: rename one of their keys")
    for what, patterns in (("override", overrides), ("the view of", views)):
        for pattern in patterns:
            if not any(_matches(path, pattern) for path in paths):
                raise ValueError(f"{what} {pattern!r} matches no leaf{_nearest(pattern, paths)}")
    readings = _readings(leaves, views, overrides)
    last = last_layers(
        {
            leaf.path: (reading.view, leaf.shape)
            for leaf in leaves
            if (reading := readings.get(leaf.path)) and reading.view and not non_kernel_kind(leaf.path)
        }
    )
    layers = []
    for leaf in leaves:
        matching = [override for pattern, override in overrides.items() if _matches(leaf.path, pattern)]
        options = defaults | overrides.get(leaf.path, matching[0] if matching else {})
        if options["min_kept"] is None and leaf.path not in last:
            options["min_kept"] = 0
        layers.append(_layer(leaf, **options, where=where, reading=readings.get(leaf.path)))
    for pattern in overrides:
        matched = [layer for layer in layers if _matches(layer.path, pattern)]
        if all(layer.skip_reason for layer in matched):
            first = next((layer for layer in matched if layer.is_kernel), matched[0])
            remedy = _REMEDIES.get(first.skip_reason.split()[0], "")
            raise ValueError(
                f"override {pattern!r} changes nothing, for {first.path} stays dense: {first.skip_reason}{remedy}"
            )
    result = Plan(tuple(layers))
    if not result.pruned:
        dense = [f"  {la.path} {la.shape}: {la.skip_reason}" for la in layers if len(la.shape) > 1]
        raise ValueError(
            f"nothing to prune with block={defaults['block']} and min_blocks={defaults['min_blocks']}: choose smaller "
            "blocks, a smaller min_blocks or another predicate. Leaves of 2 and more dimensions:\n"
            + "\n".join(dense or ["  none"])
        )
    warn_of_outputs_cut_off(result)
    return result


def stays_dense(path: str, leaf: Any, skip_reason: str) -> LeafPlan:
    """A leaf that no algorithm touches: a kernel counts as one block."""
    shape = tuple(getattr(leaf, "shape", ()))
    if not 2 <= len(shape) <= 5 or 0 in shape:
        return _no_kernel(path, shape, f"not a kernel ({len(shape)}-D)")
    if other := non_kernel_kind(path):
        return _no_kernel(path, shape, other)
    return LeafPlan(path, shape, blk.matrix_shape(shape), (1, 1), 1, 0.0, skip_reason)


def _no_kernel(path: str, shape: tuple[int, ...], reason: str) -> LeafPlan:
    return LeafPlan(path, shape, (1, 1), (0, 0), 0, 0.0, reason)


_REMEDIES = {  # by the beginning of a reason
    "fewer": "; the override may set `min_blocks` too",
    "depthwise": "; to prune it all the same, give its path instead of a pattern",
    "perhaps": "; if it is not, give its path instead of a pattern, or its view",
}


class _Reading(NamedTuple):
    """How a leaf is read: by a view of the user's, or by a guess."""

    view: View | None  # None where it holds no matrix
    sure: bool
    dense: str  # why it stays dense, if that is told by its layout
    by_user: bool

    @property
    def batch(self) -> tuple[int, ...]:
        return self.view.batch if self.view else ()


def _readings(leaves: Sequence[_Leaf], user_views: Views, overrides: Overrides) -> dict[str, _Reading]:
    """How each leaf of two or more axes is read, by path."""
    leaf_shapes, readings = layouts.LeafShapes({leaf.path: leaf.shape for leaf in leaves}), {}
    misfits, fitting = dict[str, Exception](), set[str]()
    for path, attribute, shape, _ in leaves:
        if len(shape) > 1:
            name = path.rpartition("/")[2]  # in Equinox modules an attribute, whatever the surrounding tree is
            outputs_first = attribute == name and name in _OUTPUTS_FIRST
            guess = layouts.guess(path, shape, leaf_shapes, outputs_first)
            named_by_user = path in user_views or path in overrides
            readings[path] = _Reading(guess.view, guess.sure, "" if named_by_user else guess.dense, by_user=False)
        if matching := [pattern for pattern in user_views if _matches(path, pattern)]:
            pattern = path if path in user_views else matching[0]
            try:
                view = views.as_view(user_views[pattern], len(shape))
            except (ValueError, TypeError) as error:
                misfits.setdefault(pattern, type(error)(f"{path}, of shape {shape}: {error}"))
                continue  # a pattern may match leaves that are no kernels, such as scales
            fitting.add(pattern)
            dense = readings[path].dense if path in readings else ""
            if dense == layouts.PERHAPS_DEPTHWISE and _roles(view) != _roles(readings[path].view):
                dense = ""  # the view says what the shape does not
            readings[path] = _Reading(view, sure=True, dense=dense, by_user=True)
    if unfit := [misfit for pattern, misfit in misfits.items() if pattern not in fitting]:
        raise unfit[0]
    return readings


def _roles(view: View | None) -> list[set[int]]:
    return [set(axes) for axes in view or ()]


def _layer(
    leaf: _Leaf,
    block: int | Sequence[int | None],
    sparsity: float,
    min_blocks: int,
    min_kept: int | str | None,
    where: Callable[[str], bool],
    reading: _Reading | None,
) -> LeafPlan:
    path, shape = leaf.path, leaf.shape
    if reading is None or 0 in shape or not (2 <= len(shape) <= 5 + len(reading.batch) or reading.by_user):
        return _no_kernel(path, shape, f"not a kernel ({len(shape)}-D)")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return _no_kernel(path, shape, f"not a kernel ({leaf.dtype})")
    if not where(path) and (other := non_kernel_kind(path)):
        return _no_kernel(path, shape, other)
    if reading.view is None:
        return _no_kernel(path, shape, VECTORS)
    view, sides = reading.view, blk.as_block(block, reading.view.matrix(shape))
    grid = blk.grid_shape(shape, sides, view)
    each = math.prod(grid)
    layer = LeafPlan(path, shape, sides, grid, each * math.prod(view.stack(shape)), 0.0, "")
    if view != views.default(len(shape)):
        layer = layer._replace(view=view)
    layer = layer._replace(assumed=not reading.sure)
    if not where(path):
        return layer._replace(skip_reason="excluded by `where`")
    if reading.dense:
        return layer._replace(skip_reason=reading.dense)
    if each < min_blocks:
        return layer._replace(skip_reason=f"fewer than {min_blocks} blocks")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"{path} has dtype {leaf.dtype}: only floating-point kernels can be pruned, see `where`")
    if min_kept is None:  # a last layer; in a grid of one row, each pruned block cuts its outputs off
        min_kept = OUTPUTS if grid[0] > 1 else 0
    layer = layer._replace(min_kept=min_kept)
    kept_each = layer.kept_each_at(sparsity)
    if kept_each == 0:
        digits = 10 ** len(str(each))
        raise ValueError(
            f"sparsity {sparsity} leaves no block of the {each} in {path}: "
            f"lower it to at most {(each - 1) * digits // each / digits} there (see `overrides`) or use smaller blocks"
        )
    if kept_each > select.kept_blocks(each, sparsity):
        sparsity = 1 - kept_each / each
    return layer._replace(kept=kept_each * math.prod(layer.stack), sparsity=sparsity)


def _matches(path: str, pattern: str) -> bool:
    """A path matches itself even where its characters mean something else in a pattern."""
    return path == pattern or fnmatch.fnmatchcase(path, pattern)


def _nearest(pattern: str, paths: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)
    return f"; nearest: {close[0]!r}" if close else ""
