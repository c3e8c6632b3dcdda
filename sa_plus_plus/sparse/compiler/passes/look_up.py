"""Lookups of columns in a constant order become steps of the compiled kernel, as after `sapp.reorder` of an input."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.compiler.ir import Call, Constant, Step, Value, Variable
from sa_plus_plus.sparse.compiler.quantization import BFLOAT16, FLOAT32
from sa_plus_plus.sparse.ops import native


class LookUp(NamedTuple):
    """`y[..., k] = x[..., places[k]]`.

    Attributes:
      inputs: `x`.
      outputs: `y`.
      places: `(k,)` int32.
    """

    inputs: tuple[Value]
    outputs: tuple[Variable, ...]
    places: np.ndarray

    @property
    def name(self) -> str:
        return "look_up"

    def run(self, x: Any) -> list[Any]:
        return [native.look_up(x, jnp.asarray(self.places))]


def fuse_look_up(step: Step) -> Step:
    """The step in the compiled kernel if it looks columns up in a constant order, otherwise as it is."""
    if not isinstance(step, Call) or step.name != "gather":
        return step
    x, indices = step.inputs
    if not isinstance(x, Variable) or not isinstance(indices, Constant) or x.dtype not in (FLOAT32, BFLOAT16):
        return step
    last, numbers = len(x.shape) - 1, step.params["dimension_numbers"]
    columns = (
        tuple(numbers.offset_dims) == tuple(range(last))
        and tuple(numbers.collapsed_slice_dims) == tuple(numbers.start_index_map) == (last,)
        and not numbers.operand_batching_dims
        and tuple(step.params["slice_sizes"]) == (*x.shape[:-1], 1)
        and len(step.outputs[0].shape) == len(x.shape)
    )
    places = np.asarray(indices.full).reshape(-1)
    if not columns or not math.prod(step.outputs[0].shape) or not ((places >= 0) & (places < x.shape[-1])).all():
        return step  # places outside give another number, depending on the mode
    return LookUp((x,), step.outputs, places.astype(np.int32))
