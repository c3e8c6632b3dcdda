"""Pooling, and small sums over adjacent axes, become steps of the compiled kernel."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sa_plus_plus.sparse.compiler.ir import Call, Step, Value, Variable
from sa_plus_plus.sparse.compiler.quantization import BFLOAT16, FLOAT32
from sa_plus_plus.sparse.ops import native

MOST_SUMMED = 2**18  # limit on the numbers that one thread sums


class Pooling(NamedTuple):
    """Max or sum pooling of images.

    Attributes:
      inputs: the images.
      outputs: the result.
      largest: whether it is the maximum; otherwise the sum.
      image: `(batch, height, width, channels)`, as which the input is read.
      window: its height and width.
      strides: down and across.
      padding: `((top, bottom), (left, right))`.
    """

    inputs: tuple[Value]
    outputs: tuple[Variable]
    largest: bool
    image: tuple[int, ...]
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]

    @property
    def name(self) -> str:
        return "max_pool" if self.largest else "sum_pool"

    def run(self, x: Any) -> list[Any]:
        pool = native.max_pool if self.largest else native.sum_pool
        y = pool(x.reshape(self.image), self.window, self.strides, self.padding)
        return [y.reshape(self.outputs[0].shape)]


def fuse_pooling(step: Step) -> Step:
    """The step in the compiled kernel if it is pooling, otherwise as it is."""
    if not isinstance(step, Call) or not isinstance(step.inputs[0] if step.inputs else None, Variable):
        return step
    (x, *_), name = step.inputs, step.name
    if name == "reduce_sum" and x.dtype == FLOAT32:
        return _sum(step, step.params["axes"]) or step
    types = {"reduce_window_max": (FLOAT32, BFLOAT16), "reduce_window_sum": (FLOAT32,)}.get(name, ())
    if len(x.shape) != 4 or x.dtype not in types:
        return step
    params = step.params
    plain = {*params["base_dilation"], *params["window_dilation"]} == {1}
    window, strides, padding = (tuple(params[key]) for key in ("window_dimensions", "window_strides", "padding"))
    others = [(window[i], strides[i], tuple(padding[i])) for i in (0, 3)]
    if not plain or others != [(1, 1, (0, 0))] * 2 or any(p < 0 for pair in padding for p in pair):
        return step
    geometry = x.shape, window[1:3], strides[1:3], padding[1:3]
    return Pooling((x,), step.outputs, name == "reduce_window_max", *geometry)  # type: ignore[arg-type]


def _sum(call: Call, axes: Sequence[int]) -> Pooling | None:
    """A small sum over adjacent axes, which takes longer to launch in XLA than to run."""
    (x,), first, last = call.inputs, min(axes, default=0), max(axes, default=0)
    before, over, after = (
        math.prod(part) for part in (x.shape[:first], x.shape[first : last + 1], x.shape[last + 1 :])
    )
    if last + 1 - first != len(axes) or over * after > MOST_SUMMED or after < native.WIDE or not before * over:
        return None
    image = (before, 1, over, after)
    return Pooling((x,), call.outputs, False, image, (1, over), (1, 1), ((0, 0), (0, 0)))  # type: ignore[arg-type]
