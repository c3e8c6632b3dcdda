"""Recording of steps, by the trace of a function and by passes that rewrite one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

from sa_plus_plus.sparse.compiler.constants import computed, constant, item
from sa_plus_plus.sparse.compiler.ir import Call, Constant, Step, Traced, Value, Variable

_INLINED = (
    *("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call"),
)
_MAY_DO_NOTHING = ("reshape", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "stop_gradient", "squeeze")
Apply = Callable[[Any, list[Value]], Sequence[Value]]  # the results of an equation of a jaxpr


class Builder:
    """Records steps. Operations on constants are computed at once, those that change nothing are left out.

    Attributes:
      steps: recorded so far.
    """

    def __init__(self, first: int = 0):
        """`first` is a number below those of the variables to come."""
        self.steps: list[Step] = []
        self._count = first

    def variable(self, shape: Sequence[int], dtype: Any) -> Variable:
        self._count += 1
        return Variable(self._count, tuple(shape), dtype)

    def call(self, primitive: Any, params: dict[str, Any], inputs: Sequence[Value], outputs: Sequence[Any]) -> Any:
        """The results of an operation; `outputs` have their shapes and dtypes."""
        call = Call(primitive, params, tuple(inputs), ())
        if all(isinstance(value, Constant) for value in inputs):
            return computed(call, inputs, [v.shape for v in outputs])  # type: ignore[arg-type]
        if _does_nothing(call, outputs):
            return inputs[:1]
        return self.effectful(primitive, params, inputs, outputs)

    def effectful(self, primitive: Any, params: dict[str, Any], inputs: Any, outputs: Any) -> tuple[Variable, ...]:
        """The same, recorded in any case."""
        results = tuple(self.variable(v.shape, v.dtype) for v in outputs)
        self.steps.append(Call(primitive, params, tuple(inputs), results))
        return results

    def equation(self, eqn: Any, values: list[Value]) -> Sequence[Value]:
        """The results of an equation of a jaxpr."""
        record = self.effectful if eqn.effects else self.call
        return record(eqn.primitive, eqn.params, values, [v.aval for v in eqn.outvars])

    def inline(self, fn: Callable[..., Any], *values: Value) -> list[Value]:
        """The results of a JAX function on values."""
        shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values]
        return walk(jax.make_jaxpr(fn)(*shapes), values, self.equation)

    def transpose(self, x: Variable, permutation: Sequence[int]) -> Variable:
        """`x` transposed; the same if nothing changes place."""
        if tuple(permutation) == tuple(range(len(x.shape))):
            return x
        after = jax.ShapeDtypeStruct([x.shape[i] for i in permutation], x.dtype)
        return self.effectful(lax.transpose_p, {"permutation": tuple(permutation)}, (x,), [after])[0]

    def item(self, stack: Value, i: int) -> Value:
        """`stack[i]`."""
        if isinstance(stack, Constant):
            return item(stack, i)
        return self.inline(lambda x: lax.index_in_dim(x, i, keepdims=False), stack)[0]

    def stack(self, values: Sequence[Value]) -> Value:
        """Values stacked along a new first axis."""
        return self.inline(lambda *x: lax.concatenate([lax.expand_dims(a, (0,)) for a in x], 0), *values)[0]


Rule = Callable[[Step, tuple[Value, ...]], Sequence[Value] | None]


def rewrite(traced: Traced, rule_of: Callable[[Builder], Rule]) -> Traced:
    """A network step by step through a rule.

    Args:
      traced: the network.
      rule_of: makes a rule from the builder that records the new steps. `rule(step, inputs)` records what replaces a
        step, on new inputs, and returns its results; None leaves the step as it is.
    """
    numbers = [v.number for step in traced.steps for v in step.outputs] + [v.number for v in traced.inputs]
    builder = Builder(max(numbers, default=0))
    rule = rule_of(builder)
    known: dict[Variable, Value] = {}

    def new(value: Value) -> Value:
        return known.get(value, value) if isinstance(value, Variable) else value

    for step in traced.steps:
        inputs = tuple(map(new, step.inputs))
        results = rule(step, inputs)
        if results is None:
            builder.steps.append(step if inputs == step.inputs else step.with_inputs(inputs))
        else:
            known |= dict(zip(step.outputs, results, strict=True))
    return traced._replace(steps=builder.steps, outputs=[new(value) for value in traced.outputs])


def walk(closed: Any, inputs: Sequence[Value], apply: Apply) -> list[Value]:
    """The results of a jaxpr, equation by equation through `apply`; the jaxprs that it only calls are inlined."""
    # Some jaxprs carry their constants, others have none; this differs between versions of JAX.
    program, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    known: dict[Any, Value] = dict(zip(program.invars, inputs, strict=True))
    known |= {v: constant(c) for v, c in zip(program.constvars, consts, strict=True)}

    def read(atom: Any) -> Value:
        if isinstance(atom, core.Literal):
            return constant(np.asarray(atom.val, atom.aval.dtype))  # type: ignore[attr-defined]
        return known[atom]

    for eqn in program.eqns:
        values = [read(atom) for atom in eqn.invars]
        inner = called(eqn)
        results = apply(eqn, values) if inner is None else walk(inner, values, apply)
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in program.outvars]


def called(eqn: Any) -> Any:
    """The jaxpr that an operation calls, if it is only a call."""
    if eqn.primitive.name not in _INLINED:
        return None
    return eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))


def _does_nothing(call: Call, outputs: Sequence[Any]) -> bool:
    """Whether an operation returns its first operand unchanged, such as padding of width 0."""
    if call.name == "pad":
        return all(pad == (0, 0, 0) for pad in call.params["padding_config"])
    if call.name in (
        "reshape",
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "copy_p",
        "stop_gradient",
        "squeeze",
    ):
        (x, *more), (y,) = call.inputs, outputs
        permutes = call.params.get("dimensions") is not None and call.name == "reshape"
        return not more and not permutes and (tuple(x.shape), x.dtype) == (tuple(y.shape), y.dtype)
    return False
