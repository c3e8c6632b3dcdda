"""Residual networks for images `(batch, height, width, 3)`; logits `(batch, classes)` are float32.

ResNet-50 is version 1.5: its strides are in the 3 x 3 convolutions. Under `jax.jit` over a mesh, batch statistics are
those of the global batch, since a step is written in the global view.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.convolution import convolution

_HE = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over positions, a dense layer.

    Attributes:
      classes: number of classes.
      stages: number of blocks in each stage; each stage but the first halves height and width.
      bottleneck: whether a block is 1 x 1, 3 x 3, 1 x 1 convolutions to four times the width, or 3 x 3 twice.
      width: of the first stage; each stage doubles it.
      widths: of each stage, instead of `width`.
      small_images: a stem of one 3 x 3 convolution, as for CIFAR, instead of 7 x 7 and pooling, both with stride 2.
      dtype: that activations are computed in; parameters and running averages are float32.
    """

    classes: int
    stages: Sequence[int] = (3, 4, 6, 3)
    bottleneck: bool = True
    width: int = 64
    widths: Sequence[int] = ()
    small_images: bool = False
    dtype: str = "float32"

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Of each stage."""
        return tuple(self.widths) or tuple(self.width * 2**i for i in range(len(self.stages)))

    @nn.compact
    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        dtype, widths = jnp.dtype(self.dtype), self.stage_widths
        if len(widths) != len(self.stages):
            raise ValueError(f"ResNet needs a width for each of its {len(self.stages)} stages, got widths={widths}")
        conv = functools.partial(
            nn.Conv, padding=0, use_bias=False, dtype=dtype, kernel_init=_HE, conv_general_dilated=convolution
        )
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not training, momentum=0.9, epsilon=1e-5, dtype=dtype
        )
        x = x.astype(dtype)
        if self.small_images:
            x = nn.relu(norm(name="norm_stem")(conv(widths[0], (3, 3), padding=1, name="conv_stem")(x)))
        else:
            x = nn.relu(norm(name="norm_stem")(conv(widths[0], (7, 7), 2, padding=3, name="conv_stem")(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        block = _Bottleneck if self.bottleneck else _Basic
        for i, (blocks, width) in enumerate(zip(self.stages, widths, strict=True)):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = block(width, stride, conv, norm, name=f"stage{i + 1}_block{j + 1}")(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01), name="head")(x)


class _Basic(nn.Module):
    """Two 3 x 3 convolutions."""

    width: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm(name="norm1")(self.conv(self.width, (3, 3), self.stride, padding=1, name="conv1")(x)))
        y = self.conv(self.width, (3, 3), padding=1, name="conv2")(y)
        return _joined(self, x, self.norm(name="norm2", scale_init=nn.initializers.zeros)(y))


class _Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions."""

    width: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm(name="norm1")(self.conv(self.width, (1, 1), name="conv1")(x)))
        y = nn.relu(self.norm(name="norm2")(self.conv(self.width, (3, 3), self.stride, padding=1, name="conv2")(y)))
        y = self.conv(4 * self.width, (1, 1), name="conv3")(y)
        return _joined(self, x, self.norm(name="norm3", scale_init=nn.initializers.zeros)(y))


def _joined(block: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The block's input, projected to the shape of its branch if they differ, plus the branch."""
    if x.shape != y.shape:
        x = block.conv(y.shape[-1], (1, 1), block.stride, name="conv_shortcut")(x)
        x = block.norm(name="norm_shortcut")(x)
    return nn.relu(x + y)


ResNet50 = functools.partial(ResNet, stages=(3, 4, 6, 3))
ResNet34 = functools.partial(ResNet, stages=(3, 4, 6, 3), bottleneck=False)
ResNet18 = functools.partial(ResNet, stages=(2, 2, 2, 2), bottleneck=False)
ResNet20 = functools.partial(ResNet, stages=(3, 3, 3), bottleneck=False, width=16, small_images=True)
