"""Where masks and logits lie on a mesh; blocks under meshes with explicit axes, as `jax.make_mesh` makes them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import LeafPlan


def of_grid(layer: LeafPlan, kernel: Any) -> NamedSharding | None:
    """How a layer's grid is split as its kernel is, so that each device holds the masks and logits of its own blocks.

    Rows of blocks are split where a kernel is split along the slowest of its axes that are read as rows and each device
    has whole blocks; the same for columns. Stacked layers are split as their axis is. Whatever else is replicated.

    Args:
      layer: the kernel's plan.
      kernel: an array, or a value that is traced under a mesh with explicit axes.

    Returns:
      None where nothing of the grid is split.
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
    """The mesh with explicit axes that an array of the tree is laid out on; None where there is none."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def automatic(fn: Callable[..., Any], like: Callable[[], Any], *args: Any) -> Any:
    """`fn(*args)`, under a mesh with explicit axes with all of them automatic inside.

    Cutting a kernel into blocks reshapes its axes, and JAX refuses to reshape an axis that is explicitly sharded, since
    the result's sharding would be ambiguous. The layout of what is in between is therefore left to the compiler.

    Args:
      fn: a function of arrays.
      like: gives a tree of the structure of the result, each array laid out as the result is to be; called only where
        there is such a mesh. What lies on no mesh is replicated.
      args: its arguments.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return fn(*args)
    layout = jax.tree.map(lambda leaf: _sharding(leaf, mesh), like())
    return jax.sharding.auto_axes(fn, out_sharding=layout)(*args)


def _sharding(leaf: Any, mesh: Any) -> NamedSharding:
    own = jax.typeof(leaf).sharding
    return NamedSharding(mesh, own.spec if own.mesh.axis_names else PartitionSpec())
