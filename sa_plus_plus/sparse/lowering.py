"""Layers in the form that the compiled kernel runs: kernels packed in float32, bfloat16 or int8."""

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
from sa_plus_plus.sparse.forms import BFLOAT16, FLOAT32, UINT8, Form, converted, quantised
from sa_plus_plus.sparse.steps import Call, Layer, Linear, Variable
from sa_plus_plus.sparse.windows import NO_BORDER, Window

REGISTER_BYTES = 64  # part of a block's column that matrix registers process at once
MOST_SUMMED = 2**18  # limit on the numbers that one thread sums
DENSE_ROWS, DENSE_COLUMNS = 128, 32  # largest blocks for packing an unpruned float32 kernel


class Compiled(NamedTuple):
    """A layer in the form that the compiled kernel runs, without its weights.

    Attributes:
      layer: what it does.
      window: its shapes.
      layout: block positions of its kernel, which may have more channels than `x`, in whole groups.
      x: form of its input.
      y: form of its result.
      residual: form of its residual, if it has one: any type, without a border.
      in_place: whether its result may overwrite the residual.
    """

    layer: Layer
    window: Window
    layout: Layout
    x: Form
    y: Form
    residual: Form | None
    in_place: bool = False

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
            activation=self.layer.activation,
            zero=self.y.zero,
            unit=unit,
            residual_factor=self.residual.factor / unit if self.residual else 1.0,
            residual_zero=self.residual.zero if self.residual else 0,
            border=self.y.border,
        )
        how: dict[str, Any] = {"scale": scale, "bias": bias, "residual": residual, "epilogue": epilogue}
        strides, in_place = self.window.strides, self.in_place
        y = native.conv(x, blocks, self.layout, strides=strides, in_place=in_place, **how)
        return y if self.y.border != NO_BORDER else y.reshape(self.layer.output.shape)


def pooled(call: Call, x: Any) -> Any | None:
    """The result of max or sum pooling, or of a small sum over adjacent axes; None for any other operation.

    In XLA, small sums take longer to launch than to run.
    """
    options, name = call.options, call.primitive.name
    if name == "reduce_sum" and x.dtype == FLOAT32:
        return _summed(x, options["axes"], call.outputs[0].shape)
    types = {"reduce_window_max": (FLOAT32, BFLOAT16, UINT8), "reduce_window_sum": (FLOAT32,)}.get(name, ())
    if x.ndim != 4 or x.dtype not in types:
        return None
    plain = {*options["base_dilation"], *options["window_dilation"]} == {1}
    window, strides, padding = (tuple(options[name]) for name in ("window_dimensions", "window_strides", "padding"))
    others = [(window[i], strides[i], tuple(padding[i])) for i in (0, 3)]
    if not plain or others != [(1, 1, (0, 0))] * 2 or any(p < 0 for pair in padding for p in pair):
        return None
    pool = native.max_pool if name == "reduce_window_max" else native.sum_pool
    return pool(x, window[1:3], strides[1:3], padding[1:3])


def _summed(x: Any, axes: Sequence[int], shape: Sequence[int]) -> Any | None:
    first, last = min(axes, default=0), max(axes, default=0)
    before, over, after = (
        math.prod(part) for part in (x.shape[:first], x.shape[first : last + 1], x.shape[last + 1 :])
    )
    if last + 1 - first != len(axes) or over * after > MOST_SUMMED or after < native.WIDE or not before * over:
        return None
    image = x.reshape(before, 1, over, after)
    return native.sum_pool(image, (1, over), (1, 1), ((0, 0), (0, 0))).reshape(shape)


def packed_float(kernel: np.ndarray, block: blk.Block | None) -> BlockSparse:
    """A float32 kernel by its blocks; an unpruned one in large blocks.

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
    """A kernel in the blocks with which the compiled kernel is fastest, whatever it was pruned in.

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
        # Apart from loading, matrix registers take as long for few rows as for many.
        cost = kept * (1 + rows / most) if registers else kept * (rows + 1)
        if best is None or cost < best[0]:
            best = cost, rows
    assert best is not None
    return BlockSparse.fromdense(kernel, (best[1], native.WIDE))


def outer_type() -> np.dtype:
    """The type of layers of an int8 network that int8 does not suit: the faster one."""
    return BFLOAT16 if native.halves_pay() else FLOAT32


def overflows(kernel: np.ndarray) -> bool:
    """Whether a sum of products with a column of an int8 kernel can be beyond 32 bits.

    With `x` from 0 to 255, partial sums lie between 255 times the sum of the negative weights and that of the positive.

    Args:
      kernel: `(..., outputs)` int8.
    """
    columns = kernel.reshape(-1, kernel.shape[-1])
    sums = [part.sum(0, np.int64) for part in (np.maximum(columns, 0), np.minimum(columns, 0))]
    return 255 * int(np.abs(sums).max(initial=0)) > np.iinfo(np.int32).max


class Packed(NamedTuple):
    """A layer's kernel in the form that the compiled kernel takes.

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
    """A layer's kernel for `x` in float32, bfloat16 or uint8; where sums of bytes could overflow, in a floating type.

    Args:
      step: the layer, its kernel scaled.
      window: its shapes.
      dtype: of `x`, as requested.
      block: in which the kernel is pruned, or None.
    """
    kernel = np.asarray(step.kernel).astype(np.float32).reshape(window.kernel)
    if dtype == FLOAT32:
        return Packed(window, dtype, packed_float(kernel, block), None)
    group, scales = (2 if dtype == BFLOAT16 else 4), None
    kernel = np.pad(kernel, [(0, 0), (0, 0), (0, -kernel.shape[2] % group), (0, 0)])
    if dtype == UINT8:
        kernel, scales = rounded(kernel)
        if overflows(kernel):
            return packed(step, window, outer_type(), block)
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
    """A layer within a network whose values are held in these forms."""
    layer = step.layer
    y = forms.get(layer.output, Form(np.dtype(layer.output.dtype)))
    residual = None
    if layer.residual is not None:
        residual = forms.get(layer.residual, Form(np.dtype(layer.residual.dtype)))._replace(border=NO_BORDER)
    return lower(step, kernel, _taken(layer, kernel, forms, ranges), y, residual)


def _taken(layer: Layer, kernel: Packed, forms: Mapping[Variable, Form], ranges: Mapping[Variable, Any]) -> Form:
    """The form of a layer's input: as it is held, if that has the right type."""
    x = forms.get(layer.x, Form(np.dtype(layer.x.dtype)))
    if x.dtype != kernel.dtype:
        x = quantised(*ranges[layer.x]) if kernel.dtype == UINT8 else Form(kernel.dtype)
    border, channels = NO_BORDER, None
    if layer.call is not None and len(layer.x.shape) == 4:
        border = kernel.window.padding
        channels = kernel.w.shape[2] if kernel.w.shape[2] != layer.x.shape[3] else None
    return x._replace(border=border, channels=channels)


def alone(step: Linear, kernel: Packed, x: Any, residual: Any) -> tuple[tuple[Any, Any], Compiled, tuple[Any, ...]]:
    """A single layer, for timing, with its input and residual in the forms that its neighbours would produce."""
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
