"""How the layers of a traced network run in the compiled kernel, and how their results are held between them.

Each layer's kernel is packed for a number type: float32, bfloat16 or int8. A result is held in the type that all its
users take it in: a layer that feeds others in int8 rounds to uint8 as it stores, and leaves borders of zeros for the
next convolution's padding.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

import sa_plus_plus.sparse.native as native
from sa_plus_plus import blocks as blk
from sa_plus_plus.checks import occupied
from sa_plus_plus.sparse.array import BlockSparse, Layout
from sa_plus_plus.sparse.tracing import Call, Layer, Linear, Traced, Variable

Border = tuple[tuple[int, int], tuple[int, int]]
NO_BORDER: Border = ((0, 0), (0, 0))
FLOAT32, BFLOAT16, UINT8 = np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.uint8)
REGISTER_BYTES = 64  # of a block's column that matrix registers take at once
DENSE_ROWS, DENSE_COLUMNS = 128, 32  # at most, of the blocks in which a float32 kernel is packed that is not pruned
_SHAPES_ONLY = ("reshape", "squeeze", "transpose", "slice", "reduce_window_max")  # whatever type they are given


class Form(NamedTuple):
    """How a value is held.

    Attributes:
      dtype: uint8 stands for `(held - zero) * factor`.
      border: zeros around each image.
      channels: of an image, where these are more than it has, the rest zeros.
    """

    dtype: np.dtype
    factor: float = 1.0
    zero: int = 0
    border: Border = NO_BORDER
    channels: int | None = None


class Window(NamedTuple):
    """A layer as a convolution of images `(batch, height, width, channels)`; a product is one of a single line.

    Attributes:
      image: the shape of `x`.
      kernel: `(k_h, k_w, channels, outputs)`.
      strides: down and across.
      padding: of `x`.
    """

    image: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]
    strides: tuple[int, int]
    padding: Border


class Compiled(NamedTuple):
    """A layer as the compiled kernel runs it, without its weights.

    Attributes:
      layer: what it does.
      window: its shapes.
      layout: where the blocks of its kernel stand, which may have more channels than `x`, in whole groups.
      x: how it takes its input.
      y: how it leaves its result.
      residual: how it takes its residual, if it has one: in any type, without a border.
    """

    layer: Layer
    window: Window
    layout: Layout
    x: Form
    y: Form
    residual: Form | None

    def run(self, x: Any, residual: Any, blocks: Any, scale: Any, bias: Any) -> Any:
        """The layer's result in the form `y`, from arrays in the forms `x` and `residual`."""
        if x.ndim != 4 or self.layer.call is None:
            zero = jnp.asarray(self.x.zero, x.dtype)
            pads = ((0, 0, 0), *((low, high, 0) for low, high in self.window.padding), (0, 0, 0))
            x = lax.pad(x.reshape(self.window.image), zero, pads)
        if missing := self.layout.shape[2] - x.shape[3]:
            x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0),) * 3 + ((0, missing, 0),))
        unit = self.y.factor
        epilogue = native.Epilogue(
            dtype=self.y.dtype,
            relu=self.layer.relu,
            zero=self.y.zero,
            residual_factor=self.residual.factor / unit if self.residual else 1.0,
            residual_zero=self.residual.zero if self.residual else 0,
            border=self.y.border,
        )
        strides = self.window.strides
        y = native.conv(
            x, blocks, self.layout, strides=strides, scale=scale, bias=bias, residual=residual, epilogue=epilogue
        )
        return y if self.y.border != NO_BORDER else y.reshape(self.layer.output.shape)


def pooled(call: Call, x: Any) -> Any | None:
    """The result of an operation that takes the largest of windows of images, or None if it does anything else."""
    options = call.options
    if call.primitive.name != "reduce_window_max" or x.ndim != 4 or x.dtype not in (FLOAT32, BFLOAT16, UINT8):
        return None
    plain = {*options["base_dilation"], *options["window_dilation"]} == {1}
    window, strides, padding = (tuple(options[name]) for name in ("window_dimensions", "window_strides", "padding"))
    others = [(window[i], strides[i], tuple(padding[i])) for i in (0, 3)]
    if not plain or others != [(1, 1, (0, 0))] * 2 or any(p < 0 for pair in padding for p in pair):
        return None
    return native.max_pool(x, window[1:3], strides[1:3], padding[1:3])


def window_of(layer: Layer) -> Window | str:
    """The layer as a convolution of images, or why it cannot run in the compiled kernel."""
    if layer.call is None:
        rows, (inputs, outputs) = layer.rows, layer.kernel.shape
        alike = len(layer.x.shape) == len(layer.output.shape) == 4
        image: Any = layer.x.shape if alike else (1, 1, rows, inputs)
        return Window(image, (1, 1, inputs, outputs), (1, 1), NO_BORDER)
    options, n = layer.call.options, len(layer.kernel.shape) - 2
    if n not in (1, 2):
        return f"a convolution over {n} axes"
    if options["feature_group_count"] != 1:
        return "a grouped convolution"
    if any(d != 1 for d in options["lhs_dilation"]):
        return "a transposed convolution"
    if any(d != 1 for d in options["rhs_dilation"]):
        return "a dilated convolution"
    numbers = options["dimension_numbers"]
    last = n + 1
    images, kernel = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    if (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) != (images, kernel, images):
        return "a convolution whose axes are in another order than batch, positions, channels"
    strides, padding = tuple(options["window_strides"]), tuple(map(tuple, options["padding"]))
    if any(p < 0 for pair in padding for p in pair):
        return "a convolution with negative padding"
    if n == 1:
        strides, padding = (1, *strides), ((0, 0), *padding)
    shape, kernel_shape = layer.x.shape, layer.kernel.shape
    if n == 1:
        shape, kernel_shape = (shape[0], 1, *shape[1:]), (1, *kernel_shape)
    return Window(shape, kernel_shape, strides, padding)  # type: ignore[arg-type]


def packed_float(kernel: np.ndarray, block: blk.Block | None) -> BlockSparse:
    """A float32 kernel by its blocks; one that is not pruned in large ones.

    Args:
      kernel: `(k_h, k_w, channels, outputs)`.
      block: in which it is pruned, or None.
    """
    line = kernel.shape[1] * kernel.shape[2]
    if block is None:
        rows = max(n for n in range(1, min(line, DENSE_ROWS) + 1) if line % n == 0)
        block = (rows, DENSE_COLUMNS)
        grid = blk.grid_shape(kernel.shape, block)
        return BlockSparse.fromdense(kernel, block, np.ones(grid, bool))
    if kernel.shape[0] > 1 and line % block[0]:  # a block may not reach into the next line of the window
        block = (math.gcd(line, block[0]), block[1])
    return BlockSparse.fromdense(kernel, block)


def packed_narrow(kernel: np.ndarray, dtype: np.dtype) -> BlockSparse:
    """A kernel in the blocks that the compiled kernel is fastest with, whatever they were pruned in.

    Args:
      kernel: `(k_h, k_w, channels, outputs)`, bfloat16 or int8; the channels of one line of the window are a whole
        number of groups of four bytes.
      dtype: of the kernel's entries.
    """
    line, size = kernel.shape[1] * kernel.shape[2], np.dtype(dtype).itemsize
    group, most = 4 // size, REGISTER_BYTES // size
    registers = native.instructions(UINT8 if size == 1 else BFLOAT16) == "amx"
    nonzero, best = kernel != 0, None
    for rows in (d for d in range(group, min(most, line) + 1, group) if line % d == 0):
        kept = int(occupied(nonzero, (rows, native.WIDE)).sum())
        # Matrix registers take as long for few rows as for many, but for loading them.
        cost = kept * (1 + rows / most) if registers else kept * (rows + 1)
        if best is None or cost < best[0]:
            best = cost, rows
    assert best is not None
    return BlockSparse.fromdense(kernel, (best[1], native.WIDE))


def consumers(program: Traced[Any]) -> dict[Variable, list[Any]]:
    """Which steps take a value, and None for the program's result."""
    users: dict[Variable, list[Any]] = {}
    for step in program.steps:
        for value in _inputs(step):
            users.setdefault(value, []).append(step)
    for result in program.outputs:
        if isinstance(result, Variable):
            users.setdefault(result, []).append(None)
    return users


def _inputs(step: Call | Linear) -> list[Variable]:
    if isinstance(step, Linear):
        return [v for v in (step.layer.x, step.layer.residual) if v is not None]
    return [v for v in step.inputs if isinstance(v, Variable)]


def keeps_type(step: Any) -> bool:
    """Whether a step moves or compares numbers only, so that it may be given them as they are held."""
    return isinstance(step, Call) and step.primitive.name in _SHAPES_ONLY


def forms_of(
    program: Traced[Call | Linear], types: Mapping[int, np.dtype], ranges: Mapping[Variable, tuple[float, float]]
) -> dict[Variable, Form]:
    """How each value is held that is not held as it was traced.

    Args:
      program: its steps.
      types: by the number of a step that runs in the compiled kernel: in which type it takes `x`.
      ranges: smallest and largest of each value that a step takes in uint8.
    """
    users, made_by = consumers(program), {}
    numbers = {id(step): i for i, step in enumerate(program.steps)}
    wanted: dict[Variable, np.dtype | None] = {}
    for step in reversed(program.steps):
        for value in [step.layer.output] if isinstance(step, Linear) else list(step.outputs):
            made_by[value] = step
            wanted[value] = _wanted(value, users.get(value, []), types, numbers, wanted)
    forms: dict[Variable, Form] = {}
    for step in program.steps:
        if isinstance(step, Call):
            if keeps_type(step):
                (value,), (output,) = _inputs(step), step.outputs
                if wanted[output] is not None and value in forms and forms[value].dtype == wanted[output]:
                    forms[output] = forms[value]
            continue
        output = step.layer.output
        if numbers[id(step)] not in types:
            continue
        dtype = wanted[output]
        if dtype == UINT8:
            forms[output] = quantised(*ranges[output])
        elif dtype is not None:
            forms[output] = Form(dtype)
        users_here = users.get(output, [])
        border = _border(output, users_here, types, numbers)
        if border != NO_BORDER:
            forms[output] = forms.get(output, Form(np.dtype(output.dtype)))._replace(border=border)
    return forms


def _wanted(
    value: Variable,
    users: Sequence[Any],
    types: Mapping[int, np.dtype],
    numbers: Mapping[int, int],
    wanted: Mapping[Variable, np.dtype | None],
) -> np.dtype | None:
    """The one narrow type in which all users take a value, or None."""
    kinds: set[Any] = set()
    preferred: np.dtype | None = None
    for step in users:
        if isinstance(step, Linear) and numbers[id(step)] in types:
            if step.layer.x == value:
                kinds.add(types[numbers[id(step)]])
            elif step.layer.residual == value:  # which it takes in any type
                preferred = wanted[step.layer.output] or types[numbers[id(step)]]
        elif keeps_type(step):
            kinds.add(wanted[step.outputs[0]])
        else:
            return None
    narrow = kinds.pop() if len(kinds) == 1 else preferred if not kinds else None
    return narrow if narrow in (BFLOAT16, UINT8) else None


def _border(value: Variable, users: Sequence[Any], types: Mapping[int, np.dtype], numbers: Mapping[int, int]) -> Border:
    """The padding of the one convolution that takes a value."""
    if (
        len(users) != 1
        or not isinstance(users[0], Linear)
        or numbers[id(users[0])] not in types
        or len(value.shape) != 4
    ):
        return NO_BORDER
    (user,) = users
    window = window_of(user.layer)
    if user.layer.x != value or user.layer.residual == value or isinstance(window, str) or user.layer.call is None:
        return NO_BORDER
    return window.padding


def quantised(low: float, high: float) -> Form:
    """uint8 for values from `low` to `high`: one scale for a tensor, zero exact."""
    if low >= 0:
        return Form(UINT8, max(high, 1e-30) / 255, 0)
    return Form(UINT8, max(high / 127, -low / 128, 1e-30), 128)


class Packed(NamedTuple):
    """A layer's kernel as the compiled kernel takes it.

    Attributes:
      window: the layer's shapes.
      dtype: in which it takes `x`.
      w: `(k_h, k_w, channels, outputs)` in blocks of float32, bfloat16 or int8.
      scales: `(outputs,)` float32, what an int8 kernel is multiplied by; otherwise None.
    """

    window: Window
    dtype: np.dtype
    w: BlockSparse
    scales: np.ndarray | None


def packed(step: Linear, window: Window, dtype: np.dtype, block: blk.Block | None) -> Packed:
    """A layer's kernel for `x` in float32, bfloat16 or uint8.

    Args:
      step: the layer, its kernel scaled.
      window: its shapes.
      dtype: of `x`.
      block: in which the kernel is pruned, or None.
    """
    kernel = np.asarray(step.kernel).astype(np.float32).reshape(window.kernel)
    if dtype == FLOAT32:
        return Packed(window, dtype, packed_float(kernel, block), None)
    group, scales = (2 if dtype == BFLOAT16 else 4), None
    kernel = np.pad(kernel, [(0, 0), (0, 0), (0, -kernel.shape[2] % group), (0, 0)])
    if dtype == UINT8:
        kernel, scales = rounded(kernel)
    else:
        kernel = kernel.astype(dtype)
    return Packed(window, dtype, packed_narrow(kernel, kernel.dtype), scales)


def lower(step: Linear, packed: Packed, x: Form, y: Form, residual: Form | None) -> tuple[Compiled, tuple[Any, ...]]:
    """What to run, and its blocks, scale and bias.

    Args:
      step: the layer.
      packed: its kernel.
      x, y, residual: how its values are held.
    """
    w, outputs = packed.w, packed.w.shape[-1]
    factors = np.ones(outputs) if packed.scales is None else packed.scales.astype(np.float64)
    shift = np.zeros(outputs) if step.shift is None else step.shift
    if x.dtype == UINT8:
        factors = factors * x.factor
        if x.zero:  # each sum is too large by the kernel's, times zero
            shift = shift - x.zero * factors * np.asarray(w.todense(), np.int64).reshape(-1, outputs).sum(0)
    plain = x.dtype != UINT8 and y.dtype != UINT8
    scale = None if plain else jnp.asarray(factors / y.factor, jnp.float32)
    bias = None if plain and step.shift is None else jnp.asarray(shift / y.factor, jnp.float32)
    blocks = np.asarray(w.blocks)
    blocks = blocks if x.dtype == FLOAT32 else native.grouped(blocks)
    return Compiled(step.layer, packed.window, w.layout, x, y, residual), (jnp.asarray(blocks), scale, bias)


def assembled(
    step: Linear, kernel: Packed, forms: Mapping[Variable, Form], ranges: Mapping[Variable, tuple[float, float]]
) -> tuple[Compiled, tuple[Any, ...]]:
    """A layer as part of a network whose values are held in these forms."""
    layer = step.layer
    y = forms.get(layer.output, Form(np.dtype(layer.output.dtype)))
    residual = None
    if layer.residual is not None:
        residual = forms.get(layer.residual, Form(np.dtype(layer.residual.dtype)))._replace(border=NO_BORDER)
    return lower(step, kernel, _taken(layer, kernel, forms, ranges), y, residual)


def _taken(layer: Layer, kernel: Packed, forms: Mapping[Variable, Form], ranges: Mapping[Variable, Any]) -> Form:
    """How a layer takes its input: as it is held, if that is in its type."""
    x = forms.get(layer.x, Form(np.dtype(layer.x.dtype)))
    if x.dtype != kernel.dtype:
        x = quantised(*ranges[layer.x]) if kernel.dtype == UINT8 else Form(kernel.dtype)
    border, channels = NO_BORDER, None
    if layer.call is not None and len(layer.x.shape) == 4:
        border = kernel.window.padding
        channels = kernel.w.shape[2] if kernel.w.shape[2] != layer.x.shape[3] else None
    return x._replace(border=border, channels=channels)


def alone(step: Linear, kernel: Packed, x: Any, residual: Any) -> tuple[tuple[Any, Any], Compiled, tuple[Any, ...]]:
    """A layer by itself, for measuring: its input and residual as its neighbours would leave them."""
    layer, dtype = step.layer, kernel.dtype
    held = quantised(-4.0, 4.0) if dtype == UINT8 else Form(dtype)
    taken = _taken(layer, kernel, {layer.x: held}, {})
    compiled, weights = lower(step, kernel, taken, held, None if residual is None else held)
    plain = Form(np.dtype(layer.x.dtype))
    added = None if residual is None else converted(residual, plain, held)
    return (converted(x, plain, taken), added), compiled, weights


def rounded(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel in int8, symmetric for each output channel: `kernel ~ rounded * scales`."""
    wide = kernel.astype(np.float64)
    largest = np.abs(wide).max(tuple(range(kernel.ndim - 1)))
    scales = np.where(largest > 0, largest / 127, 1.0)
    return np.rint(wide / scales).clip(-127, 127).astype(np.int8), scales.astype(np.float32)


def converted(held: Any, have: Form, want: Form) -> Any:
    """A value in another form.

    Args:
      held: the array.
      have: its form.
      want: that asked for.
    """
    if have == want:
        return held
    if have == Form(FLOAT32) and want.dtype in (BFLOAT16, UINT8) and native.missing() is None:
        image = held if held.ndim == 4 else held.reshape(1, 1, -1, held.shape[-1] if held.ndim else 1)
        rounded = native.round_images(image, want.dtype, want.factor, want.zero, want.border, want.channels)
        return rounded if held.ndim == 4 else rounded.reshape(held.shape)
    if have.border != NO_BORDER and have.border != want.border:
        (top, _), (left, _) = have.border
        rows, columns = (n - sum(pair) for n, pair in zip(held.shape[1:3], have.border, strict=True))
        held = held[:, top : top + rows, left : left + columns]
        have = have._replace(border=NO_BORDER)
    if have[:3] != want[:3]:
        if have.dtype == UINT8:
            held = (held.astype(np.float32) - have.zero) * np.float32(have.factor)
        if want.dtype == UINT8:
            held = jnp.clip(jnp.round(held.astype(np.float32) * np.float32(1 / want.factor)) + want.zero, 0, 255)
        held = held.astype(want.dtype)
    if have.border != want.border or have.channels != want.channels:
        around = want.border if have.border != want.border else NO_BORDER
        more = 0 if want.channels is None or have.channels == want.channels else want.channels - held.shape[3]
        pads = ((0, 0, 0), *((low, high, 0) for low, high in around), (0, more, 0))
        held = lax.pad(held, jnp.asarray(want.zero, held.dtype), pads)
    return held
