"""MobileNetV2 and EfficientNet-Lite0 for images `(batch, height, width, 3)`; logits `(batch, classes)` are float32."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

_HE = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")
STEM, HEAD = 32, 1280  # widths


class Stage(NamedTuple):
    """Inverted residual blocks of one width.

    Attributes:
      factor: by which a block expands its channels.
      width: channels of the result.
      blocks: how many.
      stride: of the first block.
      window: side of the depthwise convolutions.
    """

    factor: int
    width: int
    blocks: int
    stride: int
    window: int = 3


STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
LITE0_STAGES = (
    *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
    *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
)


class MobileNetV2(nn.Module):
    """A stem, inverted residual blocks, a 1 x 1 convolution, the mean over positions, a dense layer.

    Attributes:
      classes: number of classes.
      stages: of each, the fields of a `Stage`.
      same: pads as TensorFlow does, so that an image has 1 / stride of its size, rounded up, with the larger part below
        and on the right; otherwise equally on all sides.
      epsilon: of the batch normalisations.
      dtype: that activations are computed in; parameters and running averages are float32.
    """

    classes: int
    stages: Sequence[tuple[int, ...]] = STAGES
    same: bool = False
    epsilon: float = 1e-5
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        conv = functools.partial(_convolution, self.same, dtype)
        options: dict[str, Any] = {"momentum": 0.9, "epsilon": self.epsilon, "dtype": dtype}
        norm = functools.partial(nn.BatchNorm, use_running_average=not training, **options)
        x = x.astype(dtype)
        x = nn.relu6(norm(name="norm_stem")(conv(STEM, 3, 2, name="conv_stem")(x)))
        for i, stage in enumerate((Stage(*fields) for fields in self.stages), 1):
            for j in range(1, stage.blocks + 1):
                x = _Inverted(stage, stage.stride if j == 1 else 1, conv, norm, name=f"stage{i}_block{j}")(x)
        x = nn.relu6(norm(name="norm_head")(conv(HEAD, name="conv_head")(x)))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01), name="head")(x)


def _convolution(same: bool, dtype: Any, width: int, window: int = 1, stride: int = 1, **options: Any) -> nn.Conv:
    padding = "SAME" if same else window // 2
    options |= {"padding": padding, "use_bias": False, "dtype": dtype, "kernel_init": _HE}
    return nn.Conv(width, (window, window), stride, **options)


def EfficientNetLite0(classes: int, dtype: str = "float32") -> MobileNetV2:
    """EfficientNet-B0 with ReLU6 and without squeeze-and-excitation: MobileNetV2 with other stages and padding."""
    return MobileNetV2(classes, stages=LITE0_STAGES, same=True, epsilon=1e-3, dtype=dtype)


class _Inverted(nn.Module):
    """A 1 x 1 convolution to more channels, a depthwise and a 1 x 1 convolution; plus its input, if it fits."""

    stage: Stage
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, inner = x, self.stage.factor * x.shape[-1]
        if self.stage.factor > 1:
            y = nn.relu6(self.norm(name="norm_expand")(self.conv(inner, name="conv_expand")(y)))
        window = self.stage.window
        depthwise = self.conv(inner, window, self.stride, feature_group_count=inner, name="conv_depthwise")
        y = nn.relu6(self.norm(name="norm_depthwise")(depthwise(y)))
        y = self.norm(name="norm_project")(self.conv(self.stage.width, name="conv_project")(y))
        return x + y if x.shape == y.shape else y
