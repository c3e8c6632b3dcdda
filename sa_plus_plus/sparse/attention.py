"""Attention as one step: scores, softmax and the sum of values, however a network's axes are ordered."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import sa_plus_plus.sparse.native as native
from sa_plus_plus.sparse.steps import Call, Value, Variable


class Bias(NamedTuple):
    """What is added to the scores: `factor * value`, or `factor` where a mask equals `masked`.

    Attributes:
      value: of any type; of a mask bool.
      axes: by axis of `value`, which axis of the scores it is. It is broadcast along the others.
      factor: as above.
      masked: as above; None if it is not a mask.
    """

    value: Value
    axes: tuple[int, ...]
    factor: float
    masked: bool | None = None


class Heads(NamedTuple):
    """How the axes of attention are ordered.

    Attributes:
      scores: shape of the scores: the axes of all heads, queries and keys, in any order.
      heads: which axes of the scores are heads.
      queries: which one is the queries.
      keys: which one is the keys.
      q, k, v, y: by axis, which axis of the scores it is; -1 for the last, which is not one of them.
    """

    scores: tuple[int, ...]
    heads: tuple[int, ...]
    queries: int
    keys: int
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    y: tuple[int, ...]


class Attention(NamedTuple):
    """`softmax(scale * q kᵀ + biases) v` in each head.

    Attributes:
      inputs: q, k, v and the values of the biases.
      outputs: the result.
      axes: how they are ordered.
      scale: of the scores.
      biases: what is added to them.
      calls: the operations that it stands for, from `inputs` to `outputs`.
      compiled: whether it runs in the compiled kernel; otherwise as traced.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Variable]
    axes: Heads
    scale: float
    biases: tuple[Bias, ...]
    calls: tuple[Call, ...]
    compiled: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of heads, queries and keys, and the depth."""
        a = self.axes
        heads = math.prod(a.scores[i] for i in a.heads)
        return heads, a.scores[a.queries], a.scores[a.keys], self.inputs[0].shape[a.q.index(-1)]

    def run(self, *inputs: Any) -> list[Any]:
        return self.run_compiled(*inputs) if self.compiled else self.run_traced(*inputs)

    def run_traced(self, *inputs: Any) -> list[Any]:
        """The result by the operations that it stands for."""
        known = {v: x for v, x in zip(self.inputs, inputs, strict=True) if isinstance(v, Variable)}
        for call in self.calls:
            arguments = [known[v] if isinstance(v, Variable) else v.full for v in call.inputs]
            known |= dict(zip(call.outputs, call.run(*arguments), strict=True))
        return [known[self.outputs[0]]]

    def run_compiled(self, *inputs: Any) -> list[Any]:
        """The result by the compiled kernel."""
        (q, k, v, *added), a = inputs, self.axes
        (q, q_axes), (k, k_axes), (v, v_axes) = (
            _with_last(x, axes) for x, axes in zip((q, k, v), (a.q, a.k, a.v), strict=True)
        )
        y_axes = (*(i for i in a.y if i >= 0), -1)
        (output,) = self.outputs
        width = v.shape[-1]
        out = jax.ShapeDtypeStruct([a.scores[i] if i >= 0 else width for i in y_axes], output.dtype)
        heads, bias = (*(-2,) * (3 - len(a.heads)), *a.heads), self._bias(added)
        rows = ((q, q_axes, a.queries), (k, k_axes, a.keys), (v, v_axes, a.keys), (out, y_axes, a.queries))
        strides = [_strides(x.shape, axes, (*heads, row)) for x, axes, row in rows]
        if bias is None:
            strides.append((0, 0, 0, 0))
        else:
            strides.append(_strides(bias.shape, (*a.heads, a.queries, a.keys), (*heads, a.queries)))
        lengths = [a.scores[i] if i >= 0 else 1 for i in (*heads, a.queries, a.keys)]
        y = native.attention(q, k, v, bias, self.scale, out, [*lengths, q.shape[-1], width], strides)
        return [jnp.transpose(y, [y_axes.index(i) for i in a.y])]

    def _bias(self, values: Sequence[Any]) -> Any:
        """The sum of all biases, as large as it must be: `(*heads, queries, keys)`; None if there are none."""
        total, a = None, self.axes
        for bias, value in zip(self.biases, values, strict=True):
            if bias.masked is None:
                added = value.astype(jnp.float32) * bias.factor
            else:
                added = jnp.where(value == bias.masked, jnp.float32(bias.factor), 0)
            wanted = (*a.heads, a.queries, a.keys)
            added = jnp.transpose(added, [bias.axes.index(i) for i in wanted if i in bias.axes])
            lengths = iter(added.shape)
            added = added.reshape([next(lengths) if i in bias.axes else 1 for i in wanted])
            total = added if total is None else total + added
        if total is None:
            return None
        return jnp.broadcast_to(total, (*total.shape[:-1], a.scores[a.keys]))


def _with_last(x: Any, axes: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """An array with the axis -1 moved to the end, and its axes."""
    at = axes.index(-1)
    return jnp.moveaxis(x, at, -1), (*axes[:at], *axes[at + 1 :], -1)


def _strides(shape: Sequence[int], axes: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Along each wanted axis, in entries of a contiguous array; 0 for an axis that it does not have."""
    steps = [math.prod(shape[i + 1 :]) if n > 1 else 0 for i, n in enumerate(shape)]
    return tuple(steps[axes.index(i)] if i in axes else 0 for i in wanted)
