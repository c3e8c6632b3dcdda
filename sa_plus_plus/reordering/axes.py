"""Which axes of a function's parameters may be permuted together without changing what it computes.

Each axis is a product of factors (`factors`). Walking through the traced function unites the factors that have to be
permuted alike and pins those whose order matters (`walk`, `primitives`). A factor that is left is a group: dimensions
of a residual stream, hidden units, channels, heads. A factor may be permuted differently for each element of another,
such as the dimensions within each head, if every value that has it has the other too.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sa_plus_plus.planning import path_string
from sa_plus_plus.reordering.factors import Array, Axis, Factors
from sa_plus_plus.reordering.walk import Step, Walk

LARGEST = 1 << 22  # entries of a permutation; above, it is one for all


class Place(NamedTuple):
    """Where a group occurs: an axis of a leaf, or a factor of one, the slowest being 0."""

    path: str
    axis: int
    factor: int | None = None

    def __str__(self) -> str:
        return f"{self.path} axis {self.axis}" + ("" if self.factor is None else f" factor {self.factor}")


class Group(NamedTuple):
    """Axes, or factors of axes, that are permuted together.

    Attributes:
      name: of one of them.
      size: their number of elements.
      within: groups or fixed factors, by number in `Axes.sizes`, for each of whose elements the order may be another.
      places: where it occurs, in the order of the parameter tree.
    """

    name: str
    size: int
    within: tuple[int, ...]
    places: tuple[Place, ...]


class Fixed(NamedTuple):
    """A factor of an axis that cannot be permuted.

    Attributes:
      place: the leaf and the axis.
      size: of the factor.
      reason: what depends on its order.
    """

    place: Place
    size: int
    reason: str


class Axes(NamedTuple):
    """The factors of all leaves, and which of them may be permuted.

    Attributes:
      tree: structure of the parameters.
      shapes: of the leaves, by path.
      leaves: by path: for each axis, the numbers of its factors, slowest first.
      sizes: of each factor.
      groups: those that may be permuted, by the factor's number; a group comes after those that it is within.
      fixed: those that may not.
    """

    tree: Any
    shapes: dict[str, tuple[int, ...]]
    leaves: dict[str, tuple[tuple[int, ...], ...]]
    sizes: dict[int, int]
    groups: dict[int, Group]
    fixed: tuple[Fixed, ...]


def find(fn: Callable[..., Any], params: Any, *inputs: Any) -> Axes:
    """The groups of axes of a function's parameters that may be permuted together.

    Args:
      fn: `fn(params, *inputs)`, jittable.
      params: tree of arrays, or of their shapes and dtypes.
      inputs: example inputs, or their shapes and dtypes. Their axes and those of the results keep their order.

    Raises:
      ValueError: if two leaves have the same path.
    """
    closed = jax.make_jaxpr(fn)(params, *inputs)
    walk = Walk()
    factors = walk.factors
    found, tree = jax.tree_util.tree_flatten_with_path(params)
    shapes = {path_string(keys): tuple(np.shape(leaf)) for keys, leaf in found}
    if len(shapes) < len(found):
        raise ValueError("two leaves of the parameter tree have the same path: rename one of their keys")
    leaves = {path: factors.array(shape) for path, shape in shapes.items()}
    given = [factors.array(np.shape(x), "an input has it") for x in jax.tree.leaves(inputs)]
    results = walk.run(closed, [*leaves.values(), *given])
    factors.pin_all(results, "the function returns it")
    _pin_unused(factors, closed, leaves)
    of_leaves = {path: tuple(map(factors.resolve, axes)) for path, axes in leaves.items()}
    places: dict[int, list[Place]] = {}
    for path, axes in of_leaves.items():
        for axis, numbers in enumerate(axes):
            for i, factor in enumerate(numbers):
                places.setdefault(factor, []).append(Place(path, axis, i if len(numbers) > 1 else None))
    free = [factor for factor in places if not factors.reason(factor)]
    within = _within(factors, free, list(of_leaves.values()), walk.steps)
    groups = {
        factor: Group(_name(places[factor], shapes), factors.sizes[factor], within[factor], tuple(places[factor]))
        for factor in _ordered(free, within)
    }
    fixed = [
        Fixed(place, factors.sizes[factor], factors.reason(factor))
        for factor, all_places in places.items()
        if factor not in groups
        for place in all_places
    ]
    return Axes(tree, shapes, of_leaves, {factor: factors.sizes[factor] for factor in places}, groups, tuple(fixed))


def _pin_unused(factors: Factors, closed: Any, leaves: dict[str, Array]) -> None:
    program = closed.jaxpr
    used = {id(atom) for eqn in program.eqns for atom in eqn.invars} | {id(atom) for atom in program.outvars}
    for variable, array in zip(program.invars, leaves.values(), strict=False):
        if id(variable) not in used:
            factors.pin_all([array], "the function does not use the leaf")


def _name(places: Sequence[Place], shapes: dict[str, tuple[int, ...]]) -> str:
    """The place in the first kernel that has the group, rather than in a bias."""
    return str(next((place for place in places if len(shapes[place.path]) > 1), places[0]))


def _within(
    factors: Factors, free: Sequence[int], leaves: list[Array], steps: Sequence[Step]
) -> dict[int, tuple[int, ...]]:
    """For each free factor the factors for each of whose elements its order may be another.

    Every value that has the factor has to have the other too, once, and every product that pairs the factor pairs the
    other too. No operation on both may compute an element of the other from others of it, unless a product contracts
    both. The iterations of a loop count as a factor of all values in the loop.
    """
    of_leaves = {factor for array in leaves for axis in array for factor in axis}
    possible: dict[int, set[int]] = {factor: of_leaves - {factor} for factor in free}
    wanted = set(free)

    def resolved(axes: Sequence[Axis]) -> set[int]:
        return {factor for axis in axes for factor in factors.resolve(axis)}

    def narrow(array: Array, loops: Axis) -> None:
        numbers = [factor for axis in array for factor in axis]
        count = collections.Counter((*numbers, *loops))
        for factor in wanted.intersection(numbers):
            possible[factor] &= {other for other, n in count.items() if n == 1} if count[factor] == 1 else set()

    for array in leaves:
        narrow(array, ())
    for step in steps:
        loops = factors.resolve(step.loops)
        arrays = {tuple(map(factors.resolve, value)) for value in step.values}
        for array in arrays:
            narrow(array, loops)
        paired, mixed = resolved(step.pairs or ()), resolved(step.mixed)
        for factor in wanted & paired:
            possible[factor] &= paired.union(loops)
        for factor in wanted & {factor for array in arrays for axis in array for factor in axis} - mixed:
            possible[factor] -= mixed
    misfits = resolved(factors.misfits)
    for factor in free:
        possible[factor] -= misfits
    found: dict[int, tuple[int, ...]] = {}
    for factor in sorted(free, reverse=True):  # parts of an axis are numbered from the slowest
        others = tuple(sorted(p for p in possible[factor] if not _depends(p, factor, found)))
        entries = factors.sizes[factor] * math.prod(factors.sizes[other] for other in others)
        found[factor] = others if entries <= LARGEST else ()
    return found


def _depends(one: int, other: int, within: dict[int, tuple[int, ...]]) -> bool:
    return any(p == other or _depends(p, other, within) for p in within.get(one, ()))


def _ordered(free: Sequence[int], within: dict[int, tuple[int, ...]]) -> list[int]:
    """The factors, each after those that it is within."""
    found: list[int] = []

    def add(factor: int) -> None:
        if factor in within and factor not in found:
            for other in within[factor]:
                add(other)
            found.append(factor)

    for factor in free:
        add(factor)
    return found
