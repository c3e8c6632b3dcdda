"""Layers in the compiled kernel: kernels packed in float32, bfloat16 or int8, and the call with its epilogue."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sa_plus_plus import blocks as blk
from sa_plus_plus.checks import occupied
from sa_plus_plus.sparse.array import BlockSparse, Layout
from sa_plus_plus.sparse.compiler.conv_geometry import NO_BORDER, Window
from sa_plus_plus.sparse.compiler.ir import Layer, LayerSpec, Variable
from sa_plus_plus.sparse.compiler.planned import PackedKernel
from sa_plus_plus.sparse.compiler.quantization import (
    BFLOAT16,
    FLOAT32,
    UINT8,
    Encoding,
    convert,
    fallback_type,
    overflows,
    quantize_kernel,
    quantized,
)
from sa_plus_plus.sparse.ops import native

REGISTER_BYTES = 64  # part of a block's column that matrix registers process at once
DENSE_ROWS = 128  # of the largest blocks for packing an unpruned float32 kernel
WIDER = 0.93  # relative time of a column in the wider blocks; with AVX-512 in bfloat16, and nearer to 1 in int8
FLOAT32_COLUMNS = (8, 16)  # of blocks that narrower ones are joined to

Encodings = Mapping[Variable, Encoding]
Ranges = Mapping[Variable, tuple[float, float]]


class CompiledLayer(NamedTuple):
    """A layer in the compiled kernel, without its weights.

    Attributes:
      spec: the operation.
      window: its shapes.
      layout: block positions of its kernel, which may have more channels than `x`, in whole groups.
      x: encoding of its input.
      y: encoding of its result.
      residual: encoding of its residual, if it has one: any type, without a border.
      in_place: whether its result may overwrite the residual.
      narrow: whether its kernel is int8 of so few bits that some targets are faster.
    """

    spec: LayerSpec
    window: Window
    layout: Layout
    x: Encoding
    y: Encoding
    residual: Encoding | None
    in_place: bool = False
    narrow: bool = False

    def run(self, x: Any, residual: Any, blocks: Any, scale: Any, bias: Any) -> Any:
        """The layer's result in the encoding `y`, from arrays in the encodings `x` and `residual`."""
        if x.ndim != 4 or self.spec.conv is None:
            zero = jnp.asarray(self.x.zero_point, x.dtype)
            pads = ((0, 0, 0), *((low, high, 0) for low, high in self.window.padding), (0, 0, 0))
            x = lax.pad(x.reshape(self.window.image), zero, pads)
        if missing := self.layout.shape[2] - x.shape[3]:
            x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0),) * 3 + ((0, missing, 0),))
        unit = self.y.scale
        epilogue = native.Epilogue(
            dtype=self.y.dtype,
            activation=self.spec.activation,
            zero=self.y.zero_point,
            unit=unit,
            residual_factor=self.residual.scale / unit if self.residual else 1.0,
            residual_zero=self.residual.zero_point if self.residual else 0,
            border=self.y.border,
        )
        operands: dict[str, Any] = {"scale": scale, "bias": bias, "residual": residual, "epilogue": epilogue}
        options: dict[str, Any] = {"strides": self.window.strides, "in_place": self.in_place, "narrow": self.narrow}
        y = native.conv(x, blocks, self.layout, **options, **operands)
        return y if self.y.border != NO_BORDER else y.reshape(self.spec.output.shape)


def pack_kernel(layer: Layer, window: Window, dtype: np.dtype, block: blk.Block | None) -> PackedKernel:
    """A layer's kernel for `x` in float32, bfloat16 or uint8; where sums of bytes could overflow, in a floating type.

    Args:
      layer: the layer, its kernel scaled.
      window: its shapes.
      dtype: of `x`, as requested.
      block: in which the kernel is pruned, or None.
    """
    kernel = np.asarray(layer.kernel).astype(np.float32)
    if (inputs := kernel.shape[-2]) != window.kernel[2]:
        groups = window.kernel[2] // inputs
        kernel = ungrouped(kernel, groups)
        sides = block or (inputs, kernel.shape[-1] // groups)
        block = (math.gcd(inputs, sides[0]), math.gcd(kernel.shape[-1] // groups, sides[1]))
    kernel = kernel.reshape(window.kernel)
    if dtype == FLOAT32:
        return PackedKernel(window, dtype, pack_float32(kernel, block), None)
    group, scales = (2 if dtype == BFLOAT16 else 4), None
    kernel = np.pad(kernel, [(0, 0), (0, 0), (0, -kernel.shape[2] % group), (0, 0)])
    if dtype == UINT8:
        kernel, scales = quantize_kernel(kernel, native.target(UINT8).limit)
        if overflows(kernel):
            return pack_kernel(layer, window, fallback_type(), block)
    else:
        kernel = kernel.astype(dtype)
    return PackedKernel(window, dtype, pack_interleaved(kernel, kernel.dtype), scales)


def ungrouped(kernel: np.ndarray, groups: int) -> np.ndarray:
    """The kernel of a convolution with groups as one without, with zeros between them.

    Args:
      kernel: `(..., channels of a group, outputs)`, those of a group together.
      groups: how many.

    Returns:
      `(..., groups * channels of a group, outputs)`.
    """
    *window, inputs, outputs = kernel.shape
    split = kernel.reshape(-1, inputs, groups, outputs // groups)
    whole = np.zeros((len(split), groups, *split.shape[1:]), kernel.dtype)
    for group in range(groups):
        whole[:, group, :, group] = split[:, :, group]
    return whole.reshape(*window, groups * inputs, outputs)


def pack_float32(kernel: np.ndarray, block: blk.Block | None) -> BlockSparse:
    """A float32 kernel in the blocks with which the compiled kernel is fastest; in full if that is faster.

    Blocks narrower than its vectors are joined with their neighbours: of a column alone, with so many others that
    hardly any is zero.

    Args:
      kernel: `(k_h, k_w, channels, outputs)`.
      block: in which it is pruned, or None.
    """
    line = kernel.shape[1] * kernel.shape[2]
    rows = max(n for n in range(1, min(line, DENSE_ROWS) + 1) if line % n == 0)
    full = (rows, native.target(FLOAT32).columns)
    if block is not None:
        if kernel.shape[0] > 1 and line % block[0]:  # a block may not reach into the next line of the window
            block = (math.gcd(line, block[0]), block[1])
        wider = [columns for columns in FLOAT32_COLUMNS if columns > block[1]]
        kept = {
            (block[0], columns): np.count_nonzero(occupied(kernel != 0, (block[0], columns)))
            for columns in (block[1], *wider)
        }
        costs = {block: count * cost_of(block) for block, count in kept.items()}
        best = min(costs, key=costs.__getitem__)
        if costs[best] <= math.prod(blk.grid_shape(kernel.shape, full)) * cost_of(full):
            return BlockSparse.fromdense(kernel, best)
    return BlockSparse.fromdense(kernel, full, np.ones(blk.grid_shape(kernel.shape, full), bool))


def cost_of(block: blk.Block) -> float:
    """Time of a float32 block in the compiled kernel, in that of a row of it as wide as a vector.

    Measured with AVX-512 for 32 rows of `x`: to begin a block takes as long as half a row of it, and up to 8 columns
    two thirds of the time of 16.
    """
    rows, columns = block
    whole, rest = divmod(columns, native.WIDE)
    return (rows + 0.5) * (whole + (0 if not rest else 0.65 if rest <= native.WIDE // 2 else 1))


def pack_interleaved(kernel: np.ndarray, dtype: np.dtype) -> BlockSparse:
    """A kernel in the blocks with which the compiled kernel is fastest, whatever it was pruned in.

    Args:
      kernel: `(k_h, k_w, channels, outputs)`, bfloat16 or int8; the channels of one line of the window are a whole
        number of groups of four bytes.
      dtype: of the kernel's entries.
    """
    line, size = kernel.shape[1] * kernel.shape[2], np.dtype(dtype).itemsize
    group, most = 4 // size, REGISTER_BYTES // size
    target = native.target(UINT8 if size == 1 else BFLOAT16)
    nonzero, best = kernel != 0, None
    for rows in (d for d in range(group, min(most, line) + 1, group) if line % d == 0):
        for columns in dict.fromkeys((native.WIDE, target.columns)):
            kept = int(occupied(nonzero, (rows, columns)).sum())
            cost = kept * columns * target.cost(rows, size) * (WIDER if columns > native.WIDE else 1)
            if best is None or cost < best[0]:
                best = cost, (rows, columns)
    assert best is not None
    return BlockSparse.fromdense(kernel, best[1])


def lower(
    layer: Layer, packed: PackedKernel, x: Encoding, y: Encoding, residual: Encoding | None
) -> tuple[CompiledLayer, tuple[Any, ...]]:
    """What to run, and its blocks, scale and bias.

    Args:
      layer: the layer.
      packed: its kernel.
      x, y, residual: the encodings of its values.
    """
    w, outputs = packed.w, packed.w.shape[-1]
    scales = np.ones(outputs) if packed.scales is None else packed.scales.astype(np.float64)
    shift = np.zeros(outputs) if layer.shift is None else layer.shift
    if x.dtype == UINT8:
        scales = scales * x.scale
        if x.zero_point:  # each sum is too large by the kernel's, times the zero point
            sums = np.asarray(w.todense(), np.int64).reshape(-1, outputs).sum(0)
            shift = shift - x.zero_point * scales * sums
    plain = x.dtype != UINT8 and y.dtype != UINT8
    scale = None if plain else jax.device_put(np.float32(scales / y.scale))
    bias = None if plain and layer.shift is None else jax.device_put(np.float32(shift / y.scale))
    narrow = x.dtype == UINT8 and bool((np.abs(np.asarray(w.blocks), dtype=np.int16) <= native.NARROW).all())
    blocks = w.blocks if x.dtype == FLOAT32 else jax.device_put(native.interleave_rows(np.asarray(w.blocks)))
    compiled = CompiledLayer(layer.spec, packed.window, w.layout, x, y, residual, narrow=narrow)
    return compiled, (blocks, scale, bias)


def lower_in_network(
    layer: Layer, packed: PackedKernel, encodings: Encodings, ranges: Ranges
) -> tuple[CompiledLayer, tuple[Any, ...]]:
    """A layer within a network whose values have these encodings."""
    spec = layer.spec
    y = encodings.get(spec.output, Encoding(np.dtype(spec.output.dtype)))
    residual = None
    if spec.residual is not None:
        residual = encodings.get(spec.residual, Encoding(np.dtype(spec.residual.dtype)))._replace(border=NO_BORDER)
    return lower(layer, packed, _input_encoding(spec, packed, encodings, ranges), y, residual)


def _input_encoding(spec: LayerSpec, packed: PackedKernel, encodings: Encodings, ranges: Ranges) -> Encoding:
    """The encoding in which a layer takes its input: that of the value, if it has the right type."""
    x = encodings.get(spec.x, Encoding(np.dtype(spec.x.dtype)))
    if x.dtype != packed.dtype:
        x = quantized(*ranges[spec.x]) if packed.dtype == UINT8 else Encoding(packed.dtype)
    border, channels = NO_BORDER, None
    if spec.conv is not None and len(spec.x.shape) == 4:
        border = packed.window.padding
        channels = packed.w.shape[2] if packed.w.shape[2] != spec.x.shape[3] else None
    return x._replace(border=border, channels=channels)


def lower_alone(layer: Layer, packed: PackedKernel) -> tuple[CompiledLayer, tuple[Any, ...], Callable[[Any, Any], Any]]:
    """A single layer, for timing.

    Returns:
      What to run; its weights; and `encoded(x, residual)`, both encoded as the layer's neighbours would leave them.
    """
    spec, dtype = layer.spec, packed.dtype
    narrow = quantized(-4.0, 4.0) if dtype == UINT8 else Encoding(dtype)
    encoding = _input_encoding(spec, packed, {spec.x: narrow}, {})
    compiled, weights = lower(layer, packed, encoding, narrow, None if spec.residual is None else narrow)
    plain = Encoding(np.dtype(spec.x.dtype))

    def encoded(x: Any, residual: Any) -> tuple[Any, Any]:
        return convert(x, plain, encoding), None if residual is None else convert(residual, plain, narrow)

    return compiled, weights, encoded
