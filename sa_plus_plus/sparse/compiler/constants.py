"""Operations on constants: computed while a network is traced, along with the origin of their entries."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.compiler.ir import Call, Constant

_CASTS = ("convert_element_type", "copy", "copy_p", "stop_gradient")
_ELEMENTWISE = (
    *("add", "sub", "mul", "div", "neg", "max", "min", "sqrt", "rsqrt", "exp", "log", "square", "integer_pow", "pow"),
    *_CASTS,
)
_IN_NUMPY: dict[str, Callable[..., Any]] = {  # JAX would compile a program for each shape
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative},
    **{"sqrt": np.sqrt, "rsqrt": lambda x: np.reciprocal(np.sqrt(x)), "square": np.square},
}
_MOVES = (  # operations that keep each entry of their first operand, up to rounding
    *("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "slice", "dynamic_slice", "rev"),
    "split",
    *_CASTS,
)


def constant(value: Any) -> Constant:
    """A constant without an origin."""
    return Constant(value, np.shape(value))


def computed(call: Call, inputs: Sequence[Constant], shapes: Sequence[tuple[int, ...]]) -> list[Constant]:
    """An operation on constants; broadcasting along constant axes is deferred as long as possible.

    Args:
      call: the operation.
      inputs: its operands.
      shapes: of its results.
    """
    leaves = frozenset[str]().union(*(value.leaves for value in inputs))
    return [result._replace(leaves=leaves) for result in _computed(call, inputs, shapes)]


def _computed(call: Call, inputs: Sequence[Constant], shapes: Sequence[tuple[int, ...]]) -> list[Constant]:
    if (origin := inputs[0].origin if inputs and call.name in _MOVES else None) is not None:
        results = _computed(call, [inputs[0]._replace(origin=None), *inputs[1:]], shapes)
        positions = [origin.positions]
        if call.name not in _CASTS:
            before = Constant(jnp.asarray(origin.positions), inputs[0].shape)
            positions = [places.value for places in _computed(call, [before, *inputs[1:]], shapes)]
        return [
            result._replace(origin=origin._replace(positions=places))
            for result, places in zip(results, positions, strict=True)
        ]
    if call.name == "broadcast_in_dim" and len(inputs) == 1:
        shape, axes = call.params["shape"], call.params["broadcast_dimensions"]
        narrow = [1] * len(shape)
        for axis, length in zip(axes, np.shape(inputs[0].value), strict=True):
            narrow[axis] = length
        return [Constant(_reshaped(inputs[0].value, narrow), tuple(shape))]
    full = bool(inputs) and np.shape(inputs[0].value) == inputs[0].shape
    if call.name == "reshape" and full and call.params.get("dimensions") is None:
        return [Constant(_reshaped(inputs[0].value, shapes[0]), tuple(shapes[0]))]
    if call.name in _IN_NUMPY and all(c.dtype in (np.float32, np.float64) for c in inputs):
        with np.errstate(all="ignore"):
            value = _IN_NUMPY[call.name](*(np.asarray(c.value) for c in inputs))
        return [Constant(np.asarray(value), tuple(shapes[0]))]
    if call.name in _ELEMENTWISE:
        narrow_shape = np.broadcast_shapes(*(np.shape(c.value) for c in inputs))
        results = call.run(*(jnp.broadcast_to(c.value, narrow_shape) for c in inputs))
    else:
        results = call.run(*(c.full for c in inputs))
    return [Constant(value, tuple(shape)) for value, shape in zip(results, shapes, strict=True)]


def _reshaped(value: Any, shape: Sequence[int]) -> Any:
    keys = jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended)  # of random numbers, which NumPy does not have
    return value.reshape(shape) if keys else np.asarray(value).reshape(shape)


def arranged(kernel: Constant, order: Sequence[int], shape: Sequence[int] | None = None) -> Constant:
    """A constant in full, transposed and then reshaped."""

    def rearranged(value: Any) -> Any:
        full = jnp.broadcast_to(value, kernel.shape)
        full = full if tuple(order) == tuple(range(full.ndim)) else jnp.transpose(full, order)
        return full if shape is None else full.reshape(shape)

    value, origin = rearranged(kernel.value), kernel.origin
    origin = origin and origin._replace(positions=rearranged(origin.positions))
    return Constant(value, value.shape, origin, kernel.leaves)


def item(stack: Constant, i: int) -> Constant:
    """`stack[i]`."""
    place = 0 if len(stack.value) == 1 else i
    origin = stack.origin and stack.origin._replace(positions=stack.origin.positions[place])
    return Constant(jnp.asarray(stack.value)[place], stack.shape[1:], origin, stack.leaves)
