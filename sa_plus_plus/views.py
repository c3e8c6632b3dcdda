"""How a leaf is read as matrices: which of its axes are rows, which are columns, and which number layers.

A leaf of shape `(d1, ..., dr, c_out)` is by default one matrix, all axes but the last its rows (paper, section 4). A
view says otherwise: attention kernels have several output axes, Equinox's weights have outputs first, and layers
stacked by `nn.scan` or `vmap` are as many matrices as there are layers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class View(NamedTuple):
    """The axes of a leaf, each in one of three roles and in the order in which they are read.

    Attributes:
      batch: axes that number separate matrices.
      rows: axes that are read as rows, the first the slowest.
      cols: axes that are read as columns, the first the slowest.
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

    >>> default(4)
    View(batch=(), rows=(0, 1, 2), cols=(3,))
    """
    return View((), tuple(range(ndim - 1)), (ndim - 1,))


def as_view(view: Viewable, ndim: int) -> View:
    """A view of a leaf of `ndim` axes, from how users write it.

    Text names the axes in their order, in parentheses those that are read as one, in brackets those that number
    matrices: `"d (h k)"`, `"[l] i o"`. An arrow tells how they are read if that is another order: `"o i -> i o"`.

    Args:
      view: such text; optax's `MuonDimensionNumbers(reduction_axis, output_axis)`, all other axes numbering matrices;
        or a `View`.
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
    """Axes as numbers from 0; one that is out of range stays so."""
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
        other, own = _groups(left, text)
        names = [name for group in own for name in group] if not other else re.findall(r"\w+", left)
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
    """The names in brackets, and the groups of others."""
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


class Guess(NamedTuple):
    """How a leaf is read if nobody says.

    Attributes:
      view: how.
      sure: False where the leaf could as well be meant otherwise.
    """

    view: View
    sure: bool


_PROJECTIONS = ("query", "key", "value", "q", "k", "v")  # of attention: one axis in, heads and their width out
_OUTPUTS = ("out", "attention_output", "output", "o")  # of attention: heads and their width in, one axis out
_BIASES, _MARKS = ("bias", "b"), ("bias", "b", "scale", "offset")  # leaves of one axis, if layers are not stacked

Shape = tuple[int, ...]


class Tree:
    """The shapes of all leaves by path, for what stands beside a leaf.

    Args:
      shapes: by path, keys joined by `/`.
    """

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = shapes
        self._stacks: dict[str, int] = {}  # by module: how many layers all its leaves begin with; 0: they do not
        self._marked: set[str] = set()  # modules that have a bias or a scale
        for path, shape in shapes.items():
            *modules, name = path.split("/")
            first = shape[0] if len(shape) > 1 else 0
            for depth in range(1, len(modules) + 1):
                module = "/".join(modules[:depth])
                self._stacks[module] = first if self._stacks.get(module, first) == first else 0
                if name in _MARKS:
                    self._marked.add(module)

    def bias(self, module: str) -> Shape | None:
        """The shape of a module's bias."""
        found = [self.shapes.get(f"{module}/{name}" if module else name) for name in _BIASES]
        return next((shape for shape in found if shape), None)

    def stacked(self, path: str, layers: int) -> bool:
        """Whether the nearest module around a leaf that has a bias or scale is a stack of so many layers."""
        module = path
        while "/" in module:
            module = module.rpartition("/")[0]
            if module in self._marked:
                return self._stacks[module] == layers
        return False


def guess(path: str, shape: Shape, tree: Tree, outputs_first: bool = False) -> Guess:
    """How a leaf is read, by its name, its bias and what stands beside it.

    The outputs are the last axis, or as many as the bias has. A bias that begins with the leaf's first axis too belongs
    to stacked layers, as `nn.scan`, `nnx.vmap` and `eqx.filter_vmap` make them; without a bias, layers are stacked if
    all leaves of the nearest module with a bias or a scale begin with the same axis. Three axes under the names that
    flax and Keras give to attention projections are `d (h k)`.

    Args:
      path: of the leaf, keys joined by `/`.
      shape: of the leaf, 2 axes or more.
      tree: all leaves.
      outputs_first: whether weights are `(outputs, inputs, ...)`, as Equinox's and PyTorch's.

    Returns:
      The view; not sure for three axes without any such sign, which may be a convolution over one axis, attention's
      heads or stacked layers, and where a bias fits in two ways.
    """
    module = path.rpartition("/")[0]
    bias = tree.bias(module)
    if outputs_first:
        return _outputs_first(path, shape, bias, tree)
    parent = module.rpartition("/")[2]
    if len(shape) < 3:
        return Guess(default(len(shape)), True)
    if bias:
        own = len(bias) < len(shape) and bias == shape[-len(bias) :]
        layers = len(bias) > 1 and bias == (shape[0], *shape[1 - len(bias) :])
        stacked = layers and not own
        outputs = len(bias) - stacked if own or layers else 1
        return Guess(_stacked(_outputs_last(len(shape) - stacked, outputs), stacked), own != layers)
    stacked = tree.stacked(path, shape[0])
    inner = len(shape) - stacked
    if inner == 3 and parent in _PROJECTIONS:
        return Guess(_stacked(_outputs_last(3, 2), stacked), True)
    return Guess(_stacked(default(inner), stacked), inner != 3 or parent in _OUTPUTS)


def _outputs_first(path: str, shape: Shape, bias: Shape | None, tree: Tree) -> Guess:
    if bias:  # of a convolution: one axis of length 1 for each axis of its images
        stacked = len(shape) > 2 and len(bias) > 1 and bias[:2] == shape[:2] and shape[1] > 1
    else:
        stacked = len(shape) > 2 and tree.stacked(path, shape[0])
    inner = len(shape) - stacked
    return Guess(_stacked(View((), (*range(2, inner), 1), (0,)), stacked), True)


def _outputs_last(ndim: int, outputs: int) -> View:
    return View((), tuple(range(ndim - outputs)), tuple(range(ndim - outputs, ndim)))


def _stacked(view: View, stacked: bool) -> View:
    """The view of one layer, or that of a stack of such layers, whose first axis numbers them."""
    if not stacked:
        return view
    return View((0,), *(tuple(axis + 1 for axis in axes) for axes in (view.rows, view.cols)))
