"""Convolution by one matrix product, where XLA's own is slow."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

_FEW = 4  # positions of the result


def convolution(
    x: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Sequence[tuple[int, int]], **options: Any
) -> jax.Array:
    """As `jax.lax.conv_general_dilated` for flax's layers, of `(batch, height, width, channels)`.

    On a CPU a 3 x 3 convolution of very small images runs at 2 to 9 GFLOP/s, forwards and backwards (two cores, 2 x 2
    positions, 512 channels), and a product with the patches side by side at 220. That is what a ResNet ends in on
    images of 64 x 64. A 1 x 1 convolution as a product is one and a half to three times as fast.
    """
    height, width = kernel.shape[:2]
    rows, columns = (
        (n + sum(pads) - k) // stride + 1
        for n, pads, k, stride in zip(x.shape[1:3], padding, (height, width), window_strides, strict=True)
    )
    if jax.default_backend() != "cpu" or (height * width > 1 and rows * columns > _FEW):
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    down, across = window_strides
    patches = [
        x[:, i : i + down * (rows - 1) + 1 : down, j : j + across * (columns - 1) + 1 : across]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])
