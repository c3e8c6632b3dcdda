"""Activation functions fused into the layer before them, however a network writes them."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.compiler.ir import Call, Constant, Layer, LayerSpec, Step, Traced, Value, Variable, users_of
from sa_plus_plus.sparse.ops.activation import Activation, activate

_ELEMENTWISE = (
    *("add", "sub", "mul", "div", "neg", "max", "min", "exp", "square", "integer_pow", "abs", "sign", "tanh"),
    *("logistic", "erf", "erfc", "expm1", "log1p", "select_n", "gt", "ge", "lt", "le", "clamp"),
)
_MOST_CALLS = 32  # of an activation function, at most
_NEAR, _FAR = 12, np.geomspace(12, 1e30, 801)  # networks have limits at 20 or 65504, too
_POINTS = np.concatenate([np.linspace(-_NEAR, _NEAR, 4801), np.linspace(-0.1, 0.1, 201), _FAR, -_FAR]).astype(
    np.float32
)
_TOLERANCE = 2e-6  # absolute up to 1, relative above


def fuse_activations(traced: Traced) -> Traced:
    """The network with layers that absorb the activation function that follows them, in float32.

    If the operations between a layer's result and a later value depend on nothing else, and nothing else uses the
    values in between, they are a function of one variable. It is recognised by its values, since frameworks write the
    same function in different ways.
    """
    steps, users = traced.steps, users_of(traced.steps, traced.outputs)
    kept: list[Step | None] = list(steps)
    for i, step in enumerate(steps):
        if not isinstance(step, Layer) or step.spec.output.dtype != np.float32:
            continue
        if step.spec.activation not in ("none", "relu"):  # one that begins with a maximum of 0 may go on
            continue
        for inside in _regions(steps, i, users):
            output = steps[inside[-1]].outputs[0]
            if activation := _recognised([steps[j] for j in inside], step.spec, output):
                kept[i] = step._replace(spec=step.spec._replace(activation=activation, output=output))
                for j in inside:
                    kept[j] = None
                break
    return traced._replace(steps=[step for step in kept if step is not None])


def _regions(steps: Sequence[Step], start: int, users: dict[Variable, list[int]]) -> Iterator[list[int]]:
    """Operations that depend only on a layer's result and whose last result alone is used elsewhere, longest first."""
    layer, inside, found = steps[start].spec, [], []
    values: set[Variable] = {layer.output}
    for i in sorted(_reached(steps, layer.output, users)):
        call = steps[i]
        if not isinstance(call, Call) or not _pointwise(call, layer.output.shape, values):
            continue
        inside.append(i)
        values.update(call.outputs)
        if all(set(users.get(value, ())) <= set(inside) for value in values - set(call.outputs)):
            found.append(list(inside))
    yield from reversed(found)


def _reached(steps: Sequence[Step], value: Variable, users: dict[Variable, list[int]]) -> set[int]:
    """The nearest operations that follow a value."""
    reached: set[int] = set()
    front: list[Variable] = [value]
    while front and len(reached) < _MOST_CALLS:
        for i in users.get(front.pop(0), ()):
            if i < len(steps) and i not in reached and isinstance(call := steps[i], Call):
                reached.add(i)
                front.extend(call.outputs)
    return reached


def _pointwise(call: Call, shape: tuple[int, ...], values: set[Variable]) -> bool:
    """Whether an operation is elementwise with constants that are the same for all entries."""
    alike = call.name in _ELEMENTWISE and len(call.outputs) == 1 and call.outputs[0].shape == shape
    return alike and all(np.size(v.value) == 1 if isinstance(v, Constant) else v in values for v in call.inputs)


def _recognised(calls: Sequence[Call], layer: LayerSpec, end: Variable) -> Activation | None:
    """The activation function that these operations compute from a layer's result, with its own; or None."""
    if end.dtype != np.float32:
        return None
    with jax.ensure_compile_time_eval():
        known: dict[Value, Any] = {layer.output: activate(layer.activation, jax.device_put(_POINTS))}
        for call in calls:
            arguments = [
                known[v] if isinstance(v, Variable) else jnp.broadcast_to(np.reshape(v.value, ()), _POINTS.shape)
                for v in call.inputs
            ]
            known[call.outputs[0]] = call.run(*arguments)[0]
    got = np.asarray(known[end])
    return next((name for name, values in _values().items() if np.all(np.abs(got - values) <= _allowed(values))), None)


def _allowed(values: np.ndarray) -> np.ndarray:
    sizes = np.abs(_POINTS)
    far = np.where(sizes > _NEAR, sizes, 1)  # `x * (1 + tanh(x))` rounds at the scale of `x`
    return _TOLERANCE * np.maximum(far, np.abs(values))


@functools.cache
def _values() -> dict[Activation, np.ndarray]:
    names = [name for name in get_args(Activation) if name != "none"]
    with jax.ensure_compile_time_eval():  # one program: operation by operation there would be a dozen
        values = jax.jit(lambda points: [activate(name, points) for name in names])(_POINTS)
    return dict(zip(names, map(np.asarray, values), strict=True))
