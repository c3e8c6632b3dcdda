"""An order of each group of axes: applied to a tree of parameters, undone, and shown."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.planning import path_string
from sa_plus_plus.reordering.axes import Axes, Fixed, Group
from sa_plus_plus.text import table


class Order(NamedTuple):
    """Permutations of groups of axes of one parameter tree; `print` shows them.

    Attributes:
      axes: the groups, and the leaves' axes as their products.
      permutations: by the group's name, `(*within, size)`: the element that comes to each place. A group that has
        orders of its own for each element of others has one row for each of these, numbered as before.
    """

    axes: Axes
    permutations: dict[str, np.ndarray]

    @property
    def groups(self) -> tuple[Group, ...]:
        """What may be permuted."""
        return tuple(self.axes.groups.values())

    @property
    def fixed(self) -> tuple[Fixed, ...]:
        """What may not, and why."""
        return self.axes.fixed

    def apply(self, tree: Any) -> Any:
        """The tree in this order: the parameters, or anything that has trees like them, such as an optimizer's state.

        Args:
          tree: the parameters, or a tree with subtrees of the same structure; whatever else it has stays as it is.

        Raises:
          ValueError: if no part of it has the structure of the parameters, or leaves have other shapes.
        """
        found, structure = 0, self.axes.tree

        def is_like(node: Any) -> bool:
            return jax.tree.structure(node) == structure

        def one(node: Any) -> Any:
            nonlocal found
            if not is_like(node) or (jax.tree_util.treedef_is_leaf(structure) and not self._fits(node)):
                return node
            found += 1
            return self._applied(node)

        result = jax.tree.map(one, tree, is_leaf=is_like)
        if not found:
            raise ValueError(
                f"the permutations belong to parameters with the leaves {_some(self.axes.shapes)}, but no part of the "
                f"tree has this structure: its leaves are {_some(_shapes(tree))}"
            )
        return result

    @property
    def inverse(self) -> "Order":
        """The order that undoes this one."""
        permutations = {}
        for factor, group in self.axes.groups.items():
            table = self.permutations[group.name]
            for other in reversed([f for f in self.axes.groups if f in group.within]):
                table = self._take(table, other, [*group.within, factor])
            permutations[group.name] = np.argsort(table, axis=-1)
        return self._replace(permutations=permutations)

    def then(self, factor: int, table: np.ndarray) -> "Order":
        """This order followed by another of one group, whose rows are numbered as they lie in this order.

        Args:
          factor: the group's.
          table: `(*within, size)`.
        """
        group = self.axes.groups[factor]
        for other, within in self.axes.groups.items():
            if other in group.within:
                undo = self.permutations | {within.name: np.argsort(self.permutations[within.name], axis=-1)}
                table = self._replace(permutations=undo)._take(table, other, [*group.within, factor])
        composed = np.take_along_axis(self.permutations[group.name], table, axis=-1)
        return self._replace(permutations=self.permutations | {group.name: composed})

    def leaf(self, axes: tuple[tuple[int, ...], ...], leaf: Any) -> Any:
        """An array in this order.

        Args:
          axes: for each of its axes, its factors.
          leaf: the array.
        """
        factors = [factor for axis in axes for factor in axis]
        moved = [factor for factor in self.axes.groups if factor in factors and not self._is_identity(factor)]
        if not moved:
            return leaf
        shape, wide = np.shape(leaf), leaf.reshape([self.axes.sizes[factor] for factor in factors])
        # What depends on the number of another goes first, while that has its old number.
        for factor in reversed(moved):
            wide = self._take(wide, factor, factors)
        return wide.reshape(shape)

    def _fits(self, tree: Any) -> bool:
        return _shapes(tree) == self.axes.shapes

    def _applied(self, tree: Any) -> Any:
        for path, shape in _shapes(tree).items():
            if shape != self.axes.shapes[path]:
                raise ValueError(
                    f"the permutations belong to other parameters: {path} has the shape {shape} here, but "
                    f"{self.axes.shapes[path]} there"
                )

        def one(keys: Any, leaf: Any) -> Any:
            return self.leaf(self.axes.leaves[path_string(keys)], leaf)

        return jax.tree_util.tree_map_with_path(one, tree)

    def _take(self, array: Any, factor: int, factors: list[int]) -> Any:
        """An array with one axis for each factor, one of which is permuted wherever it occurs."""
        group = self.axes.groups[factor]
        order, library = self.permutations[group.name], np if isinstance(array, np.ndarray) else jnp
        for axis, here in enumerate(factors):
            if here == factor and not group.within:
                array = library.take(array, order, axis=axis)
            elif here == factor:
                places = [factors.index(other) for other in group.within]
                sides = [n if i in (*places, axis) else 1 for i, n in enumerate(array.shape)]
                rows = order.transpose(np.argsort([*places, axis])).reshape(sides)  # its axes in the array's order
                array = library.take_along_axis(array, rows, axis=axis)
        return array

    def _is_identity(self, factor: int) -> bool:
        group = self.axes.groups[factor]
        return bool((self.permutations[group.name] == np.arange(group.size)).all())

    def __str__(self) -> str:
        rows = []
        for factor, group in self.axes.groups.items():
            order = self.permutations[group.name]
            moved = float(np.mean(order != np.arange(group.size)))
            each = order.size // group.size
            leaves = len({place.path for place in group.places})
            kind = f"{each} × {group.size}" if each > 1 else str(group.size)
            rows.append((group.name, kind, str(leaves), "as it was" if self._is_identity(factor) else f"{moved:.0%}"))
        found = table(("group", "size", "leaves", "moved"), rows) if rows else "nothing can be permuted"
        reasons: dict[str, list[str]] = {}
        for place, size, reason in self.fixed:
            reasons.setdefault(reason, []).append(f"{place} ({size})")
        left = [
            (reason, ", ".join(p[:3]) + (f" and {len(p) - 3} more" if p[3:] else "")) for reason, p in reasons.items()
        ]
        return found + ("\n\n" + table(("left as they are, since", "axes"), left) if left else "")


def order_of(axes: Axes, permutations: Mapping[str, Any]) -> Order:
    """Permutations of some groups, checked; all other groups stay as they are.

    Args:
      axes: from `axes.find`.
      permutations: by the group's name, each `(*within, size)`.

    Raises:
      ValueError: for a group that these parameters do not have, another shape, or what is not a permutation.
    """
    groups = {group.name: group for group in axes.groups.values()}
    if unknown := [name for name in permutations if name not in groups]:
        raise ValueError(
            f"these parameters have no group {unknown[0]!r} of axes to permute; those they have are "
            f"{', '.join(map(repr, groups)) or 'none'}"
        )
    found = {}
    for name, group in groups.items():
        shape = (*(axes.sizes[other] for other in group.within), group.size)
        order = np.broadcast_to(np.arange(group.size), shape) if name not in permutations else permutations[name]
        order = np.asarray(order)
        if order.shape != shape:
            raise ValueError(f"the permutation of {name} has the shape {order.shape}, but the group takes {shape}")
        if not np.array_equal(np.sort(order, axis=-1), np.broadcast_to(np.arange(group.size), shape)):
            raise ValueError(f"the permutation of {name} does not have each number from 0 to {group.size - 1} once")
        found[name] = order
    return Order(axes, found)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_string(keys): tuple(np.shape(x)) for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def _some(shapes: Mapping[str, tuple[int, ...]]) -> str:
    named = [f"{path or '(root)'} {shape}" for path, shape in shapes.items()]
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if named[3:] else "")
