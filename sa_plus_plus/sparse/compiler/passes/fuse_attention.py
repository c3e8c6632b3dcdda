"""Fusion of attention, which networks write as two products with a softmax between them, into one step."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.compiler.attention import ABSORBING, Attention, Bias, Heads, summed
from sa_plus_plus.sparse.compiler.ir import Call, Constant, Traced, Value, Variable, live, users_of

FEWEST = 8  # queries and keys: the compiled kernel computes several rows of scores at a time
DEEPEST = 512  # the largest depth: with more, a head does not fit the caches
MASKED = -1e9  # a score that is replaced by this or less is masked
_MOST_OPERATIONS = 64  # between two products
_SAME = ("convert_element_type", "copy", "copy_p", "stop_gradient")
_FLOATS = tuple(np.dtype(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float64))

Makers = Mapping[Variable, Call]  # by value: the operation that computes it
Axes = tuple[int | None, ...]  # for each axis, the axis of another value that it is; None for a new one of length 1


class _Scores(NamedTuple):
    """A product of two variables, scaled and with biases; its axis `i` is axis `order[i]` of the product."""

    product: Call
    order: Axes
    scale: float = 1.0
    biases: tuple[Bias, ...] = ()


def fuse_attention(traced: Traced) -> Traced:
    """The network with attention as one step where the compiled kernel can run it."""
    steps: list[Any] = list(traced.steps)
    search = _Search({v: call for call in steps if isinstance(call, Call) for v in call.outputs})
    users = users_of(steps, traced.outputs)
    for number, step in enumerate(traced.steps):
        if not isinstance(step, Call) or step.name != "dot_general":
            continue
        after = users.get(step.outputs[0], [])
        turned = traced.steps[after[0]] if len(after) == 1 and after[0] < len(steps) else None
        if not isinstance(turned, Call) or turned.name != "transpose":
            turned = None
        for side in (0, 1):
            shares = step.inputs[side]
            if not isinstance(shares, Variable) or len(users[shares]) > 1:
                continue
            if found := search.attention(step, side, turned):
                steps[number], steps[number if turned is None else after[0]] = None, found
                break
    if not any(isinstance(step, Attention) for step in steps):
        return traced
    return traced._replace(steps=live([step for step in steps if step is not None], traced.outputs))


class _Search:
    """Looks for attention backwards from its last product."""

    def __init__(self, makers: Makers):
        self.makers = makers
        self.known: dict[Variable, _Scores | None] = {}

    def attention(self, last: Call, side: int, turned: Call | None) -> Attention | None:
        """Attention that ends in a product, whose operand `side` is the shares; then transposed if `turned`."""
        (over, over_v), (along, along_v) = (pair[:: 1 - 2 * side] for pair in last.params["dimension_numbers"])
        shares, v = last.inputs[:: 1 - 2 * side]
        scores = self.softmax(shares, over[0]) if len(over) == 1 and isinstance(v, Variable) else None
        if scores is None or not isinstance(v, Variable):
            return None
        first, (_, shape, _) = scores.product, scores.product.outputs[0]
        q, k = first.inputs
        numbers = first.params["dimension_numbers"]
        q_axes, k_axes = _axes_of(numbers, [len(x.shape) for x in (q, k)])
        keys, batches = scores.order[over[0]], len(numbers[1][0])
        if keys in q_axes:
            q, k, q_axes, k_axes = k, q, k_axes, q_axes
        v_axes: list[int | None] = [-1] * len(v.shape)
        for axis, other in zip((*over_v, *along_v), (*over, *along), strict=True):
            v_axes[axis] = scores.order[other]
        rest = [scores.order[i] for i in range(len(shares.shape)) if i not in (*over, *along)]
        of_queries = [i for i in rest if i is not None and i in q_axes and i not in k_axes]
        if keys is None or keys < batches or not of_queries:
            return None
        queries = max(of_queries, key=lambda i: shape[i])
        heads = tuple(i for i in range(len(shape)) if i not in (queries, keys) and shape[i] > 1)
        output = last.outputs[0] if turned is None else turned.outputs[0]
        y_axes = [*(scores.order[i] for i in along), *(rest if side == 0 else ()), -1, *(rest if side else ())]
        if turned is not None:
            y_axes = [y_axes[i] for i in turned.params["permutation"]]
        order = Heads(tuple(shape), heads, queries, keys, q_axes, k_axes, tuple(v_axes), tuple(y_axes))
        if not _fits(order, q, k, v, output):
            return None
        inputs = (q, k, v, *(bias.value for bias in scores.biases))
        calls = self.between(inputs, output)
        if calls is None or not _consistent(scores.biases):
            return None
        visible = _causal(scores.biases, order)
        if visible is not None:
            return Attention(inputs[:3], (output,), order, scores.scale, (), visible, calls)
        return Attention(inputs, (output,), order, scores.scale, scores.biases, shape[keys], calls)

    def maker(self, value: Value) -> Call | None:
        return self.makers.get(value) if isinstance(value, Variable) else None

    def between(self, inputs: Sequence[Value], output: Variable) -> tuple[Call, ...] | None:
        """The operations that compute a value from others, in order; None if it depends on anything else."""
        known = {v for v in inputs if isinstance(v, Variable)}
        order: dict[Variable, Call] = {}

        def visit(value: Value, depth: int) -> bool:
            if isinstance(value, Constant) or value in known or value in order:
                return True
            call = self.maker(value)
            if call is None or len(call.outputs) != 1 or depth > _MOST_OPERATIONS:
                return False
            if not all(visit(v, depth + 1) for v in call.inputs):
                return False
            order[value] = call
            return True

        return tuple(order.values()) if visit(output, 0) else None

    def softmax(self, value: Value, axis: int) -> _Scores | None:
        """The scores `x` whose softmax along an axis is a value, `exp(x - c) / sum(exp(x - c))` with any `c`.

        Its order is that of the value's axes.
        """
        value, order = self.before(value)
        shares, place = self.maker(value), order[axis]
        if shares is None or shares.name != "div" or place is None or not _variables(*shares.inputs):
            return None
        powers = self.maker(shares.inputs[0])
        if powers is None or powers.name != "exp" or powers.outputs[0].shape != value.shape:
            return None
        if not self.sums(shares.inputs[1], shares.inputs[0], place):
            return None
        scores = powers.inputs[0]
        below = self.maker(scores)
        if below is not None and below.name == "sub" and self.same_along(below.inputs[1], place):
            scores = below.inputs[0]
        found = self.scores(scores) if scores.shape == value.shape else None
        return found and found._replace(order=tuple(None if i is None else found.order[i] for i in order))

    def before(self, value: Value) -> tuple[Value, Axes]:
        """What a value was before changes of type and of axes of length 1; and its axes there."""
        order: Axes = tuple(range(len(value.shape)))
        while (call := self.maker(value)) is not None and (step := _renamed(call)) is not None:
            order = tuple(None if i is None else step[i] for i in order)
            (value,) = call.inputs
        return value, order

    def sums(self, value: Value, of: Value, axis: int) -> bool:
        """Whether a value is the sum of another along an axis, broadcast along it."""
        while (call := self.maker(value)) is not None and call.name != "reduce_sum":
            if (len(call.inputs), len(call.outputs)) != (1, 1):
                return False
            (before,), (after,) = call.inputs, call.outputs
            if len(after.shape) != len(of.shape):
                return False
            others = [i for i in range(len(after.shape)) if i != axis or len(before.shape) == len(after.shape)]
            if call.name == "broadcast_in_dim":
                fits = [*call.params["broadcast_dimensions"]] == others
            elif call.name == "reshape":
                fits = after.shape[axis] == 1 and [after.shape[i] for i in others] == [*before.shape]
            else:
                fits = _cast(call)
            if not fits:
                return False
            value = before
        return call is not None and tuple(call.params["axes"]) == (axis,) and call.inputs[0] == of

    def same_along(self, value: Value, axis: int) -> bool:
        """Whether all entries along an axis, if there is one, are known to be equal."""
        if not value.shape:
            return True
        if isinstance(value, Constant):
            return np.shape(value.value)[axis] == 1
        if value.shape[axis] == 1:
            return True
        call = self.maker(value)
        if call is None or call.name != "broadcast_in_dim":
            return False
        dims = [*call.params["broadcast_dimensions"]]
        return axis not in dims or call.inputs[0].shape[dims.index(axis)] == 1

    def scores(self, value: Value, depth: int = 0) -> _Scores | None:
        """The product from which a value comes by transposition, scaling, masks and the addition of biases."""
        if not isinstance(value, Variable) or depth > _MOST_OPERATIONS:
            return None
        if value not in self.known:
            call = self.maker(value)
            self.known[value] = None if call is None else self._scores(call, depth)
        return self.known[value]

    def _scores(self, call: Call, depth: int) -> _Scores | None:
        name, inputs, (output,) = call.name, call.inputs, call.outputs[:1]

        def of(at: int) -> _Scores | None:
            return self.scores(inputs[at], depth + 1) if inputs[at].shape == output.shape else None

        if name == "dot_general":
            return _Scores(call, tuple(range(len(output.shape)))) if _variables(*inputs) else None
        if (step := _renamed(call)) is not None:
            found = self.scores(inputs[0], depth + 1)
            return found and found._replace(order=tuple(None if i is None else found.order[i] for i in step))
        if name in ("mul", "div"):
            at = 1 if name == "mul" and isinstance(inputs[0], Constant) else 0
            factor = _number(inputs[1 - at])
            if factor is None or not factor or (found := of(at)) is None:
                return None
            return _scaled(found, factor if name == "mul" else 1 / factor)
        if name in ("add", "add_any", "sub"):
            for at in (0, 1) if name != "sub" else (0,):
                if found := of(at):
                    return self.biased(found, inputs[1 - at], -1.0 if name == "sub" else 1.0)
        if name == "select_n" and len(inputs) == 3:
            for at in (1, 2):
                instead = _number(inputs[3 - at])
                if instead is not None and (found := of(at)):
                    return self.biased(found, inputs[0], instead, masked=at == 1)
        return None

    def biased(self, scores: _Scores, value: Value, factor: float, masked: bool | None = None) -> _Scores:
        """Scores with a bias or a mask, before it was broadcast."""
        axes: Axes = scores.order if value.shape else ()
        if isinstance(value, Constant):
            array = np.asarray(value.value)
            for axis in range(array.ndim):  # as small as it can be: masks are often repeated for each head
                first = array.take([0], axis)
                array = first if np.array_equal(np.broadcast_to(first, array.shape), array, equal_nan=False) else array
            value = Constant(array, array.shape)
        elif (call := self.maker(value)) is not None and call.name == "broadcast_in_dim":
            value, axes = call.inputs[0], tuple(axes[i] for i in call.params["broadcast_dimensions"])
        return scores._replace(biases=(*scores.biases, Bias(value, axes, factor, masked)))


def _fits(order: Heads, q: Value, k: Value, v: Variable, output: Variable) -> bool:
    """Whether the compiled kernel can run it and is not slow."""
    if any(list(axes).count(-1) != 1 for axes in (order.q, order.k, order.v)) or len(order.heads) > 3:
        return False
    few = min(order.scores[order.queries], order.scores[order.keys]) < FEWEST
    if few or 0 in (*order.scores, *q.shape, *v.shape) or q.shape[order.q.index(-1)] > DEEPEST:
        return False
    types = {np.dtype(x.dtype) for x in (q, k, v, output) if isinstance(x, Variable)}
    return types in ({_FLOATS[0]}, {_FLOATS[1]})


def _consistent(biases: Sequence[Bias]) -> bool:
    """Whether masks can be added: the scores that they replace are masked, become the same, and stay the same."""
    masks = [i for i, bias in enumerate(biases) if bias.masked is not None]
    factors = {biases[i].factor for i in masks}
    if not masks:
        return True
    last = masks[0] == len(biases) - len(masks)  # nothing is added after a mask
    return len(factors) == 1 and max(factors) <= (MASKED if last else ABSORBING)


def _causal(biases: Sequence[Bias], order: Heads) -> int | None:
    """The number of keys that the first query sees, if each query sees one more than the one before; otherwise None."""
    if not biases or any(isinstance(bias.value, Variable) or bias.masked is None for bias in biases):
        return None
    total = np.asarray(summed([bias.value.value for bias in biases], biases, order))  # type: ignore[union-attr]
    queries, keys = order.scores[order.queries], order.scores[order.keys]
    if total.shape[-2:] != (queries, keys) or total.size != queries * keys:
        return None
    visible = total.reshape(queries, keys) == 0
    first = int(visible[0].sum())
    return first if first and np.array_equal(visible, np.tri(queries, keys, first - 1, dtype=bool)) else None


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


def _renamed(call: Call) -> Axes | None:
    """For each axis of the result, the operand's axis that it is; None for an operation that changes the values.

    Operations on one value that permute axes, add or drop axes of length 1, or change the floating type do not.
    """
    name, inputs = call.name, call.inputs
    if (len(inputs), len(call.outputs)) != (1, 1) or not isinstance(inputs[0], Variable):
        return None
    (before,), (after,) = inputs, call.outputs
    if name == "transpose":
        return tuple(call.params["permutation"])
    if _cast(call):
        return tuple(range(len(after.shape)))
    if name == "broadcast_in_dim" and np.prod(before.shape) == np.prod(after.shape):
        places = {axis: i for i, axis in enumerate(call.params["broadcast_dimensions"])}
        return tuple(places.get(i) for i in range(len(after.shape)))
    long = [i for i, n in enumerate(before.shape) if n != 1]
    if name in ("reshape", "squeeze") and [before.shape[i] for i in long] == [n for n in after.shape if n != 1]:
        left = iter(long)
        return tuple(None if n == 1 else next(left) for n in after.shape)
    return None


def _cast(call: Call) -> bool:
    """Whether an operation only changes one floating type into another."""
    types = {np.dtype(v.dtype) for v in (*call.inputs, *call.outputs) if isinstance(v, Variable)}
    return call.name in _SAME and types <= {*_FLOATS}


def _scaled(scores: _Scores, factor: float) -> _Scores:
    biases = tuple(bias._replace(factor=bias.factor * factor) for bias in scores.biases)
    return scores._replace(scale=scores.scale * factor, biases=biases)


def _variables(*values: Value) -> bool:
    return all(isinstance(v, Variable) for v in values)


def _number(value: Value) -> float | None:
    """The value of a constant that is the same everywhere."""
    return float(np.reshape(value.value, ())) if isinstance(value, Constant) and np.size(value.value) == 1 else None
