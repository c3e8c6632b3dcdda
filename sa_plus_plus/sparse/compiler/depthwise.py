"""Depthwise convolutions: which layers are, and how they run in the compiled kernel, in float32."""

from typing import Any, NamedTuple

import jax
import numpy as np

from sa_plus_plus.sparse.compiler.conv_geometry import Border
from sa_plus_plus.sparse.compiler.ir import Layer, LayerSpec
from sa_plus_plus.sparse.compiler.quantization import FLOAT32, Encoding
from sa_plus_plus.sparse.ops import native


class Depthwise(NamedTuple):
    """The shapes of a depthwise convolution of images; one over a single axis is of images of one line.

    Attributes:
      image: `(batch, height, width, channels)`, of `x`.
      kernel: `(k_h, k_w, outputs)`: each channel of `x` has as many outputs, which are together.
      strides, dilation: down and across.
      padding: of `x`, `((top, bottom), (left, right))`.
    """

    image: tuple[int, int, int, int]
    kernel: tuple[int, int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: Border


class DepthwiseKernel(NamedTuple):
    """The kernel of a depthwise convolution as the compiled kernel takes it.

    Attributes:
      shapes: of the layer.
      dtype: in which it takes `x`.
      weights: float32 of shape `shapes.kernel`.
    """

    shapes: Depthwise
    dtype: np.dtype
    weights: Any


class CompiledDepthwise(NamedTuple):
    """A depthwise convolution in the compiled kernel, without its weights.

    Attributes:
      spec: the operation.
      shapes: its shapes.
      x: encoding of its input.
      residual: encoding of its residual, if it has one.
    """

    spec: LayerSpec
    shapes: Depthwise
    x: Encoding
    residual: Encoding | None

    def run(self, x: Any, residual: Any, weights: Any, bias: Any) -> Any:
        """The layer's result, in float32."""
        s = self.shapes
        options: dict[str, Any] = {"strides": s.strides, "dilation": s.dilation, "padding": s.padding}
        options |= {"bias": bias, "residual": residual, "activation": self.spec.activation}
        return native.depthwise_conv(x.reshape(s.image), weights, **options).reshape(self.spec.output.shape)


def depthwise_of(layer: LayerSpec) -> Depthwise | None:
    """The shapes of a depthwise convolution that the compiled kernel can run; None of another layer."""
    if layer.conv is None or not layer.depthwise or 0 in layer.output.shape:
        return None
    conv, n = layer.conv, len(layer.kernel.shape) - 2
    padding = tuple(map(tuple, conv["padding"]))
    if n not in (1, 2) or any(d != 1 for d in conv["lhs_dilation"]) or any(p < 0 for pair in padding for p in pair):
        return None
    image, window = layer.x.shape, layer.kernel.shape[:n]
    strides, dilation = tuple(conv["window_strides"]), tuple(conv["rhs_dilation"])
    if n == 1:
        image, window = (image[0], 1, *image[1:]), (1, *window)
        strides, dilation, padding = (1, *strides), (1, *dilation), ((0, 0), *padding)
    return Depthwise(image, (*window, layer.kernel.shape[-1]), strides, dilation, padding)  # type: ignore[arg-type]


def pack_depthwise(layer: Layer, shapes: Depthwise) -> DepthwiseKernel:
    """A layer's kernel."""
    return DepthwiseKernel(shapes, FLOAT32, np.asarray(layer.kernel, np.float32).reshape(shapes.kernel))


def lower_depthwise(layer: Layer, packed: DepthwiseKernel) -> tuple[CompiledDepthwise, tuple[Any, Any]]:
    """What to run, and its weights and bias."""
    plain = Encoding(FLOAT32)
    residual = None if layer.spec.residual is None else plain
    return CompiledDepthwise(layer.spec, packed.shapes, plain, residual), (jax.device_put(packed.weights), layer.bias)
