"""Symmetric rounding to 8 bits, of kernels that are computed with and of kernels that are stored."""

import numpy as np


def round_to_int8(values: np.ndarray, axes: tuple[int, ...], limit: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Values as int8 with one scale for each slice along the other axes: `values ~ quantized * scales`.

    Args:
      values: finite.
      axes: those that share a scale.
      limit: the largest magnitude of an entry.

    Returns:
      int8 of the same shape; and float32 scales, `axes` of length 1: the largest magnitude is `limit` of them. A slice
      of zeros has scale 1; one whose scale is too small for float32 has scale 0 and is rounded to zeros.
    """
    wide = values.astype(np.float64)
    largest = np.abs(wide).max(axes, initial=0, keepdims=True)
    scales = np.where(largest > 0, largest / limit, 1).astype(np.float32)
    steps = wide / np.where(scales > 0, scales, np.inf)
    return np.rint(steps).clip(-limit, limit).astype(np.int8), scales
