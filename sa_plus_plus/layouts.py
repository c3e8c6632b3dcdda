"""How the leaves of frameworks' layers are laid out: the view of a leaf that is given none, and depthwise kernels.

A leaf has one reading or several, by its name and its bias. Of several the likeliest is taken, and the plan says
`assumed`. A kernel that may be depthwise stays dense: each of its columns is one small filter, with nothing to spare.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from sa_plus_plus import names
from sa_plus_plus.views import View

Shape = tuple[int, ...]

DEPTHWISE = "depthwise kernel, or of one input channel"
PERHAPS_DEPTHWISE = "perhaps a depthwise kernel"
_MOST_MULTIPLIERS = 8  # more outputs than this for each input channel are those of a convolution
_MOST_FILTER_ROWS = 8  # a matrix of a convolution that has no more rows than this is a filter for each column


class Guess(NamedTuple):
    """How a leaf is read if no view is given.

    Attributes:
      view: the view; None if the leaf holds only a vector, or one for each of several layers.
      sure: False if the leaf is ambiguous.
      dense: why it stays dense though it is a kernel: `DEPTHWISE`, `PERHAPS_DEPTHWISE` or empty.
    """

    view: View | None
    sure: bool
    dense: str = ""


class Reading(NamedTuple):
    """One way to read a leaf.

    Attributes:
      view: of the leaf.
      depthwise: whether it then has one input channel for each output.
    """

    view: View
    depthwise: bool = False


class LeafShapes:
    """The shapes of all leaves of a tree: what they say about the bias, stacking and order of each.

    Args:
      shapes: by path, keys joined by `/` or `.`.
    """

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes = {tuple(names.split_path(path)): shape for path, shape in shapes.items()}
        # by module: the axes that all its leaves begin with, the last axis of each not counted
        self._leading: dict[tuple[str, ...], Shape] = {}
        biased, deep = set(), set()  # modules that have a bias or a scale; those with a leaf of three axes and more
        for path, shape in self.shapes.items():
            vector = path[-1] in names.BIASES_AND_SCALES
            leading = (_vector(shape) if vector else shape)[:-1]
            for module in _modules(path):
                self._leading[module] = _common(self._leading.get(module, leading), leading)
                biased |= {module} if vector else set()
                deep |= {module} if len(shape) > 2 and not vector else set()
        self._stackable = biased & deep
        self._biases = {path: bias for path in self.shapes if (bias := self._bias_of(path))}
        users = collections.Counter(bias for path, bias in self._biases.items() if len(self.shapes[path]) > 1)
        self._shared = {bias for bias, n in users.items() if n > 1}
        self._orders: dict[str, set[bool]] = {}  # by name of a leaf: whether biases tell that outputs are first
        for path, bias in self._biases.items():
            shape, length = self.shapes[path], _vector(self.shapes[bias])
            first, last = length == shape[:-1], length == shape[:-2] + shape[-1:]
            if first != last and len(shape) > 1 and bias not in self._shared:
                self._orders.setdefault(_kind(path[-1]), set()).add(first)

    def _bias_of(self, path: tuple[str, ...]) -> tuple[str, ...] | None:
        *module, name = path
        if name in names.BIASES_AND_SCALES:
            return None
        candidates = [(*module, bias) for bias in (*names.bias_names(name), *names.BIASES) if bias != name]
        return next((path for path in candidates if self.shapes.get(path)), None)

    def bias(self, path: str) -> Shape | None:
        """The shape of the bias beside a leaf."""
        bias = self._biases.get(tuple(names.split_path(path)))
        return self.shapes[bias] if bias else None

    def shares_bias(self, path: str) -> bool:
        """Whether other matrices have the same bias beside them."""
        return self._biases.get(tuple(names.split_path(path))) in self._shared

    def stack(self, path: str) -> Shape:
        """Sides of the axes that enumerate layers, from the nearest module around a leaf that determines them.

        That is a module with a bias or scale and with a kernel that may be stacked. Layers are stacked if all its
        leaves begin with the same axes.
        """
        modules = _modules(tuple(names.split_path(path)))
        return next((self._leading[module] for module in modules if module in self._stackable), ())

    def orders_by_bias(self, path: str) -> set[bool]:
        """Whether matrices of the same name have their outputs first, by those of them whose biases tell."""
        return self._orders.get(_kind(names.split_path(path)[-1]), set())


def _kind(name: str) -> str:
    """The name of a leaf, one for all that are called a weight."""
    return "weight" if names.is_weight(name) else name


def _modules(path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All modules around a leaf, the nearest first; the last is the whole tree.

    >>> list(_modules(("encoder", "dense", "kernel")))
    [('encoder', 'dense'), ('encoder',), ()]
    """
    return (path[:n] for n in range(len(path) - 1, -1, -1))


def _common(a: Shape, b: Shape) -> Shape:
    """The common beginning of two shapes."""
    return tuple(x for x, _ in itertools.takewhile(lambda sides: sides[0] == sides[1], zip(a, b, strict=False)))


def _vector(shape: Shape) -> Shape:
    """A shape without trailing axes of length 1: those of a column, and Equinox's of biases for images."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


class _Leaf(NamedTuple):
    """A leaf of two axes or more, and what its neighbours say about it."""

    path: str
    module: str  # the last keys of the path
    name: str
    shape: Shape
    bias: Shape | None
    bias_shared: bool  # whether other matrices have the same bias beside them
    stack: int  # number of axes that enumerate layers, by its neighbours
    orders: set[bool]  # whether outputs are first, by the biases of leaves of that name
    equinox: bool  # an attribute of an Equinox module, whose outputs are first
    named_weight: bool  # `weight` or the like: outputs may be first

    @property
    def attention_name(self) -> bool:
        """Whether it is named like a projection of attention; three axes are then heads and two others."""
        return bool({self.module, self.name} & {*names.INPUT_PROJECTIONS, *names.OUTPUT_PROJECTIONS})


def guess(path: str, shape: Shape, leaf_shapes: LeafShapes, outputs_first: bool = False) -> Guess:
    """How a leaf is read, from its name, its bias and its neighbours.

    The outputs are the axes that are as long as the bias: the last ones, or the second-to-last of a transposed
    convolution (`h w o i` in Keras and Haiku), or the first under the name `weight`. A bias that begins with the leaf's
    first axes belongs to stacked layers, as from `nn.scan`, `nnx.vmap` and `eqx.filter_vmap`; without a bias, layers
    are stacked if all leaves of the nearest module with a bias or a scale begin with the same axes. Three axes under
    the names that flax and Keras give to attention projections are `d (h k)`. A `weight` of its bias's shape is that of
    a norm. A matrix whose sides its bias does not tell apart is `(out, in)` in Equinox and `(in, out)` elsewhere,
    unless the biases of other matrices of that name say otherwise.

    Args:
      path: of the leaf, keys joined by `/`.
      shape: of the leaf, 2 axes or more.
      leaf_shapes: of all leaves.
      outputs_first: whether weights are `(outputs, inputs, ...)`, as in Equinox.

    Returns:
      The view, and whether it is sure. It is not for three axes without any such hint, which may be a convolution over
      one axis, attention heads or stacked layers; if a bias fits in two ways or in none; for transposed convolutions
      that no bias tells from others; for a `weight` in a dict that no bias decides. Kernels that have, or may have, one
      input channel for each output are to stay dense.
    """
    module, name = ["", *names.split_path(path)][-2:]
    bias, stack = leaf_shapes.bias(path), len(leaf_shapes.stack(path))
    weight = outputs_first or names.is_weight(name)
    if len(shape) < 2 + stack or (weight and bias == shape):
        return Guess(None, True)
    if "depthwise" in name.lower():
        bias = None  # of a separable convolution: it belongs to the other kernel
    leaf = _Leaf(
        path,
        module,
        name,
        shape,
        bias,
        leaf_shapes.shares_bias(path),
        stack,
        leaf_shapes.orders_by_bias(path),
        outputs_first,
        weight,
    )
    found = _by_bias(leaf) if bias else None
    readings, sure = found or _by_name(leaf)
    view, depthwise = readings[0].view, [reading.depthwise for reading in readings]
    dense = DEPTHWISE if all(depthwise) else PERHAPS_DEPTHWISE if any(depthwise) or _may_be_filters(leaf, view) else ""
    return Guess(view, sure and len({reading.view for reading in readings}) == 1, dense)


_Readings = tuple[list[Reading], bool]  # the likeliest first, and whether it is certain if it is the only one


def _by_bias(leaf: _Leaf) -> _Readings | None:
    """The readings in which the bias is as long as the outputs; None if it fits in none."""
    if leaf.equinox:
        usual, others = _fitting(leaf, _first), _fitting(leaf, _last)
    elif leaf.named_weight:
        ordered = [_first, _last] if _filter_last(leaf.shape) else [_last, _first]
        ordered.insert(0 if _named_transposed(leaf) else 2, _second)
        usual, others = _fitting(leaf, *ordered, _before_last), []
    else:
        usual, others = _fitting(leaf, _last), _fitting(leaf, _before_last) or _fitting(leaf, _multiplier)
    if not (found := usual or others):
        return None
    stack, inner = len(found[0].view.batch), _axes_of_one(found[0].view)
    contradicted = leaf.bias_shared and not usual  # the bias may belong to another matrix
    if inner == 2 and (contradicted or leaf.shape[-1] == leaf.shape[-2]):
        readings, sure = _matrix(leaf, stack)
        several = len({len(reading.view.batch) for reading in found}) > 1
        return readings, sure and not contradicted and not several
    if usual and others and not leaf.named_weight:
        return _by_order(leaf, usual, others)
    return found, True


def _by_name(leaf: _Leaf) -> _Readings:
    """The readings of a leaf without a bias, or with one that fits nowhere."""
    inner, sure = leaf.shape[leaf.stack :], leaf.bias is None
    if len(inner) == 2:
        return _matrix(leaf, leaf.stack)

    def reading(view: View, depthwise: bool = False) -> Reading:
        return _reading(leaf, leaf.stack, view, depthwise)

    first, last = reading(_outputs_first(len(inner))), reading(_outputs_last(len(inner)))
    if leaf.equinox:
        # It may as well be a stack of depthwise kernels, whose filters have more than one point.
        stacked = len(inner) > 3 and inner[2] == 1 < math.prod(inner[3:])
        readings = [first, *([first._replace(depthwise=True)] if stacked else [])]
        return readings, sure and len(inner) > 3 and not _like_layers(inner[2:])
    if leaf.named_weight and _filter_last(inner):
        # Even a depthwise kernel has more channels than its filter is long.
        readings = [first, last._replace(depthwise=last.depthwise and inner[-1] > inner[0])]
        return [*([reading(_outputs_second(len(inner)))] if _named_transposed(leaf) else []), *readings], False
    if leaf.named_weight:
        return [last, first], False
    if len(inner) == 3 and leaf.module in names.INPUT_PROJECTIONS:
        return [reading(_outputs_last(3, 2))], sure
    if len(inner) == 3 and leaf.module in names.OUTPUT_PROJECTIONS:
        return [last], sure
    multiplied = reading(_multiplier_view(len(inner)), depthwise=True)
    filters = math.prod(inner[:-2]) > 1  # of more than one point
    if filters and names.is_depthwise(leaf.module, leaf.name):
        return [last if last.depthwise else multiplied], True
    sure &= names.filter_axes(leaf.module) == len(inner) - 2 or not _like_layers(inner[:-2])
    if names.is_plain_convolution(leaf.module, leaf.name):
        return [last], sure
    readings, certain = _by_order(leaf, [last], [reading(_outputs_before_last(len(inner)))])
    named = (len(inner) == 3 and leaf.attention_name) or _named_transposed(leaf)
    if filters and not named and inner[-1] <= min(_MOST_MULTIPLIERS, inner[-2] - 1):
        readings.append(multiplied)
    return readings, certain and sure and len(inner) > 3


def _by_order(leaf: _Leaf, last: list[Reading], before_last: list[Reading]) -> _Readings:
    """The readings of a convolution that has its outputs last, or before its inputs if it is transposed."""
    inner = leaf.shape[len(last[0].view.batch) :]
    transposed = names.transposition(leaf.path)
    if transposed == "possible" and (math.prod(inner[:-2]) == 1 or (len(inner) == 3 and leaf.attention_name)):
        transposed = ""  # filters of one point are not transposed
    if not transposed:
        return last, True
    return (before_last + last if transposed == names.OUTPUTS_BEFORE_INPUTS else last + before_last), False


def _matrix(leaf: _Leaf, stack: int) -> _Readings:
    """The reading of a matrix whose sides a bias does not tell apart, by the order of others of that name."""
    by_files = f".{leaf.name}" in leaf.path  # as in the files of PyTorch
    usual = leaf.equinox or (leaf.named_weight and by_files)
    first = not usual if leaf.orders == {not usual} else usual
    sure = (leaf.equinox or not leaf.named_weight) and (not usual) not in leaf.orders
    return [_reading(leaf, stack, _outputs_first(2) if first else _outputs_last(2))], sure


def _named_transposed(leaf: _Leaf) -> bool:
    return names.transposition(leaf.path) in names.TRANSPOSED


def _may_be_filters(leaf: _Leaf, view: View) -> bool:
    """Whether a matrix may be the filters of a depthwise convolution, one for each column."""
    conv = "conv" in leaf.module.lower() or "conv" in leaf.name.lower()
    return conv and not leaf.named_weight and _axes_of_one(view) == 2 and leaf.shape[-2] <= _MOST_FILTER_ROWS


def _filter_last(shape: Shape) -> bool:
    """Whether the axes of a filter are the last ones, and not the first: they are shorter."""
    return math.prod(shape[:2]) > math.prod(shape[-2:])


def _like_layers(sides: Shape) -> bool:
    """Whether the first of a filter's axes may enumerate layers or their inputs instead: it is the longest."""
    return len(sides) > 1 and sides[0] > max(sides[1:])


def _axes_of_one(view: View) -> int:
    return len(view.rows) + len(view.cols)


def _reading(leaf: _Leaf, stack: int, view: View, depthwise: bool = False) -> Reading:
    """`view` of one layer, or of a stack of such layers, enumerated by the first axes."""
    rows, cols = (tuple(axis + stack for axis in axes) for axes in (view.rows, view.cols))
    convolution = len(rows) > 1 and len(cols) == 1 and not (len(rows) == 2 and leaf.attention_name)
    one_input = convolution and leaf.shape[rows[-1]] == 1  # the last of the rows are the inputs of a convolution
    return Reading(View(tuple(range(stack)), rows, cols), depthwise or one_input)


# The layouts of one layer. Rows of a convolution are ordered the same in all of them: spatial axes, then inputs.


def _outputs_last(ndim: int, outputs: int = 1) -> View:
    return View((), tuple(range(ndim - outputs)), tuple(range(ndim - outputs, ndim)))


def _outputs_before_last(ndim: int) -> View:
    """A transposed convolution of Keras or Haiku, `h w o i`; of two axes, `o i`."""
    return View((), (*range(ndim - 2), ndim - 1), (ndim - 2,))


def _outputs_first(ndim: int) -> View:
    """Equinox and PyTorch, `o i h w`."""
    return View((), (*range(2, ndim), 1), (0,))


def _outputs_second(ndim: int) -> View:
    """A transposed convolution of PyTorch, `i o h w`."""
    return View((), (*range(2, ndim), 0), (1,))


def _multiplier_view(ndim: int) -> View:
    """A depthwise convolution of Keras, `h w c m`: `m` outputs for each of `c` channels."""
    return View((), tuple(range(ndim - 2)), (ndim - 2, ndim - 1))


# Each of them if a bias of the length of the outputs tells that it is one.


def _last(shape: Shape, bias: Shape) -> View | None:
    fits = len(bias) < len(shape) and bias == shape[-len(bias) :]
    return _outputs_last(len(shape), len(bias)) if fits else None


def _before_last(shape: Shape, bias: Shape) -> View | None:
    return _outputs_before_last(len(shape)) if _vector(bias) == shape[-2:-1] else None


def _first(shape: Shape, bias: Shape) -> View | None:
    return _outputs_first(len(shape)) if _vector(bias) == _vector(shape[:1]) else None


def _second(shape: Shape, bias: Shape) -> View | None:
    return _outputs_second(len(shape)) if len(shape) > 2 and _vector(bias) == _vector(shape[1:2]) else None


def _multiplier(shape: Shape, bias: Shape) -> View | None:
    return _multiplier_view(len(shape)) if len(shape) > 2 and bias == (shape[-2] * shape[-1],) else None


def _fitting(leaf: _Leaf, *layouts: Callable[[Shape, Shape], View | None]) -> list[Reading]:
    """The readings of a leaf that its bias allows: the sides of stacked layers, if any, then those of the outputs."""
    found, shape, bias = [], leaf.shape, leaf.bias or ()
    for layout, stack in itertools.product(layouts, range(min(len(bias), len(shape) - 1))):
        if bias[:stack] == shape[:stack] and (view := layout(shape[stack:], bias[stack:])):
            flat = layout is _multiplier and len(shape) - stack == 3  # or attention with a bias of one axis
            found.append(_reading(leaf, stack, view, layout is _multiplier and not (flat and leaf.attention_name)))
    return found
