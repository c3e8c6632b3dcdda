"""Rounding of values and kernels to bfloat16 and to 8 bits, and how values are encoded between layers.

A value is encoded in the type in which all its users take it: a layer that feeds int8 layers rounds to uint8 when it
stores its result, and leaves a border of zeros for the padding of the next convolution.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from sa_plus_plus.sparse.compiler.conv_geometry import NO_BORDER, Border
from sa_plus_plus.sparse.int8 import round_to_int8
from sa_plus_plus.sparse.ops import native

FLOAT32, BFLOAT16, UINT8 = np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.uint8)


class Encoding(NamedTuple):
    """How a value is encoded in an array.

    Attributes:
      dtype: of the array; uint8 stands for `(array - zero_point) * scale`.
      scale: as above.
      zero_point: as above.
      border: zeros around each image.
      channels: of an image, if padded with channels of zeros.
    """

    dtype: np.dtype
    scale: float = 1.0
    zero_point: int = 0
    border: Border = NO_BORDER
    channels: int | None = None


def quantized(low: float, high: float) -> Encoding:
    """uint8 for values from `low` to `high`: one scale per tensor, zero exact."""
    low, high = min(low, 0.0), max(high, 0.0, 1e-30)
    zero = round(255 * -low / (high - low))
    if low < 0:
        zero = min(max(zero, 1), 254)
    return Encoding(UINT8, max(high / (255 - zero), -low / zero if zero else 0.0), zero)


def quantize_kernel(kernel: np.ndarray, limit: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """A kernel in int8, symmetric for each output channel: `kernel ~ quantized * scales`.

    Args:
      kernel: outputs last.
      limit: the largest magnitude of an entry.

    Returns:
      int8 of the same shape; and `(outputs,)` float32.
    """
    quantized, scales = round_to_int8(kernel, tuple(range(kernel.ndim - 1)), limit)
    return quantized, scales.reshape(-1)


def overflows(kernel: np.ndarray) -> bool:
    """Whether a sum of products with a column of an int8 kernel can be beyond 32 bits.

    With `x` from 0 to 255 each partial sum is between 255 times the sum of the negative weights and that of the
    positive ones.

    Args:
      kernel: `(..., outputs)` int8.
    """
    columns = kernel.reshape(-1, kernel.shape[-1])
    sums = [part.sum(0, np.int64) for part in (np.maximum(columns, 0), np.minimum(columns, 0))]
    return 255 * int(np.abs(sums).max(initial=0)) > np.iinfo(np.int32).max


def fallback_type() -> np.dtype:
    """The type of layers of an int8 network that int8 does not suit: the faster one."""
    return BFLOAT16 if native.bf16_is_faster() else FLOAT32


def convert(array: Any, have: Encoding, want: Encoding) -> Any:
    """A value in another encoding.

    Args:
      array: the value as encoded.
      have: its encoding.
      want: the requested encoding.
    """
    if have == want:
        return array
    if have == Encoding(FLOAT32) and want.dtype in (FLOAT32, BFLOAT16, UINT8) and native.unavailable_reason() is None:
        image = array if array.ndim == 4 else array.reshape(1, 1, -1, array.shape[-1] if array.ndim else 1)
        rounded = native.round_images(image, want.dtype, want.scale, want.zero_point, want.border, want.channels)
        return rounded if array.ndim == 4 else rounded.reshape(array.shape)
    if have.border != NO_BORDER and have.border != want.border:
        (top, _), (left, _) = have.border
        rows, columns = (n - sum(pair) for n, pair in zip(array.shape[1:3], have.border, strict=True))
        array = array[:, top : top + rows, left : left + columns]
        have = have._replace(border=NO_BORDER)
    if have[:3] != want[:3]:
        if have.dtype == UINT8:
            array = (array.astype(np.float32) - have.zero_point) * np.float32(have.scale)
        if want.dtype == UINT8:
            array = jnp.clip(jnp.round(array.astype(np.float32) * np.float32(1 / want.scale)) + want.zero_point, 0, 255)
        array = array.astype(want.dtype)
    if have.border != want.border or have.channels != want.channels:
        around = want.border if have.border != want.border else NO_BORDER
        more = 0 if want.channels is None or have.channels == want.channels else want.channels - array.shape[3]
        pads = ((0, 0, 0), *((low, high, 0) for low, high in around), (0, more, 0))
        array = lax.pad(array, jnp.asarray(want.zero_point, array.dtype), pads)
    return array
