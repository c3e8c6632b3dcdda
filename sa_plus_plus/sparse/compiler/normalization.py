"""Layer normalisation as one step of the compiled kernel."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from sa_plus_plus.sparse.compiler.ir import Call, Constant, Variable
from sa_plus_plus.sparse.ops import native


class Normalization(NamedTuple):
    """`(x - mean) / sqrt(variance + epsilon) * scale + shift` along the last axis.

    Attributes:
      inputs: `x`, float32 or bfloat16, and `scale` and `shift`, float32 with one entry for each of the last axis.
      outputs: the result, of the shape and type of `x`.
      epsilon: as above.
      centred: whether the mean is subtracted; otherwise it counts as 0, in the variance too, as in RMS normalisation.
      calls: the operations that it stands for, from `x` to the result.
    """

    inputs: tuple[Variable, Constant, Constant]
    outputs: tuple[Variable]
    epsilon: float
    centred: bool
    calls: tuple[Call, ...] = ()

    @property
    def name(self) -> str:
        return "layer_norm" if self.centred else "rms_norm"

    def run(self, x: Any, scale: Any, shift: Any) -> list[Any]:
        scale, shift = (jnp.asarray(a, jnp.float32) for a in (scale, shift))
        return [native.layer_norm(x, scale, shift, self.epsilon, self.centred, self.outputs[0].dtype)]
