"""Consecutive calls of the compiled kernel joined into sequences: one call for all of them.

A call costs XLA more than a microsecond, as long as a small layer takes. In a sequence only the first one does, and
the values between its steps share one piece of memory.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sa_plus_plus.sparse.compiler.ir import Call, Constant, Traced, Value, Variable, users_of, variables
from sa_plus_plus.sparse.compiler.trace import recorded
from sa_plus_plus.sparse.ops import native

_LINE = 64  # bytes of a line of a cache, to which values in the common memory are aligned


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
      memory: bytes for the values that only these steps take.
    """

    program: np.ndarray
    operands: tuple[Value, ...]
    results: tuple[Variable, ...]
    memory: int


def run_joined(fn: Callable[..., Any], *arguments: Any) -> Any:
    """`fn(*arguments)` with the compiled kernel's calls joined; without, if `fn` has effects, whose order would change.

    Args:
      fn: a function of trees of arrays.
      *arguments: trees of arrays and numbers, or tracers.
    """
    leaves, tree = jax.tree.flatten(arguments)
    types = [jax.typeof(leaf) for leaf in leaves]
    if any(t.manual_axis_type.varying for t in types):  # which a trace of shapes forgets
        return fn(*arguments)
    shapes = [jax.ShapeDtypeStruct(t.shape, t.dtype, weak_type=t.weak_type) for t in types]
    closed, result = jax.make_jaxpr(fn, return_shape=True)(*jax.tree.unflatten(tree, shapes))
    if closed.effects:
        return fn(*arguments)
    with jax.ensure_compile_time_eval():  # constants get their values, in `jax.jit` too
        traced = recorded(closed, (), tree, jax.tree.structure(result))
    if not any(map(_is_kernel, traced.steps)):
        return fn(*arguments)
    known: dict[Variable, Any] = dict(zip(traced.inputs, leaves, strict=True))

    def value(v: Value) -> Any:
        return known[v] if isinstance(v, Variable) else v.full

    for step in joined(traced):
        if isinstance(step, Joined):
            outs = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in step.results]
            found = native.sequence(step.program, [value(v) for v in step.operands], outs, step.memory)
            known |= dict(zip(step.results, found, strict=True))
        else:
            run = native.underived(step.run) if _is_kernel(step) else step.run
            known |= dict(zip(step.outputs, run(*map(value, step.inputs)), strict=True))
    return jax.tree.unflatten(traced.output_tree, [value(v) for v in traced.outputs])


def joined(traced: Traced) -> list[Call | Joined]:
    """The steps, reordered so that few sequences hold all calls of the compiled kernel.

    Everything that can run without the kernel comes first, then everything that the kernel can run after it, and so
    on. Views belong to either.

    Args:
      traced: a network of `Call`s.
    """
    users, inputs = users_of(traced.steps, traced.outputs), {*traced.inputs}
    missing = [len({*variables(step)} - inputs) for step in traced.steps]  # operands that are not yet computed
    kernels: list[int] = []  # heaps of the steps that are ready, by number
    views: list[int] = []
    others: list[int] = []

    def ready(number: int) -> None:
        step = traced.steps[number]
        heapq.heappush(kernels if _is_kernel(step) else views if _is_view(step) else others, number)

    def taken(*heaps: list[int]) -> list[int]:
        """Everything from these heaps, and what gets ready on the way."""
        found = []
        while full := [heap for heap in heaps if heap]:
            found.append(number := heapq.heappop(min(full)))
            for value in traced.steps[number].outputs:
                for user in sorted({*users.get(value, ())} - {len(traced.steps)}):
                    missing[user] -= 1
                    if not missing[user]:
                        ready(user)
        return found

    for number, count in enumerate(missing):
        if not count:
            ready(number)
    found: list[Call | Joined] = []
    while others or views or kernels:
        found += [traced.steps[number] for number in taken(others, views)]
        group = taken(kernels, views)
        inside, steps = set(group), [traced.steps[number] for number in group]
        needed = {v for step in steps for v in step.outputs if not inside.issuperset(users.get(v, ()))}
        found += _sequence(steps, needed)
    return found


def _sequence(steps: Sequence[Call], needed: set[Variable]) -> Sequence[Call | Joined]:
    """A sequence of calls, and the views of its results that are needed; one call alone stays as it is."""
    calls = [step for step in steps if _is_kernel(step)]
    if len(calls) < 2:
        return steps
    whole: dict[Variable, Variable] = {}  # what a view is a view of
    for step in steps:
        if not _is_kernel(step):
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
        place = places[_key(root(value))] if math.prod(value.shape) else Place(0, 0)
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
        if not _is_kernel(step) and step.outputs[0] in needed:
            needed = needed.union(step.inputs)  # which may be a view too
            views.insert(0, step)
    return [Joined(np.array(program, np.int64), tuple(operands.values()), results, memory), *views]


def _offsets(
    calls: Sequence[Call], whole: Mapping[Variable, Variable], results: set[Variable]
) -> tuple[dict[Variable, int], int]:
    """Offsets in the common memory of the values that only these calls take, and its size in bytes.

    A value's place is free after the last call that takes it. A result may overwrite the residual, as in
    `native.conv`, if no later call takes the residual, and this one takes it as nothing else.

    Args:
      calls: in order.
      whole: by view, the value that it is a view of.
      results: which have buffers of their own.
    """
    taken = [Counter(whole.get(v, v) for v in variables(call)) for call in calls]
    last = {value: number for number, values in enumerate(taken) for value in values}
    offsets: dict[Variable, int] = {}
    held: list[tuple[int, int, Variable]] = []  # beginning and end of what is in use, in order
    memory = 0
    for number, call in enumerate(calls):
        (output,) = call.outputs
        if output not in results:
            size = math.prod(output.shape) * output.dtype.itemsize
            given = [call.inputs[i] for i, _ in call.params["input_output_aliases"]]
            over = [whole.get(v, v) for v in given if isinstance(v, Variable)]
            if over and over[0] in offsets and last[over[0]] == number and taken[number][over[0]] == 1:
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


def _is_kernel(step: Call) -> bool:
    """Whether it is a call of the compiled kernel, and has something to compute."""
    return (
        step.name == "ffi_call" and step.params["target_name"] in native.KINDS and math.prod(step.outputs[0].shape) > 0
    )


def _is_view(step: Call) -> bool:
    """Whether its result has the numbers of its operand in the same order, in another shape."""
    if step.name not in ("reshape", "squeeze", "broadcast_in_dim") or len(step.inputs) > 1:
        return False
    permutes = step.name == "reshape" and step.params.get("dimensions") is not None
    return not permutes and math.prod(step.inputs[0].shape) == math.prod(step.outputs[0].shape)


def _key(value: Value) -> Any:
    """What tells a value from another."""
    return (id(value.value), value.shape) if isinstance(value, Constant) else value


def _attribute(value: Any) -> list[int]:
    """An attribute as numbers of 64 bits."""
    value = np.asarray(getattr(value, "val", value))
    if value.dtype == np.float32:
        return [int(value.view(np.uint32))]
    return [int(value)] if value.ndim == 0 else [value.size, *map(int, value)]
