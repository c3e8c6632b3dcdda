"""Fusion of layer normalisation and RMS normalisation, however a network writes them, into one step.

The operations from a value to its normalisation depend on nothing else but constants. What they compute is recognised
by numbers: scale and shift are read off their results, then results for other inputs are compared with the formula.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.compiler.ir import Call, Constant, Traced, Value, Variable, users_of
from sa_plus_plus.sparse.compiler.normalization import Normalization

MOST_NUMBERS = 2**26  # in a value whose normalisation is looked for, since it is computed
_MOST_CALLS = 32  # of a normalisation
_TYPES = (np.dtype(np.float32), np.dtype(jnp.bfloat16))
_CASTS = ("convert_element_type", "copy", "copy_p")
_POWERS = (*_CASTS, "square", "mul", "integer_pow", "sub", "broadcast_in_dim", "reshape")
_ALLOWED = (
    *(*_POWERS, "add", "div", "max", "neg", "sqrt", "rsqrt", "pow", "reduce_sum", "select_n", "squeeze", "gt"),
    "stop_gradient",
)
_PROBES = 61  # different rows of random numbers
_TOLERANCE = 5e-5  # of the formula's terms; more than rounding to float32, less than another divisor of the variance

Makers = Mapping[Variable, Call]


def fuse_normalizations(traced: Traced) -> Traced:
    """The network with normalisations as single steps."""
    steps: list[Any] = list(traced.steps)
    users = users_of(steps, traced.outputs)
    makers = {v: step for step in steps if isinstance(step, Call) for v in step.outputs}
    for call in traced.steps:
        if not isinstance(call, Call) or call.name != "reduce_sum" or not any(step is call for step in steps):
            continue
        for x in _sources(call, makers):
            if found := _normalization(x, traced.steps, users):
                inside, step = found
                for i in inside:
                    steps[i] = None
                steps[inside[-1]] = step
                break
    return traced._replace(steps=[step for step in steps if step is not None])


def expanded(step: Any) -> Sequence[Any]:
    """The operations that a normalisation stands for; any other step as it is."""
    return step.calls if isinstance(step, Normalization) else [step]


def without_calls(step: Any) -> Any:
    """The step, for good as one if it is a normalisation."""
    return step._replace(calls=()) if isinstance(step, Normalization) else step


def _sources(call: Call, makers: Makers) -> list[Variable]:
    """The values whose normalisation a sum over the last axis may belong to, the one furthest back first."""
    found: list[Variable] = []
    front: list[Value] = list(call.inputs)
    while front and len(found) < _MOST_CALLS:
        value = front.pop(0)
        if not isinstance(value, Variable) or value in found:
            continue
        if value.shape == call.inputs[0].shape:
            found.append(value)
        if (before := makers.get(value)) is not None and before.name in _POWERS:
            front.extend(before.inputs)
    return [v for v in reversed(found) if v.dtype in _TYPES and v.shape and 0 < np.prod(v.shape) <= MOST_NUMBERS]


def _normalization(
    x: Variable, steps: Sequence[Any], users: Mapping[Variable, Sequence[int]]
) -> tuple[list[int], Normalization] | None:
    """The normalisation of a value, and the numbers of the steps that it stands for."""
    for inside in _regions(x, steps, users):
        calls = tuple(steps[i] for i in inside)
        if step := _recognised(x, calls):
            return inside, step
    return None


def _regions(x: Variable, steps: Sequence[Any], users: Mapping[Variable, Sequence[int]]) -> Iterator[list[int]]:
    """Operations that depend on `x` alone; others use only their last result, which has its shape; longest first."""
    inside: list[int] = []
    values, found = {x}, []
    reached = sorted(i for i in users.get(x, ()) if i < len(steps))
    while reached and len(inside) < _MOST_CALLS:
        i = reached.pop(0)
        call = steps[i]
        known = isinstance(call, Call) and call.name in _ALLOWED and len(call.outputs) == 1
        if i in inside or not known or not all(isinstance(v, Constant) or v in values for v in call.inputs):
            continue
        inside.append(i)
        values.update(call.outputs)
        (output,) = call.outputs
        reached = sorted({*reached, *(j for j in users.get(output, ()) if j < len(steps))})
        within = values - {x, output}
        if (output.shape, output.dtype) == (x.shape, x.dtype) and all({*users.get(v, ())} <= {*inside} for v in within):
            found.append(sorted(inside))
    yield from reversed(found)


def _recognised(x: Variable, calls: Sequence[Call]) -> Normalization | None:
    """These operations as a normalisation of `x`, if they are one."""
    epsilon = _epsilon(calls)
    if not epsilon:  # without one a row of zeros is 0 / 0, which the operations may avoid in a way of their own
        return None
    *before, last = calls
    rounds = last.name in _CASTS and last.inputs[0].dtype == np.float32  # scale and shift are read before it
    exact, columns = (before if rounds else calls), x.shape[-1]

    def results(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of numbers, repeated until `x` is full: as `x` has them, and the result of every row."""
        with jax.ensure_compile_time_eval():
            given = jnp.asarray(rows[: math.prod(x.shape[:-1])], x.dtype)
            y = _computed(exact, {x: jnp.resize(given, x.shape)})
            return np.asarray(given, np.float64), np.asarray(y, np.float32).reshape(-1, columns)

    def formula(numbers: np.ndarray, centred: bool) -> np.ndarray:
        numbers = numbers - numbers.mean(-1, keepdims=True) * centred
        return numbers / np.sqrt((numbers**2).mean(-1, keepdims=True) + epsilon)

    with np.errstate(all="ignore"):
        shift = results(np.zeros((1, columns)))[1][0].astype(np.float64)
        numbers, got = results(_balanced(columns)[None])
        scale = (got[0] - shift) / formula(numbers[0], True)
        probes = [_probes(columns, epsilon), *_extremes(columns)]
        computed = [results(rows) for rows in probes]  # each alone, since `x` may have a single row

        def fits(numbers: np.ndarray, got: np.ndarray, centred: bool) -> bool:
            terms = scale * formula(numbers, centred)
            most = _TOLERANCE * (np.abs(terms) + np.abs(scale) + np.abs(shift))
            want, most = (np.resize(a.astype(np.float32), got.shape) for a in (terms + shift, most))
            return bool(np.all(np.abs(got - want) <= most))

        for centred in (True, False):
            if all(fits(*pair, centred) for pair in computed):
                constants = [Constant(a.astype(np.float32), a.shape) for a in (scale, shift)]
                return Normalization((x, *constants), calls[-1].outputs, epsilon, centred, tuple(calls))  # type: ignore[arg-type]
    return None


def _epsilon(calls: Sequence[Call]) -> float | None:
    """What is added below the only root; None if there is no root, or more than one."""
    roots = [call for call in calls if call.name in ("sqrt", "rsqrt")]
    if len(roots) != 1:
        return None
    makers = {call.outputs[0]: call for call in calls}
    below = makers.get(roots[0].inputs[0])  # type: ignore[arg-type]
    if below is None or below.name != "add":
        return 0.0
    added = [v.value for v in below.inputs if isinstance(v, Constant) and np.size(v.value) == 1]
    return float(np.reshape(added[0], ())) if added else 0.0


def _computed(calls: Sequence[Call], known: dict[Variable, Any]) -> Any:
    for call in calls:
        inputs = [known[v] if isinstance(v, Variable) else v.full for v in call.inputs]
        known |= zip(call.outputs, call.run(*inputs), strict=True)
    return known[calls[-1].outputs[0]]


def _balanced(columns: int) -> np.ndarray:
    """Large numbers whose mean is zero, none of them near it."""
    signs = np.where(np.arange(columns) % 2, -1.0, 1.0)
    if columns % 2 and columns > 1:
        signs[-3:] = 2.0, -1.0, -1.0
    return 1024 * signs


def _probes(columns: int, epsilon: float) -> np.ndarray:
    """Rows of random numbers, in some of which the variance is about as small as `epsilon`."""
    rng, each = np.random.default_rng(0), (_PROBES, 1)
    scale = np.sqrt(max(epsilon, 1e-12)) ** rng.choice([0.0, 0.5, 1.0], each) * rng.uniform(0.5, 2, each)
    return scale * (rng.standard_normal((_PROBES, columns)) + 0.3)


def _extremes(columns: int) -> list[np.ndarray]:
    """A row with the largest result that there is, one with the smallest, and one of large numbers: for limits."""
    single = np.zeros((1, columns))
    single[0, columns // 2] = 100
    return [single, -single, 1e6 * np.random.default_rng(1).standard_normal((1, columns))]
