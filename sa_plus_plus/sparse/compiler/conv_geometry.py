"""Layers as convolutions of images."""

import math
from typing import Any, NamedTuple

from sa_plus_plus.sparse.compiler.ir import LayerSpec

Border = tuple[tuple[int, int], tuple[int, int]]
NO_BORDER: Border = ((0, 0), (0, 0))
MOST_GROUPED = 2**25  # weights of a convolution with groups, zeros included


class Window(NamedTuple):
    """A layer as a convolution of images `(batch, height, width, channels)`; a product is one of a single line.

    Attributes:
      image: the shape of `x`.
      kernel: `(k_h, k_w, channels, outputs)`; one with groups has zeros between them.
      strides: down and across.
      padding: of `x`.
    """

    image: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]
    strides: tuple[int, int]
    padding: Border


def window_of(layer: LayerSpec) -> Window | str:
    """The layer as a convolution of images, or why it cannot run in the compiled kernel."""
    if layer.conv is None:
        rows, (inputs, outputs) = layer.rows, layer.kernel.shape
        alike = len(layer.x.shape) == len(layer.output.shape) == 4
        image: Any = layer.x.shape if alike else (1, 1, rows, inputs)
        return Window(image, (1, 1, inputs, outputs), (1, 1), NO_BORDER)
    conv, n = layer.conv, len(layer.kernel.shape) - 2
    if n not in (1, 2):
        return f"a convolution over {n} axes"
    if layer.depthwise:
        return "a depthwise convolution that the compiled kernel has not: it is for float32, without transposition"
    if any(d != 1 for d in conv["lhs_dilation"]):
        return "a transposed convolution"
    if any(d != 1 for d in conv["rhs_dilation"]):
        return "a dilated convolution"
    numbers = conv["dimension_numbers"]
    last = n + 1
    images, kernel = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    if (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) != (images, kernel, images):
        return "a convolution whose axes are in another order than batch, positions, channels"
    strides, padding = tuple(conv["window_strides"]), tuple(map(tuple, conv["padding"]))
    if any(p < 0 for pair in padding for p in pair):
        return "a convolution with negative padding"
    if n == 1:
        strides, padding = (1, *strides), ((0, 0), *padding)
    shape, kernel_shape = layer.x.shape, layer.kernel.shape
    if n == 1:
        shape, kernel_shape = (shape[0], 1, *shape[1:]), (1, *kernel_shape)
    if (groups := conv["feature_group_count"]) > 1:
        kernel_shape = (*kernel_shape[:2], groups * kernel_shape[2], kernel_shape[3])
        if math.prod(kernel_shape) > MOST_GROUPED:
            return f"{groups} groups, too many for a kernel with zeros between them"
    return Window(shape, kernel_shape, strides, padding)  # type: ignore[arg-type]
