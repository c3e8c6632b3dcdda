"""Blocks under meshes with explicit axes, which are what `jax.make_mesh` makes by default."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


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
