"""How a leaf is read as matrices: which of its axes are rows, which are columns, and which enumerate layers.

A leaf of shape `(d1, ..., dr, c_out)` is by default one matrix with all axes but the last as rows (paper, section 4). A
view describes other layouts: attention kernels have several output axes, Equinox weights have outputs first, and layers
stacked by `nn.scan` or `vmap` are one matrix per layer. `layouts` finds the view of a leaf if none is given.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple


class View(NamedTuple):
    """The axes of a leaf, each in one of three roles and in the order in which they are read.

    Attributes:
      batch: axes that enumerate separate matrices.
      rows: axes that are read as rows, slowest first.
      cols: axes that are read as columns, slowest first.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return self.batch + self.rows + self.cols

    @property
    def in_order(self) -> bool:
        """Whether the axes are read as they lie in memory, so that a reshape is all it takes."""
        return self.order == tuple(range(len(self.order)))

    def stack(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Sides of the batch axes."""
        return tuple(shape[axis] for axis in self.batch)

    def matrix(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of each matrix."""
        rows, cols = (math.prod(shape[axis] for axis in axes) for axes in (self.rows, self.cols))
        return rows, cols

    def describe(self, shape: Sequence[int]) -> str:
        """`6 × (8·64)×512`: six matrices of 512 rows, read from axes of 8 and 64, by 512 columns."""
        sides = ["·".join(str(shape[axis]) for axis in axes) for axes in (self.rows, self.cols)]
        matrix = "×".join(f"({side})" if "·" in side else side for side in sides)
        return " × ".join([*map(str, self.stack(shape)), matrix])


Viewable = Any  # a `View`, text such as "d (h k)", or optax's `MuonDimensionNumbers`


def default(ndim: int) -> View:
    """All axes but the last are rows.

    Args:
      ndim: number of axes of the leaf, at least 2.

    >>> default(4)
    View(batch=(), rows=(0, 1, 2), cols=(3,))
    """
    return View((), tuple(range(ndim - 1)), (ndim - 1,))


def as_view(view: Viewable, ndim: int) -> View:
    """A view of a leaf with `ndim` axes, from the user's notation.

    Text names the axes in order, with parentheses around those that are merged and brackets around those that enumerate
    matrices: `"d (h k)"`, `"[l] i o"`. An arrow gives the order of reading if it differs: `"o i -> i o"`.

    Args:
      view: such text; optax's `MuonDimensionNumbers(reduction_axis, output_axis)`, where all other axes enumerate
        matrices; or a `View`.
      ndim: number of axes of the leaf.

    Raises:
      ValueError: if the text cannot be read, or does not name each axis once.
      TypeError: if it is none of these.

    >>> as_view("d (h k)", 3)
    View(batch=(), rows=(0,), cols=(1, 2))
    >>> as_view("[l] o i -> [l] i o", 3)
    View(batch=(0,), rows=(2,), cols=(1,))
    """
    if isinstance(view, str):
        parsed = _parsed(view)
    elif hasattr(view, "reduction_axis") and hasattr(view, "output_axis"):
        rows, cols = (_axes(axes, ndim) for axes in (view.reduction_axis, view.output_axis))
        parsed = View(tuple(a for a in range(ndim) if a not in rows + cols), rows, cols)
    elif isinstance(view, View):
        parsed = View(*(_axes(axes, ndim) for axes in view))
    else:
        raise TypeError(
            f'a view is text such as "d (h k)", a View or optax\'s MuonDimensionNumbers, got {view!r} '
            f"of type {type(view).__name__}"
        )
    if sorted(parsed.order) != list(range(ndim)):
        named = len(parsed.order)
        what = f"names {named} axes" if len(set(parsed.order)) == named else f"names an axis twice: {parsed}"
        raise ValueError(f"the view {view!r} {what}, but the leaf has {ndim}")
    if not parsed.rows or not parsed.cols:
        raise ValueError(f"the view {view!r} leaves no axis for {'columns' if parsed.rows else 'rows'}")
    return parsed


def _axes(axes: Any, ndim: int) -> tuple[int, ...]:
    """Axes as numbers from 0; an axis that is out of range is left as it is."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    return tuple(axis + ndim if axis < 0 else axis for axis in axes)


_TOKEN = re.compile(r"\s*(?:(\w+)|\((\s*\w+(?:\s+\w+)*\s*)\)|\[(\s*\w+(?:\s+\w+)*\s*)\])")


def _parsed(text: str) -> View:
    left, arrow, right = text.partition("->")
    batch, groups = _groups(right if arrow else left, text)
    if len(groups) != 2:
        raise ValueError(
            f'the view "{text}" has {len(groups)} axes or groups besides those in brackets: it takes two, rows and '
            'columns, such as "(h k) d"'
        )
    if arrow:
        other, left_groups = _groups(left, text)
        names = [name for group in left_groups for name in group] if not other else re.findall(r"\w+", left)
    else:
        names = re.findall(r"\w+", text)
    read = [*batch, *groups[0], *groups[1]]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f'the view "{text}" names the axis {doubled!r} twice')
    if sorted(read) != sorted(names):
        differing = sorted(set(read) ^ set(names)) or sorted(name for name in read if read.count(name) > 1)
        raise ValueError(f'the view "{text}" does not have the axis {differing[0]!r} once on each side of its arrow')
    place = {name: axis for axis, name in enumerate(names)}
    rows, cols = (tuple(place[name] for name in group) for group in groups)
    return View(tuple(place[name] for name in batch), rows, cols)


def _groups(text: str, whole: str) -> tuple[list[str], list[list[str]]]:
    """The names in brackets, and the groups of the others."""
    batch: list[str] = []
    groups: list[list[str]] = []
    at = 0
    while text[at:].strip():
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(
                f'cannot read the view "{whole}" at {text[at:].strip()!r}: write names of axes, in parentheses those '
                'that are read as one, in brackets those that number matrices: "[l] d (h k)"'
            )
        if token[3]:
            batch += token[3].split()
        else:
            groups.append((token[1] or token[2]).split())
        at = token.end()
    return batch, groups
