"""Attention as one step: scores, softmax and the sum of values, however a network's axes are ordered."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sa_plus_plus.sparse.compiler.ir import Call, Value, Variable
from sa_plus_plus.sparse.ops import native

ABSORBING = -1e30  # float32 rounds its sum with any usual score to itself


class Bias(NamedTuple):
    """A change of the scores: `factor * value` is added, or they become `factor` where a mask equals `masked`.

    Attributes:
      value: of any type; of a mask bool.
      axes: by axis of `value`, which axis of the scores it is; it is broadcast along the others. None for an axis of
        length 1 that the scores do not have.
      factor: as above.
      masked: as above; None if it is not a mask.
    """

    value: Value
    axes: tuple[int | None, ...]
    factor: float
    masked: bool | None = None


class Heads(NamedTuple):
    """How the axes of attention are ordered.

    Attributes:
      scores: shape of the scores: the axes of all heads, queries and keys, in any order.
      heads: which axes of the scores are heads, without those of length 1.
      queries: which one is the queries.
      keys: which one is the keys.
      q, k, v, y: by axis, which axis of the scores it is; None for one of length 1 that the scores do not have, -1 for
        the depth of q and k, and the width of v and y.
    """

    scores: tuple[int, ...]
    heads: tuple[int, ...]
    queries: int
    keys: int
    q: tuple[int | None, ...]
    k: tuple[int | None, ...]
    v: tuple[int | None, ...]
    y: tuple[int | None, ...]


class Attention(NamedTuple):
    """`softmax(scale * q kᵀ + biases) v` in each head.

    Attributes:
      inputs: q, k, v and the values of the biases.
      outputs: the result.
      axes: how they are ordered.
      scale: of the scores.
      biases: applied to the scaled scores, in order.
      visible: how many keys the first query sees; each of the others sees one more than the one before it.
      calls: the operations that it stands for, from `inputs` to `outputs`.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Variable]
    axes: Heads
    scale: float
    biases: tuple[Bias, ...]
    visible: int
    calls: tuple[Call, ...] = ()

    @property
    def name(self) -> str:
        """`attention` and the fused operations."""
        causal = self.visible < self.axes.scores[self.axes.keys]
        return ", ".join(["attention", *["causal"] * causal, *["bias"] * bool(self.biases)])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of heads, queries and keys, and the depth."""
        a = self.axes
        heads = math.prod(a.scores[i] for i in a.heads)
        return heads, a.scores[a.queries], a.scores[a.keys], self.inputs[0].shape[a.q.index(-1)]

    def traced(self, *inputs: Any) -> Any:
        """The result by the operations that it stands for."""
        known = {v: x for v, x in zip(self.inputs, inputs, strict=True) if isinstance(v, Variable)}
        for call in self.calls:
            arguments = [known[v] if isinstance(v, Variable) else v.full for v in call.inputs]
            known |= dict(zip(call.outputs, call.run(*arguments), strict=True))
        return known[self.outputs[0]]

    def run(self, *inputs: Any) -> list[Any]:
        """The result by the compiled kernel."""
        (q, k, v, *values), a = inputs, self.axes
        (q, q_axes), (k, k_axes), (v, v_axes) = (
            _with_last(x, axes) for x, axes in zip((q, k, v), (a.q, a.k, a.v), strict=True)
        )
        (output,), width = self.outputs, v.shape[-1]
        y_axes = (*(i for i in a.y if i not in (None, -1)), -1)
        out = jax.ShapeDtypeStruct([width if i == -1 else a.scores[i] for i in y_axes], output.dtype)
        heads = (*(None,) * (3 - len(a.heads)), *a.heads)
        rows = ((q, q_axes, a.queries), (k, k_axes, a.keys), (v, v_axes, a.keys), (out, y_axes, a.queries))
        strides = [_strides(x.shape, axes, (*heads, row)) for x, axes, row in rows]
        bias: jax.Array | None = None
        bias_strides: tuple[int, ...] = (0, 0, 0, 0)
        if self.biases:
            bias = summed(values, self.biases, a)
            bias = jnp.broadcast_to(bias, (*bias.shape[:-1], a.scores[a.keys]))
            bias_strides = _strides(bias.shape, (*a.heads, a.queries, a.keys), (*heads, a.queries))
        strides.insert(3, bias_strides)
        lengths = [1 if i is None else a.scores[i] for i in (*heads, a.queries, a.keys)]
        sizes = [*lengths, q.shape[-1], width, self.visible]
        y = native.attention(q, k, v, bias, self.scale, out, sizes, strides)
        return [jnp.transpose(y, [y_axes.index(i) for i in a.y if i is not None]).reshape(output.shape)]


def summed(values: Sequence[Any], biases: Sequence[Bias], axes: Heads) -> jax.Array:
    """The sum of all biases, float32 `(*heads, queries, keys)`, with length 1 along axes where it is the same.

    Masked scores get a bias so low that float32 rounds the score away.
    """
    total = jnp.zeros((), jnp.float32)
    wanted = (*axes.heads, axes.queries, axes.keys)
    for bias, value in zip(biases, values, strict=True):
        kept = [i for i, axis in enumerate(bias.axes) if axis in wanted]  # the others are of length 1
        places = [bias.axes[i] for i in kept]
        value = jnp.transpose(
            value.reshape([value.shape[i] for i in kept]), [places.index(i) for i in wanted if i in places]
        )
        lengths = iter(value.shape)
        value = value.reshape([next(lengths) if i in places else 1 for i in wanted])
        if bias.masked is None:
            total = total + value.astype(jnp.float32) * bias.factor
        else:
            total = jnp.where(value == bias.masked, jnp.float32(min(bias.factor, ABSORBING)), total)
    return total


def _with_last(x: Any, axes: tuple[int | None, ...]) -> tuple[Any, tuple[int | None, ...]]:
    """An array with the axis -1 moved to the end, and its axes."""
    at = axes.index(-1)
    return jnp.moveaxis(x, at, -1), (*axes[:at], *axes[at + 1 :], -1)


def _strides(shape: Sequence[int], axes: Sequence[int | None], wanted: Sequence[int | None]) -> tuple[int, ...]:
    """Along each wanted axis, in entries of a contiguous array; 0 for an axis that it does not have."""
    steps = [math.prod(shape[i + 1 :]) if n > 1 else 0 for i, n in enumerate(shape)]
    return tuple(steps[axes.index(i)] if i is not None and i in axes else 0 for i in wanted)
