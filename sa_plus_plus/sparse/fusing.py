"""Fusion of attention, which networks write as two products with a softmax between them, into one step."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.attention import Attention, Bias, Heads
from sa_plus_plus.sparse.steps import Call, Constant, Linear, Traced, Value, Variable, inputs_of, users_of

FEWEST_QUERIES = 8  # the compiled kernel computes several rows of scores at a time
MASKED = -1e9  # a number so low that adding it to a score is as good as replacing the score
_SAME = ("convert_element_type", "copy", "copy_p", "stop_gradient")
_TYPES = tuple(np.dtype(dtype) for dtype in (jnp.float32, jnp.bfloat16))

Makers = Mapping[Variable, Call]  # by value: the operation that computes it


def _maker(value: Value, makers: Makers) -> Call | None:
    return makers.get(value) if isinstance(value, Variable) else None


class _Scores(NamedTuple):
    """A product of two variables, scaled and with biases; its axis `i` is axis `order[i]` of the product."""

    product: Call
    order: tuple[int, ...]
    scale: float = 1.0
    biases: tuple[Bias, ...] = ()


def with_attention(traced: Traced[Call | Linear]) -> list[Any]:
    """The steps of a network, with attention as one where the compiled kernel can run it."""
    steps: list[Any] = list(traced.steps)
    makers = {v: call for call in steps if isinstance(call, Call) for v in call.outputs}
    users = users_of(steps, traced.outputs)
    for number, step in enumerate(traced.steps):
        if not isinstance(step, Call) or step.primitive.name != "dot_general":
            continue
        after = users.get(step.outputs[0], [])
        turned = traced.steps[after[0]] if len(after) == 1 and after[0] < len(steps) else None
        if not isinstance(turned, Call) or turned.primitive.name != "transpose":
            turned = None
        found = next(filter(None, (_attention(step, side, turned, makers, users) for side in (0, 1))), None)
        if found is not None:
            steps[number], steps[number if turned is None else after[0]] = None, found
    return _live([step for step in steps if step is not None], traced.outputs)


def _live(steps: Sequence[Any], outputs: Sequence[Value]) -> list[Any]:
    """The steps without operations whose results nothing uses."""
    needed, live = {v for v in outputs if isinstance(v, Variable)}, []
    for step in reversed(steps):
        if not isinstance(step, Call) or not needed.isdisjoint(step.outputs) or "callback" in step.primitive.name:
            needed.update(inputs_of(step))
            live.append(step)
    return live[::-1]


def _attention(
    last: Call, side: int, turned: Call | None, makers: Makers, users: Mapping[Variable, Sequence[int]]
) -> Attention | None:
    """Attention that ends in a product, whose operand `side` is the shares; then transposed if `turned`."""
    (over, over_v), (along, along_v) = (pair[:: 1 - 2 * side] for pair in last.options["dimension_numbers"])
    shares, v = last.inputs[:: 1 - 2 * side]
    if not isinstance(v, Variable) or not isinstance(shares, Variable) or len(over) != 1 or len(users[shares]) > 1:
        return None
    scores = _softmax(shares, over[0], makers)
    if scores is None or any(bias.masked is not None and bias.factor > MASKED for bias in scores.biases):
        return None
    first, (_, shape, _) = scores.product, scores.product.outputs[0]
    numbers = first.options["dimension_numbers"]
    axes = _axes_of(numbers, [len(x.shape) for x in first.inputs])
    keys, batches = scores.order[over[0]], len(numbers[1][0])
    (q, q_axes), (k, k_axes) = [*zip(first.inputs, axes, strict=True)][:: 1 if keys in axes[1] else -1]
    v_axes = [-1] * len(v.shape)
    for axis, other in zip((*over_v, *along_v), (*over, *along), strict=True):
        v_axes[axis] = scores.order[other]
    rest = [scores.order[i] for i in range(len(shape)) if i not in (*over, *along)]
    own = [i for i in rest if i in q_axes and i not in k_axes]
    if keys < batches or not own or any(list(each).count(-1) != 1 for each in (q_axes, k_axes, v_axes)):
        return None
    queries = max(own, key=lambda i: shape[i])
    heads = tuple(i for i in range(len(shape)) if i not in (queries, keys))
    if len(heads) > 3 or 0 in (*shape, *v.shape, *q.shape) or shape[queries] < FEWEST_QUERIES:
        return None
    output = last.outputs[0] if turned is None else turned.outputs[0]
    if not isinstance(q, Variable) or not isinstance(k, Variable):
        return None
    if {np.dtype(x.dtype) for x in (q, k, v, output)} not in [{known} for known in _TYPES]:
        return None
    y_axes = [*(scores.order[i] for i in along), *(rest if side == 0 else ()), -1, *(rest if side else ())]
    if turned is not None:
        y_axes = [y_axes[i] for i in turned.options["permutation"]]
    inputs = (q, k, v, *(bias.value for bias in scores.biases))
    calls = _between(inputs, output, makers)
    if calls is None:
        return None
    order = Heads(tuple(shape), heads, queries, keys, q_axes, k_axes, tuple(v_axes), tuple(y_axes))
    return Attention(inputs, (output,), order, scores.scale, scores.biases, calls)


def _axes_of(numbers: Any, ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """By operand of a product: which axis of the result each of its axes is; -1 for one that is contracted."""
    (contracted, batch), result = numbers, []
    count = len(batch[0])
    for over, along, rank in zip(contracted, batch, ranks, strict=True):
        axes = [-1] * rank
        for i, axis in enumerate(along):
            axes[axis] = i
        for axis in range(rank):
            if axis not in over and axis not in along:
                axes[axis], count = count, count + 1
        result.append(tuple(axes))
    return result


def _between(inputs: Sequence[Value], output: Variable, makers: Makers) -> tuple[Call, ...] | None:
    """The operations that compute a value from others, in order; None if it depends on anything else."""
    known = {v for v in inputs if isinstance(v, Variable)}
    order: dict[Variable, Call] = {}

    def visit(value: Value) -> bool:
        if isinstance(value, Constant) or value in known or value in order:
            return True
        call = _maker(value, makers)
        if call is None or len(call.outputs) != 1 or not all(map(visit, call.inputs)):
            return False
        order[value] = call
        return True

    return tuple(order.values()) if visit(output) else None


def _softmax(value: Variable, axis: int, makers: Makers) -> _Scores | None:
    """The scores `x` of which a value is the softmax along an axis, `exp(x - c) / sum(exp(x - c))` with any `c`."""
    shares = _maker(_before(value, _SAME, makers), makers)
    if shares is None or shares.primitive.name != "div" or not _variables(*shares.inputs):
        return None
    powers, total = _maker(shares.inputs[0], makers), _before(shares.inputs[1], _SAME, makers)
    if powers is None or powers.primitive.name != "exp" or not _sums(total, shares.inputs[0], axis, makers):
        return None
    scores = powers.inputs[0]
    below = _maker(scores, makers)
    if below is not None and below.primitive.name == "sub" and _same_along(below.inputs[1], axis, makers):
        scores = below.inputs[0]
    return _scores(scores, makers)


def _sums(value: Value, of: Value, axis: int, makers: Makers) -> bool:
    """Whether a value is the sum of another along an axis, broadcast along it."""
    while (call := _maker(value, makers)) is not None and call.primitive.name in ("broadcast_in_dim", "reshape"):
        (before,), (after,) = call.inputs, call.outputs
        others = [i for i in range(len(after.shape)) if i != axis or len(before.shape) == len(after.shape)]
        if call.primitive.name == "broadcast_in_dim" and [*call.options["broadcast_dimensions"]] != others:
            return False
        if call.primitive.name == "reshape" and (
            after.shape[axis] != 1 or [after.shape[i] for i in others] != [*before.shape]
        ):
            return False
        value = before
    if call is None or call.primitive.name != "reduce_sum" or tuple(call.options["axes"]) != (axis,):
        return False
    return call.inputs[0] == of


def _same_along(value: Value, axis: int, makers: Makers) -> bool:
    """Whether all entries along an axis are known to be equal."""
    if isinstance(value, Constant):
        return not value.shape or np.shape(value.value)[axis] == 1
    if value.shape[axis] == 1:
        return True
    call = _maker(value, makers)
    if call is None or call.primitive.name != "broadcast_in_dim":
        return False
    dims = [*call.options["broadcast_dimensions"]]
    return axis not in dims or call.inputs[0].shape[dims.index(axis)] == 1


def _before(value: Value, names: Sequence[str], makers: Makers) -> Value:
    """What a value was before operations of these names, each on one value."""
    while (call := _maker(value, makers)) is not None and call.primitive.name in names:
        (value,) = call.inputs
    return value


def _variables(*values: Value) -> bool:
    return all(isinstance(v, Variable) for v in values)


def _scores(value: Value, makers: Makers) -> _Scores | None:
    """The product from which a value comes by transposition, scaling, masks and the addition of biases."""
    call = _maker(value, makers)
    if call is None:
        return None
    name, inputs = call.primitive.name, call.inputs
    if name == "dot_general":
        return _Scores(call, tuple(range(len(value.shape)))) if _variables(*inputs) else None
    if name == "transpose" or name in _SAME:
        found = _scores(inputs[0], makers)
        order = call.options["permutation"] if name == "transpose" else range(len(value.shape))
        return found and found._replace(order=tuple(found.order[i] for i in order))
    if name in ("mul", "div"):
        return _scaled(call, makers)
    if name in ("add", "add_any", "sub"):
        for at in (0, 1) if name != "sub" else (0,):
            if found := _scores(inputs[at], makers):
                return _biased(found, inputs[1 - at], makers, -1.0 if name == "sub" else 1.0)
    if name == "select_n" and len(inputs) == 3:
        for at in (1, 2):
            instead = _number(inputs[3 - at])
            if instead is not None and (found := _scores(inputs[at], makers)):
                return _biased(found, inputs[0], makers, instead, masked=at == 1)
    return None


def _scaled(call: Call, makers: Makers) -> _Scores | None:
    """Scores times a number."""
    x, c = call.inputs
    if call.primitive.name == "mul" and isinstance(x, Constant):
        x, c = c, x
    factor = _number(c)
    found = _scores(x, makers) if factor else None
    if found is None or factor is None:
        return None
    factor = factor if call.primitive.name == "mul" else 1 / factor
    biases = tuple(bias._replace(factor=bias.factor * factor) for bias in found.biases)
    return found._replace(scale=found.scale * factor, biases=biases)


def _biased(scores: _Scores, value: Value, makers: Makers, factor: float, masked: bool | None = None) -> _Scores:
    """Scores with a bias or a mask, before it was broadcast."""
    axes = scores.order
    if isinstance(value, Constant):
        value = Constant(value.value, np.shape(value.value))
    elif (call := makers.get(value)) is not None and call.primitive.name == "broadcast_in_dim":
        value, axes = call.inputs[0], tuple(axes[i] for i in call.options["broadcast_dimensions"])
    bias = Bias(value, axes if value.shape else (), factor, masked)
    return scores._replace(biases=(*scores.biases, bias))


def _number(value: Value) -> float | None:
    """The value of a constant that is the same everywhere."""
    return float(np.reshape(value.value, ())) if isinstance(value, Constant) and np.size(value.value) == 1 else None
