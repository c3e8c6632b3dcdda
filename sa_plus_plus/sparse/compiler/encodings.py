"""Which encoding each value of a network gets: that in which the steps that use it take it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sa_plus_plus.sparse.compiler.conv_geometry import NO_BORDER, Border, window_of
from sa_plus_plus.sparse.compiler.ir import Layer, Step, Value, Variable, users_of, variables
from sa_plus_plus.sparse.compiler.planned import PackedKernel, PlannedStep
from sa_plus_plus.sparse.compiler.quantization import BFLOAT16, UINT8, Encoding, quantized

_ANY_TYPE = ("reshape", "squeeze", "transpose", "slice", "reduce_window_max", "max_pool", "look_up")


def keeps_type(step: Step) -> bool:
    """Whether a step only moves or compares numbers, so that it can take them as they are encoded."""
    return not isinstance(step, Layer) and getattr(step, "name", None) in _ANY_TYPE


def assign_encodings(
    planned: Sequence[PlannedStep], outputs: Sequence[Value], ranges: Mapping[Variable, tuple[float, float]]
) -> dict[Variable, Encoding]:
    """How each value is encoded that is not as it was traced.

    Args:
      planned: the steps.
      outputs: the network's results.
      ranges: smallest and largest of each value that a step takes in uint8.
    """
    users = users_of([p.step for p in planned], outputs)
    narrow: dict[Variable, np.dtype | None] = {}
    for p in reversed(planned):
        for value in p.step.outputs:
            narrow[value] = _narrow_type(value, planned, users.get(value, []), narrow)
    found: dict[Variable, Encoding] = {}
    for p in planned:
        if keeps_type(p.step):
            (value,), (output,) = variables(p.step), p.step.outputs
            if narrow[output] is not None and value in found and found[value].dtype == narrow[output]:
                found[output] = found[value]
        if not isinstance(p.kernel, PackedKernel):
            continue
        (output,) = p.step.outputs
        dtype = narrow[output]
        if dtype == UINT8:
            found[output] = quantized(*ranges[output])
        elif dtype is not None:
            found[output] = Encoding(dtype)
        border = _border(output, planned, users.get(output, []))
        if border != NO_BORDER:
            found[output] = found.get(output, Encoding(np.dtype(output.dtype)))._replace(border=border)
    return found


def _narrow_type(
    value: Variable,
    planned: Sequence[PlannedStep],
    users: Sequence[int],
    narrow: Mapping[Variable, np.dtype | None],
) -> np.dtype | None:
    """The one narrow type in which all users take a value, or None."""
    kinds: set[Any] = set()
    preferred: np.dtype | None = None
    for number in users:
        user = planned[number] if number < len(planned) else PlannedStep(None)
        if isinstance(user.step, Layer) and user.x_type is not None:
            if user.step.spec.x == value:
                kinds.add(user.x_type)
            elif user.step.spec.residual == value:  # residuals are taken in any type
                preferred = narrow[user.step.spec.output] or user.x_type
        elif keeps_type(user.step):
            kinds.add(narrow[user.step.outputs[0]])
        else:
            return None
    dtype = kinds.pop() if len(kinds) == 1 else preferred if not kinds else None
    return dtype if dtype in (BFLOAT16, UINT8) else None


def _border(value: Variable, planned: Sequence[PlannedStep], users: Sequence[int]) -> Border:
    """The padding of the only convolution that takes a value."""
    if len(users) != 1 or users[0] == len(planned) or planned[users[0]].x_type is None or len(value.shape) != 4:
        return NO_BORDER
    spec = planned[users[0]].step.spec
    window = window_of(spec)
    if spec.x != value or spec.residual == value or isinstance(window, str) or spec.conv is None:
        return NO_BORDER
    return window.padding
