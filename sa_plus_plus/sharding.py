"""Sharding of masks and logits on a mesh; blocks under meshes with explicit axes (the default of `jax.make_mesh`)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import LeafPlan

_Static = TypeVar("_Static")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def of_grid(layer: LeafPlan, kernel: Any) -> NamedSharding | None:
    """The sharding of a layer's grid that follows its kernel: each device holds the masks and logits of its own blocks.

    Rows of blocks are sharded if the kernel is sharded along the slowest of its axes that are read as rows and each
    device has whole blocks; likewise for columns. Stacked layers are sharded like their axis. All else is replicated.

    Args:
      layer: the kernel's plan.
      kernel: an array, or a value that is traced under a mesh with explicit axes.

    Returns:
      None if no axis of the grid is sharded.
    """
    sharding = jax.typeof(kernel).sharding if isinstance(kernel, jax.core.Tracer) else getattr(kernel, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    spec = (*sharding.spec, *[None] * (len(layer.shape) - len(sharding.spec)))
    view = blk.view_of(layer.shape, layer.view)

    def along(axes: Sequence[int], length: int, side: int) -> Any:
        first, *others = (spec[axis] for axis in axes)
        names = (first,) if isinstance(first, str) else tuple(first or ())
        parts = math.prod(sharding.mesh.shape[name] for name in names)
        return first if not any(others) and length % (parts * side) == 0 else None

    (rows, cols), (b_r, b_c) = view.matrix(layer.shape), layer.block
    split = [*(spec[axis] for axis in view.batch), along(view.rows, rows, b_r), along(view.cols, cols, b_c)]
    return NamedSharding(sharding.mesh, PartitionSpec(*split)) if any(split) else None


def explicit_mesh(tree: Any) -> Any:
    """The mesh with explicit axes on which an array of the tree is laid out; None if there is none."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def automatic(
    like: Callable[Concatenate[_Static, _P], Any],
) -> Callable[[Callable[Concatenate[_Static, _P], _R]], Callable[Concatenate[_Static, _P], _R]]:
    """Decorator of `fn(static, *arrays)`: under a mesh with explicit axes, all axes are automatic inside.

    Cutting a kernel into blocks reshapes its axes, and JAX refuses to reshape an axis that is explicitly sharded, since
    the result's sharding would be ambiguous. The layout of intermediate values is therefore left to the compiler.

    Args:
      like: takes the same arguments and returns a tree with the structure of the result, each array laid out as the
        result should be; called only if there is such a mesh. Arrays without a mesh are replicated.
    """

    def decorator(fn: Callable[Concatenate[_Static, _P], _R]) -> Callable[Concatenate[_Static, _P], _R]:
        @functools.wraps(fn)
        def wrapped(static: _Static, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            mesh = explicit_mesh((args, kwargs))
            if mesh is None:
                return fn(static, *args, **kwargs)
            layout = jax.tree.map(lambda leaf: _sharding(leaf, mesh), like(static, *args, **kwargs))
            inside = jax.sharding.auto_axes(lambda args, kwargs: fn(static, *args, **kwargs), out_sharding=layout)
            return inside(args, kwargs)

        return wrapped

    return decorator


def _sharding(leaf: Any, mesh: Any) -> NamedSharding:
    sharding = jax.typeof(leaf).sharding
    return NamedSharding(mesh, sharding.spec if sharding.mesh.axis_names else PartitionSpec())
