"""Small networks for small images, `(batch, height, width, channels)`; classifiers give logits `(batch, classes)`."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Hidden layers of these widths, no convolution; examples may have any shape.

    With `inputs_by_table` the inputs are looked up in the order of a table, so that reordering can bring those together
    that the first layer uses in the same units.
    """

    classes: int = 10
    widths: Sequence[int] = (67,)
    inputs_by_table: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, training: bool = False) -> jax.Array:
        del training  # models with state are told; this one's does not change
        x = x.reshape(x.shape[0], -1)
        if self.inputs_by_table:
            x = x[:, self.variable("tables", "places", jnp.arange, x.shape[1]).value]
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class LeNet300(MLP):
    """LeNet-300-100: two hidden layers, no convolution. 266,200 kernel weights on 28 x 28 images."""

    widths: Sequence[int] = (300, 100)


class ConvNet(nn.Module):
    """Three strided 3 x 3 convolutions and a dense layer. 97,680 kernel weights on 28 x 28 grey images."""

    classes: int = 10
    widths: Sequence[int] = (16, 32, 64)
    hidden: int = 72

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.classes)(x)


class Autoencoder(nn.Module):
    """Two dense layers to a code and two back; the output has the shape of the input."""

    width: int = 256
    code: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape
        x = x.reshape(shape[0], -1)
        size = x.shape[1]
        x = nn.Dense(self.code)(nn.relu(nn.Dense(self.width)(x)))
        x = nn.sigmoid(nn.Dense(size)(nn.relu(nn.Dense(self.width)(x))))
        return x.reshape(shape)
