"""Calls of the compiled kernel joined to sequences: one call for all that follow one another.

A call costs XLA more than a microsecond, as long as a small layer takes. In a sequence only the first one does, and
the values between its steps share one piece of memory.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sa_plus_plus.sparse.compiler.ir import Call, Constant, Traced, Value, Variable, users_of, variables
from sa_plus_plus.sparse.compiler.trace import trace
from sa_plus_plus.sparse.ops import native

_LINE = 64  # bytes of a line of a cache, to which values in the common memory are aligned
_VIEWS = ("reshape", "squeeze", "expand_dims")


class Place(NamedTuple):
    """Where a value is: a buffer of the call, operands first, and the offset in bytes."""

    buffer: int
    offset: int


class Joined(NamedTuple):
    """Calls of the compiled kernel as one.

    Attributes:
      program: the steps, as `csrc/sequence.h` describes them.
      operands: of the call.
      results: of the call, each the value of a step.
      memory: bytes for the values that no other step takes.
    """

    program: np.ndarray
    operands: tuple[Value, ...]
    results: tuple[Variable, ...]
    memory: int


def run_joined(fn: Callable[..., Any], *arguments: Any) -> Any:
    """`fn(*arguments)`, the compiled kernel's calls joined.

    Args:
      fn: of arrays, without effects.
      *arguments: trees of arrays, to be traced or not.
    """
    leaves = jax.tree.leaves(arguments)
    if any(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves):  # which a trace of shapes forgets
        return fn(*arguments)
    with jax.ensure_compile_time_eval():  # constants get their values, in `jax.jit` too
        traced = trace(fn, *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments))
    if not any(map(_kind, traced.steps)) or any("callback" in step.name for step in traced.steps):
        return fn(*arguments)
    known: dict[Variable, Any] = dict(zip(traced.inputs, leaves, strict=True))

    def value(v: Value) -> Any:
        return known[v] if isinstance(v, Variable) else v.full

    for step in joined(traced):
        if isinstance(step, Joined):
            outs = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in step.results]
            outs += [jax.ShapeDtypeStruct((step.memory,), np.uint8)] * (step.memory > 0)
            found = native.sequence(step.program, [value(v) for v in step.operands], outs)
            known |= dict(zip(step.results, found, strict=False))
        else:
            known |= dict(zip(step.outputs, step.run(*map(value, step.inputs)), strict=True))
    return jax.tree.unflatten(traced.output_tree, [value(v) for v in traced.outputs])


def joined(traced: Traced) -> list[Call | Joined]:
    """The steps in an order in which few sequences hold all calls of the compiled kernel.

    Args:
      traced: a network of `Call`s.
    """
    users = users_of(traced.steps, traced.outputs)
    found: list[Call | Joined] = []
    ready, rest = set(traced.inputs), list(enumerate(traced.steps))
    while rest:
        others, rest = _taken(rest, ready, lambda step: not _kind(step))
        found += [step for _, step in others]
        group, rest = _taken(rest, ready, lambda step: _kind(step) or step.name in _VIEWS)
        if group:
            inside = {number for number, _ in group}
            needed = {v for _, step in group for v in step.outputs if not inside.issuperset(users.get(v, ()))}
            found += _sequence([step for _, step in group], needed)
    return found


def _taken(
    steps: Iterable[tuple[int, Call]], ready: set[Variable], wanted: Callable[[Call], Any]
) -> tuple[list[tuple[int, Call]], list[tuple[int, Call]]]:
    """The wanted steps that can be run next, one after another, and the rest; adds to `ready` what the former give."""
    taken, rest = [], []
    for number, step in steps:
        if wanted(step) and ready.issuperset(variables(step)):
            ready.update(step.outputs)
            taken.append((number, step))
        else:
            rest.append((number, step))
    return taken, rest


def _sequence(steps: Sequence[Call], needed: set[Variable]) -> list[Call | Joined]:
    """A sequence of calls, and the views of its results that are needed."""
    calls = [step for step in steps if _kind(step)]
    if not calls:
        return list(steps)
    whole: dict[Variable, Variable] = {}  # what a view is a view of
    for step in steps:
        if not _kind(step):
            (v,) = variables(step)
            whole[step.outputs[0]] = whole.get(v, v)

    def root(value: Value) -> Value:
        return whole.get(value, value) if isinstance(value, Variable) else value

    made = dict.fromkeys(call.outputs[0] for call in calls)
    roots = set(map(root, needed))
    results = tuple(v for v in made if v in roots)
    operands: dict[Any, Value] = {}
    for value in (root(v) for call in calls for v in call.inputs if math.prod(v.shape)):
        if _key(value) not in made:
            operands.setdefault(_key(value), value)
    offsets, memory = _offsets(calls, whole, set(results))
    buffers = [*operands, *results]
    places = {key: Place(i, 0) for i, key in enumerate(buffers)}
    places |= {v: Place(len(buffers), offset) for v, offset in offsets.items()}

    def encoded(value: Value) -> list[int]:
        place = places.get(_key(root(value)), Place(0, 0))  # the latter: of no numbers
        return [*place, native.code_of(value.dtype), len(value.shape), *value.shape]

    program: list[int] = []
    for call in calls:
        program.append(native.KINDS.index(call.params["target_name"]))
        for value in (*call.inputs, *call.outputs):
            program += encoded(value)
        for _, attribute in sorted(call.params["attributes"]):
            program += _attribute(attribute)
    views: list[Call | Joined] = []
    for step in reversed(steps):
        if not _kind(step) and step.outputs[0] in needed:
            needed = needed.union(step.inputs)  # which may be a view too
            views.insert(0, step)
    return [Joined(np.array(program, np.int64), tuple(operands.values()), results, memory), *views]


def _offsets(
    calls: Sequence[Call], whole: Mapping[Variable, Variable], results: set[Variable]
) -> tuple[dict[Variable, int], int]:
    """Where in the common memory each value is that only these calls take, and how large that is.

    A value's place is free once the last call has taken it. A result may take the place of the residual if it is the
    last to take that, as `native.conv` says.

    Args:
      calls: in order.
      whole: by view, the value that it is a view of.
      results: which have buffers of their own.
    """
    last: dict[Variable, int] = {}
    for number, call in enumerate(calls):
        for value in variables(call):
            last[whole.get(value, value)] = number
    offsets: dict[Variable, int] = {}
    held: list[tuple[int, int, Variable]] = []  # beginning and end of what is in use, in order
    memory = 0
    for number, call in enumerate(calls):
        (output,) = call.outputs
        if output not in results:
            size = math.prod(output.shape) * output.dtype.itemsize
            given = [call.inputs[i] for i, _ in call.params["input_output_aliases"]]
            over = [whole.get(v, v) for v in given if isinstance(v, Variable)]
            if over and over[0] in offsets and last[over[0]] == number:
                begin = offsets[over[0]]
                held = [(b, e, output if v == over[0] else v) for b, e, v in held]
            else:
                begin = 0
                for b, e, _ in held:
                    if b - begin >= size:
                        break
                    begin = max(begin, -(-e // _LINE) * _LINE)
                held = sorted([*held, (begin, begin + size, output)], key=lambda each: each[:2])
            offsets[output] = begin
            memory = max(memory, begin + size)
        held = [each for each in held if last.get(each[2], -1) > number]
    return offsets, memory


def _kind(step: Call) -> bool:
    """Whether it is a call of the compiled kernel."""
    return step.name == "ffi_call" and step.params["target_name"] in native.KINDS


def _key(value: Value) -> Any:
    """What tells a value from another."""
    return (id(value.value), value.shape) if isinstance(value, Constant) else value


def _attribute(value: Any) -> list[int]:
    """An attribute as numbers of 64 bits."""
    value = np.asarray(getattr(value, "val", value))
    if value.dtype == np.float32:
        return [int(value.view(np.uint32))]
    return [int(value)] if value.ndim == 0 else [value.size, *map(int, value)]
