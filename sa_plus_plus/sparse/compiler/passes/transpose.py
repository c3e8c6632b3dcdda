"""Transpositions move towards the end of a network until they meet and cancel; reshapes in a row become one."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from sa_plus_plus.sparse.compiler.builder import Builder, rewrite
from sa_plus_plus.sparse.compiler.ir import Call, Constant, Step, Traced, Value, Variable

_COMMUTES = (  # elementwise operations
    *("add", "sub", "mul", "div", "neg", "max", "min", "sqrt", "rsqrt", "exp", "log", "square", "integer_pow", "pow"),
    *("convert_element_type", "copy", "copy_p", "stop_gradient"),
    *("abs", "sign", "tanh", "logistic", "erf", "erfc", "exp2", "log1p", "expm1", "sin", "cos", "floor", "ceil"),
    *("add_any", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite", "clamp"),
)
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")


def merge_transpositions(traced: Traced) -> Traced:
    """The network with as few transpositions and reshapes as these rules lead to."""
    return rewrite(traced, _Rule)


class _Rule:
    def __init__(self, builder: Builder):
        self.builder = builder
        self.before: dict[Variable, tuple[Variable, tuple[int, ...]]] = {}  # of a transposed value
        self.after: dict[tuple[Variable, tuple[int, ...]], Variable] = {}  # the inverse
        self.reshaped: dict[Variable, Variable] = {}

    def __call__(self, step: Step, inputs: tuple[Value, ...]) -> Sequence[Value] | None:
        if not isinstance(step, Call) or len(step.outputs) != 1:
            return None
        result: Value | None = None
        if step.name == "transpose":
            result = self.transposed(inputs[0], step.params["permutation"])  # type: ignore[arg-type]
        elif step.name in ("reshape", "squeeze", "broadcast_in_dim"):
            result = self.reshape(step, inputs)
        elif step.name in (*_COMMUTES, *_WINDOWS):
            result = self.commuted(step, inputs)
        return None if result is None else [result]

    def transposed(self, x: Variable, permutation: Sequence[int]) -> Variable:
        """`x` transposed; two transpositions in a row are merged or cancelled."""
        if x in self.before:
            original, first = self.before[x]
            return self.transposed(original, [first[i] for i in permutation])
        key = x, tuple(permutation)
        if key not in self.after:
            output = self.builder.transpose(*key)
            if output is x:
                return x
            self.before[output], self.after[key] = key, output
        return self.after[key]

    def commuted(self, call: Call, inputs: tuple[Value, ...]) -> Variable | None:
        """An operation on a transposed value applied to the original, and then transposed."""
        turned = next((v for v in inputs if isinstance(v, Variable) and v in self.before), None)
        if turned is None:
            return None
        permutation = self.before[turned][1]
        inverse = _inverse(permutation)
        operands = [self.original(value, permutation) for value in inputs]
        if any(operand is None for operand in operands):
            return None
        params, (out,) = call.params, call.outputs
        if call.name in _WINDOWS:
            params = {key: tuple(sides[i] for i in inverse) for key, sides in params.items()}
        output = self.builder.variable([out.shape[i] for i in inverse], out.dtype)
        self.builder.steps.append(Call(call.primitive, params, tuple(operands), (output,)))  # type: ignore[arg-type]
        return self.transposed(output, permutation)

    def original(self, value: Value, permutation: tuple[int, ...]) -> Value | None:
        """The value before a transposition, if it is constant or was transposed in the same way."""
        inverse = _inverse(permutation)
        if isinstance(value, Constant):
            if not value.shape:
                return value
            shape = tuple(value.shape[i] for i in inverse)
            return Constant(jnp.transpose(value.value, inverse), shape, leaves=value.leaves)
        if value in self.before and self.before[value][1] == permutation:
            return self.before[value][0]
        return self.after.get((value, inverse)) if value.shape else value

    def reshape(self, call: Call, inputs: tuple[Value, ...]) -> Variable | None:
        """Merge two reshapes in a row into one, or none if they cancel."""
        (x, *rest), (out,) = inputs, call.outputs
        assert isinstance(x, Variable)
        permutes = call.name == "reshape" and call.params["dimensions"] is not None
        if rest or permutes or int(np.prod(out.shape)) != int(np.prod(x.shape)):
            return None
        original = self.reshaped.get(x, x)
        if out.shape == original.shape:
            return original
        if original is x:
            self.reshaped[out] = x
            return None
        params = {"new_sizes": out.shape, "dimensions": None, "sharding": None}
        (output,) = self.builder.effectful(lax.reshape_p, params, (original,), [out])
        self.reshaped[output] = original
        return output


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(permutation))
