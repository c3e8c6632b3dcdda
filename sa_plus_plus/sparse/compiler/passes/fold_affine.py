"""Folding of scales, shifts, residuals and ReLU into the layer before them."""

from collections import Counter
from typing import Any

import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.compiler.ir import Call, Constant, Layer, Step, Traced, Value, Variable, live, variables


def fold_affine(traced: Traced) -> Traced:
    """The network with layers that absorb what follows them; steps whose results are not used are dropped."""
    needed = live(traced.steps, traced.outputs)
    results = {v for v in traced.outputs if isinstance(v, Variable)}
    uses = Counter([*(v for step in needed for v in variables(step)), *results])
    steps: list[Step | None] = []
    open_ends: dict[Value, int] = {}  # by result: positions in `steps` of products that nothing else uses
    for call in needed:
        if isinstance(call, Layer):
            open_ends[call.spec.output] = len(steps)
            steps.append(call)
            continue
        steps.append(call)
        for at, value in enumerate(call.inputs):
            if isinstance(value, Constant) or value not in open_ends or uses[value] > 1:
                continue
            place = open_ends[value]
            before = steps[place]
            assert isinstance(before, Layer)
            if together := _folded_into(before, call, at):
                # At the position of the folded operation: a residual may come later than the product.
                steps[place], steps[-1] = None, together
                if together.spec.activation == "none":
                    open_ends[together.spec.output] = len(steps) - 1
                break
    return traced._replace(steps=[step for step in steps if step is not None])


def _folded_into(linear: Layer, call: Call, at: int) -> Layer | None:
    """A product fused with an operation on its result, if this changes only the rounding of the last digit.

    So nothing is folded across a change of type, where rounding may be intended, nor into low-precision types.
    """
    if len(call.outputs) != 1 or len(call.inputs) != 2:
        return None
    (output,), (other,) = call.outputs, call.inputs[:at] + call.inputs[at + 1 :]
    layer, name = linear.spec, call.name
    if (output.shape, output.dtype) != (layer.output.shape, layer.output.dtype):
        return None
    wide = output.dtype in (np.float32, np.float64) and layer.kernel.dtype == output.dtype
    if isinstance(other, Variable):
        alike = (other.shape, other.dtype) == (output.shape, output.dtype) and other != layer.output
        if not wide or name not in ("add", "add_any") or not alike or layer.residual is not None:
            return None
        return linear._replace(spec=layer._replace(residual=other, output=output))
    value = np.asarray(other.value)
    if name == "max" and value.size == 1 and not value.any():
        return linear._replace(spec=layer._replace(activation="relu", output=output))
    value = value.reshape((1,) * (len(output.shape) - value.ndim) + value.shape)
    lead = len(output.shape) - len(layer.columns)
    if not wide or any(n != 1 for n in value.shape[:lead]) or layer.residual is not None:
        return None
    value = np.broadcast_to(value.reshape(value.shape[lead:]).astype(np.float64), layer.columns).reshape(-1)
    return _affine(linear, name, at, value, output)


def _affine(linear: Layer, name: str, at: int, c: np.ndarray, output: Variable) -> Layer | None:
    """`y + c`, `y - c`, `c - y`, `y * c` or `y / c`, with a `c` for each column."""
    scale, shift = linear.scale, linear.shift
    if name in ("add", "add_any", "sub"):
        by = -1 if name == "sub" and at == 1 else 1  # c - y
        shift = (0 if shift is None else by * shift) + (-c if name == "sub" and at == 0 else c)
        if by == -1:
            scale = -(np.ones_like(c) if scale is None else scale)
    elif name == "mul" or (name == "div" and at == 0):
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            factor = c if name == "mul" else 1 / c
            scale = factor if scale is None else scale * factor
            shift = None if shift is None else shift * factor
    else:
        return None
    if not _holds(linear.original, scale) or not _holds(np.ones(1, output.dtype), shift):
        return None
    return Layer(linear.spec._replace(output=output), linear.original, scale, shift)


def _holds(original: Any, factor: np.ndarray | None) -> bool:
    """Whether the type of an array can hold its product with a factor without overflow or underflow."""
    if factor is None:
        return True
    limits = jnp.finfo(original.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = np.abs(np.asarray(original, np.float64) * factor)
    return bool(np.isfinite(factor).all() and (sizes <= float(limits.max)).all() and _no_denormals(sizes, limits))


def _no_denormals(sizes: np.ndarray, limits: Any) -> bool:
    return not ((sizes > 0) & (sizes < float(limits.tiny))).any()
