"""MobileNetV2 for images `(batch, height, width, 3)`; logits `(batch, classes)` are float32."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_HE = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, HEAD = 32, 1280  # widths


class MobileNetV2(nn.Module):
    """A stem, inverted residual blocks, a 1 x 1 convolution, the mean over positions, a dense layer.

    Attributes:
      classes: number of classes.
      stages: of each, by what factor blocks expand their channels, the width, the number of blocks, and the stride of
        the first.
      dtype: that activations are computed in; parameters and running averages are float32.
    """

    classes: int
    stages: Sequence[tuple[int, int, int, int]] = STAGES
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        conv = functools.partial(nn.Conv, use_bias=False, dtype=dtype, kernel_init=_HE)
        norm = functools.partial(nn.BatchNorm, use_running_average=not training, momentum=0.9, dtype=dtype)
        x = x.astype(dtype)
        x = nn.relu6(norm(name="norm_stem")(conv(STEM, (3, 3), 2, padding=1, name="conv_stem")(x)))
        for i, (factor, width, blocks, stride) in enumerate(self.stages, 1):
            for j in range(1, blocks + 1):
                x = _Inverted(factor, width, stride if j == 1 else 1, conv, norm, name=f"stage{i}_block{j}")(x)
        x = nn.relu6(norm(name="norm_head")(conv(HEAD, (1, 1), name="conv_head")(x)))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01), name="head")(x)


class _Inverted(nn.Module):
    """A 1 x 1 convolution to more channels, a depthwise 3 x 3 and a 1 x 1 convolution; plus its input, if it fits."""

    factor: int
    width: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, inner = x, self.factor * x.shape[-1]
        if self.factor > 1:
            y = nn.relu6(self.norm(name="norm_expand")(self.conv(inner, (1, 1), name="conv_expand")(y)))
        depthwise = self.conv(inner, (3, 3), self.stride, padding=1, feature_group_count=inner, name="conv_depthwise")
        y = nn.relu6(self.norm(name="norm_depthwise")(depthwise(y)))
        y = self.norm(name="norm_project")(self.conv(self.width, (1, 1), name="conv_project")(y))
        return x + y if x.shape == y.shape else y
