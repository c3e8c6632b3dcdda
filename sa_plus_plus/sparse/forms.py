"""How values are held between the layers of a network.

A value is held in the type in which all its users take it: a layer that feeds int8 layers rounds to uint8 when it
stores its result, and leaves a border of zeros for the padding of the next convolution.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

import sa_plus_plus.sparse.native as native
from sa_plus_plus.sparse.steps import Call, Linear, Traced, Variable, inputs_of, users_of
from sa_plus_plus.sparse.windows import NO_BORDER, Border, window_of

FLOAT32, BFLOAT16, UINT8 = np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.uint8)
_SHAPES_ONLY = ("reshape", "squeeze", "transpose", "slice", "reduce_window_max")  # whatever type they are given


class Form(NamedTuple):
    """How a value is held.

    Attributes:
      dtype: uint8 stands for `(held - zero) * factor`.
      border: zeros around each image.
      channels: of an image, if padded with channels of zeros.
    """

    dtype: np.dtype
    factor: float = 1.0
    zero: int = 0
    border: Border = NO_BORDER
    channels: int | None = None


def quantised(low: float, high: float) -> Form:
    """uint8 for values from `low` to `high`: one scale per tensor, zero exact."""
    low, high = min(low, 0.0), max(high, 0.0, 1e-30)
    zero = round(255 * -low / (high - low))
    if low < 0:
        zero = min(max(zero, 1), 254)
    return Form(UINT8, max(high / (255 - zero), -low / zero if zero else 0.0), zero)


def converted(held: Any, have: Form, want: Form) -> Any:
    """A value in another form.

    Args:
      held: the array.
      have: its form.
      want: the requested form.
    """
    if have == want:
        return held
    if have == Form(FLOAT32) and want.dtype in (FLOAT32, BFLOAT16, UINT8) and native.missing() is None:
        image = held if held.ndim == 4 else held.reshape(1, 1, -1, held.shape[-1] if held.ndim else 1)
        rounded = native.round_images(image, want.dtype, want.factor, want.zero, want.border, want.channels)
        return rounded if held.ndim == 4 else rounded.reshape(held.shape)
    if have.border != NO_BORDER and have.border != want.border:
        (top, _), (left, _) = have.border
        rows, columns = (n - sum(pair) for n, pair in zip(held.shape[1:3], have.border, strict=True))
        held = held[:, top : top + rows, left : left + columns]
        have = have._replace(border=NO_BORDER)
    if have[:3] != want[:3]:
        if have.dtype == UINT8:
            held = (held.astype(np.float32) - have.zero) * np.float32(have.factor)
        if want.dtype == UINT8:
            held = jnp.clip(jnp.round(held.astype(np.float32) * np.float32(1 / want.factor)) + want.zero, 0, 255)
        held = held.astype(want.dtype)
    if have.border != want.border or have.channels != want.channels:
        around = want.border if have.border != want.border else NO_BORDER
        more = 0 if want.channels is None or have.channels == want.channels else want.channels - held.shape[3]
        pads = ((0, 0, 0), *((low, high, 0) for low, high in around), (0, more, 0))
        held = lax.pad(held, jnp.asarray(want.zero, held.dtype), pads)
    return held


def keeps_type(step: Any) -> bool:
    """Whether a step only moves or compares numbers, so that it can take them in the form in which they are held."""
    return isinstance(step, Call) and step.primitive.name in _SHAPES_ONLY


def forms_of(
    program: Traced[Call | Linear], types: Mapping[int, np.dtype], ranges: Mapping[Variable, tuple[float, float]]
) -> dict[Variable, Form]:
    """How each value is held that is not held as it was traced.

    Args:
      program: its steps.
      types: by the number of a step that runs in the compiled kernel: in which type it takes `x`.
      ranges: smallest and largest of each value that a step takes in uint8.
    """
    steps, users = program.steps, users_of(program.steps, program.outputs)
    wanted: dict[Variable, np.dtype | None] = {}
    for step in reversed(steps):
        for value in [step.layer.output] if isinstance(step, Linear) else list(step.outputs):
            wanted[value] = _wanted(value, steps, users.get(value, []), types, wanted)
    forms: dict[Variable, Form] = {}
    for number, step in enumerate(steps):
        if not isinstance(step, Linear):
            if keeps_type(step):
                (value,), (output,) = inputs_of(step), step.outputs
                if wanted[output] is not None and value in forms and forms[value].dtype == wanted[output]:
                    forms[output] = forms[value]
            continue
        output = step.layer.output
        if number not in types:
            continue
        dtype = wanted[output]
        if dtype == UINT8:
            forms[output] = quantised(*ranges[output])
        elif dtype is not None:
            forms[output] = Form(dtype)
        border = _border(output, steps, users.get(output, []), types)
        if border != NO_BORDER:
            forms[output] = forms.get(output, Form(np.dtype(output.dtype)))._replace(border=border)
    return forms


def _wanted(
    value: Variable,
    steps: Sequence[Call | Linear],
    users: Sequence[int],
    types: Mapping[int, np.dtype],
    wanted: Mapping[Variable, np.dtype | None],
) -> np.dtype | None:
    """The one narrow type in which all users take a value, or None."""
    kinds: set[Any] = set()
    preferred: np.dtype | None = None
    for number in users:
        step = steps[number] if number < len(steps) else None
        if isinstance(step, Linear) and number in types:
            if step.layer.x == value:
                kinds.add(types[number])
            elif step.layer.residual == value:  # residuals are taken in any type
                preferred = wanted[step.layer.output] or types[number]
        elif isinstance(step, Call) and keeps_type(step):
            kinds.add(wanted[step.outputs[0]])
        else:
            return None
    narrow = kinds.pop() if len(kinds) == 1 else preferred if not kinds else None
    return narrow if narrow in (BFLOAT16, UINT8) else None


def _border(
    value: Variable, steps: Sequence[Call | Linear], users: Sequence[int], types: Mapping[int, np.dtype]
) -> Border:
    """The padding of the only convolution that takes a value."""
    if len(users) != 1 or users[0] not in types or len(value.shape) != 4:
        return NO_BORDER
    user = steps[users[0]]
    assert isinstance(user, Linear)  # like all steps that have a type
    layer, window = user.layer, window_of(user.layer)
    if layer.x != value or layer.residual == value or isinstance(window, str) or layer.call is None:
        return NO_BORDER
    return window.padding
