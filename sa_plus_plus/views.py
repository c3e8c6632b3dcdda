"""How a leaf is read as matrices: which of its axes are rows, which are columns, and which enumerate layers.

A leaf of shape `(d1, ..., dr, c_out)` is by default one matrix with all axes but the last as rows (paper, section 4). A
view describes other layouts: attention kernels have several output axes, Equinox weights have outputs first, and layers
stacked by `nn.scan` or `vmap` are one matrix per layer.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
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


class Guess(NamedTuple):
    """How a leaf is read if no view is given.

    Attributes:
      view: the view; None if the leaf holds only a vector, or one for each of several layers.
      sure: False if the leaf is ambiguous.
    """

    view: View | None
    sure: bool


_PROJECTIONS = ("query", "key", "value", "q", "k", "v")  # attention: one input axis, heads and their size out
_OUTPUTS = ("out", "attention_output", "output", "o")  # attention: heads and their size in, one axis out
_BIASES = ("bias", "b")
_MARKS = (*_BIASES, "scale", "offset", "gamma", "beta")  # leaves of one axis, if layers are not stacked

Shape = tuple[int, ...]


class Tree:
    """The shapes of all leaves by path, to look up the neighbours of a leaf.

    Args:
      shapes: by path, keys joined by `/`.
    """

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = shapes
        self._leading: dict[str, Shape] = {}  # by module: leading axes shared by all its leaves, excluding their last
        marked, deep = set(), set()  # modules that have a bias or a scale; those with a leaf of three axes and more
        for path, shape in shapes.items():
            mark = path.rpartition("/")[2] in _MARKS
            leading = (_vector(shape) if mark else shape)[:-1]
            for module in _modules(path):
                self._leading[module] = _common(self._leading.get(module, leading), leading)
                marked |= {module} if mark else set()
                deep |= {module} if len(shape) > 2 and not mark else set()
        self._telling = marked & deep

    def bias(self, path: str) -> Shape | None:
        """The shape of the bias beside a leaf."""
        module, _, own = path.rpartition("/")
        beside = [f"{module}/{name}" if module else name for name in _BIASES if name != own]
        return next((self.shapes[other] for other in beside if self.shapes.get(other)), None)

    def stack(self, path: str) -> Shape:
        """Sides of the axes that enumerate layers, from the nearest module around a leaf that determines them.

        That is a module with a bias or scale and with a kernel that may be stacked. Layers are stacked if all its
        leaves begin with the same axes.
        """
        return next((self._leading[module] for module in _modules(path) if module in self._telling), ())


def _modules(path: str) -> Iterator[str]:
    """All modules around a leaf, the nearest first; the last is the whole tree.

    >>> list(_modules("encoder/dense/kernel"))
    ['encoder/dense', 'encoder', '']
    """
    while path:
        path = path.rpartition("/")[0]
        yield path


def _common(a: Shape, b: Shape) -> Shape:
    """The common beginning of two shapes."""
    return tuple(x for x, _ in itertools.takewhile(lambda sides: sides[0] == sides[1], zip(a, b, strict=False)))


def _vector(shape: Shape) -> Shape:
    """A shape without trailing axes of length 1, which Equinox adds to biases for each axis of an image."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


def guess(path: str, shape: Shape, tree: Tree, outputs_first: bool = False) -> Guess:
    """How a leaf is read, from its name, its bias and its neighbours.

    The outputs are the last axis, or as many axes as the bias has. A bias that begins with the leaf's first axes
    belongs to stacked layers, as from `nn.scan`, `nnx.vmap` and `eqx.filter_vmap`; without a bias, layers are stacked
    if all leaves of the nearest module with a bias or a scale begin with the same axes. Three axes under the names that
    flax and Keras give to attention projections are `d (h k)`. A bias as long as the second-to-last axis is that of a
    transposed convolution in Keras or Haiku, `h w o i`. An Equinox weight with its bias's shape is that of a norm.

    Args:
      path: of the leaf, keys joined by `/`.
      shape: of the leaf, 2 axes or more.
      tree: all leaves.
      outputs_first: whether weights are `(outputs, inputs, ...)`, as in Equinox and PyTorch.

    Returns:
      The view; not sure for three axes without any such hint, which may be a convolution over one axis, attention
      heads or stacked layers, and if a bias fits in two ways or in none.
    """
    bias, stack = tree.bias(path), len(tree.stack(path))
    if len(shape) < 2 + stack or (outputs_first and bias == shape):
        return Guess(None, True)
    if len(shape) == 2:
        return Guess(_outputs_first(2) if outputs_first else default(2), True)
    if outputs_first:
        stacks = list(_stacks_outputs_first(shape, bias)) if bias else [stack]
        stack = (stacks or [0])[0]
        sure = len(stacks) == 1 and (bias is not None or len(shape) - stack != 3)
        return Guess(_stacked(_outputs_first(len(shape) - stack), stack), sure)
    if bias:
        return _by_bias(shape, bias, "transpose" in path.lower())
    inner, parent = len(shape) - stack, path.rpartition("/")[0].rpartition("/")[2]
    outputs = 2 if inner == 3 and parent in _PROJECTIONS else 1
    return Guess(_stacked(_outputs_last(inner, outputs), stack), inner != 3 or parent in (*_PROJECTIONS, *_OUTPUTS))


def _by_bias(shape: Shape, bias: Shape, transposed: bool) -> Guess:
    """Outputs last, as many axes as the bias has; `transposed` if the name allows them on the second-to-last axis."""
    stacks = list(_stacks_outputs_last(shape, bias))
    last_but_one = bias == shape[-2:-1]
    if not stacks and last_but_one:
        return Guess(_transposed(len(shape)), True)
    stack = (stacks or [0])[0]
    view = _outputs_last(len(shape) - stack, len(bias) - stack if stacks else 1)
    return Guess(_stacked(view, stack), len(stacks) == 1 and not (transposed and last_but_one))


def _stacks_outputs_last(shape: Shape, bias: Shape) -> Iterator[int]:
    """How many leading axes may enumerate layers, if the bias has these and then the leaf's last axes."""
    for stack in range(len(bias) if len(bias) < len(shape) else 0):
        if bias == shape[:stack] + shape[len(shape) - len(bias) + stack :]:
            yield stack


def _stacks_outputs_first(shape: Shape, bias: Shape) -> Iterator[int]:
    """The same, if the bias has these, then the outputs, then an axis of length 1 for each axis of an image."""
    for stack in range(min(len(bias), len(shape) - 1)):
        if bias[: stack + 1] == shape[: stack + 1] and set(bias[stack + 1 :]) <= {1}:
            yield stack


def _outputs_last(ndim: int, outputs: int) -> View:
    return View((), tuple(range(ndim - outputs)), tuple(range(ndim - outputs, ndim)))


def _outputs_first(ndim: int) -> View:
    """A convolution kernel with outputs first; its rows are ordered as with outputs last: spatial axes, then inputs."""
    return View((), (*range(2, ndim), 1), (0,))


def _transposed(ndim: int) -> View:
    """A transposed convolution of Keras or Haiku, whose outputs come before its inputs."""
    return View((), (*range(ndim - 2), ndim - 1), (ndim - 2,))


def _stacked(view: View, stack: int) -> View:
    """The view of one layer, or of a stack of such layers, enumerated by the first axes."""
    return View(tuple(range(stack)), *(tuple(axis + stack for axis in axes) for axes in (view.rows, view.cols)))
