"""Tracing of a network to the list of steps that depend on its inputs.

The function is traced, constant expressions are folded, and scales and shifts of output channels, such as those of
batch normalisation at inference, are folded into the preceding kernel and bias.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from sa_plus_plus.planning import path_string
from sa_plus_plus.sparse.activations import with_activations
from sa_plus_plus.sparse.folding import folded
from sa_plus_plus.sparse.overlooked import MOST_EXPERTS, unrolls
from sa_plus_plus.sparse.steps import Call, Constant, Layer, Linear, Origin, Traced, Value, Variable

_INLINED = (
    *("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call"),
)
_ELEMENTWISE = (
    *("add", "sub", "mul", "div", "neg", "max", "min", "sqrt", "rsqrt", "exp", "log", "square", "integer_pow", "pow"),
    *("convert_element_type", "copy", "copy_p", "stop_gradient"),
)
_ANY_ORDER = (  # operations that commute with a transposition
    *_ELEMENTWISE,
    *("abs", "sign", "tanh", "logistic", "erf", "erfc", "exp2", "log1p", "expm1", "sin", "cos", "floor", "ceil"),
    *("add_any", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite", "clamp"),
)
_MOVES = (  # operations that keep each entry of their first operand, up to rounding
    *("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "slice", "dynamic_slice", "rev"),
    *("convert_element_type", "copy", "copy_p", "stop_gradient"),
)
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")


def trace(fn: Callable[..., Any], *examples: Any) -> Traced[Call | Linear]:
    """Trace a network on arguments of given shapes; its weights are closed over.

    Custom derivatives are dropped: the trace is for inference.

    Args:
      fn: jittable.
      examples: arrays, or their shapes and dtypes.
    """
    closed, result = jax.make_jaxpr(fn, return_shape=True)(*examples)
    if any(isinstance(constant, jax.core.Tracer) for constant in closed.consts):
        raise TypeError("weights must have values to look at: specialize a network outside jit, vmap and grad")
    recorder = _Recorder()
    inputs = [recorder.variable(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
    outputs = recorder.walk(closed, inputs)
    structures = jax.tree.structure(examples), jax.tree.structure(result)
    steps = with_activations(folded(recorder.calls, outputs), outputs)
    return Traced(inputs, steps, outputs, *structures)


def kernel_tracer(
    fn: Callable[..., Any], params: Any, paths: Container[str], *examples: Any
) -> Callable[[Any], Traced[Call | Linear]]:
    """Trace a network whose weights are its first argument; each layer has the origin of its kernel.

    Nothing is folded, and activations are separate steps.

    Args:
      fn: `fn(params, *inputs)`, jittable.
      params: tree of arrays.
      paths: of the leaves whose kernels are searched for.
      examples: inputs, or their shapes and dtypes.

    Returns:
      A function from parameters to the network with these. The steps and values of any two results have the same
      numbers; only constants differ.
    """
    closed, result = jax.make_jaxpr(fn, return_shape=True)(params, *examples)

    def traced(params: Any) -> Traced[Call | Linear]:
        recorder = _Recorder()
        weights = [_leaf(path_string(keys), leaf, paths) for keys, leaf in jax.tree_util.tree_leaves_with_path(params)]
        inputs = [recorder.variable(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars[len(weights) :]]
        outputs = recorder.walk(closed, [*weights, *inputs])
        return Traced(inputs, recorder.calls, outputs, jax.tree.structure(examples), jax.tree.structure(result))

    return traced


def trace_kernels(fn: Callable[..., Any], params: Any, paths: Container[str], *examples: Any) -> Traced[Call | Linear]:
    """`kernel_tracer(fn, params, paths, *examples)(params)`."""
    return kernel_tracer(fn, params, paths, *examples)(params)


def _leaf(path: str, leaf: Any, paths: Container[str]) -> Constant:
    if path not in paths:
        return _constant(leaf)
    positions = np.arange(np.size(leaf), dtype=np.int32).reshape(np.shape(leaf))
    return Constant(leaf, np.shape(leaf), Origin(path, positions), frozenset({path}))


class _Recorder:
    """Walks through a jaxpr and records what depends on its inputs."""

    def __init__(self) -> None:
        self.calls: list[Call | Linear] = []
        self.permuted: dict[Variable, tuple[Variable, tuple[int, ...]]] = {}
        self.transpositions: dict[tuple[Variable, tuple[int, ...]], Variable] = {}
        self.reshaped: dict[Variable, Variable] = {}
        self.strided: dict[Variable, tuple[Variable, tuple[int, int]]] = {}
        self.count = 0

    def variable(self, shape: Sequence[int], dtype: Any) -> Variable:
        self.count += 1
        return Variable(self.count, tuple(shape), dtype)

    def walk(self, closed: Any, inputs: Sequence[Value]) -> list[Value]:
        # Some jaxprs carry their constants, others have none; this differs between versions of JAX.
        program, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        known: dict[Any, Value] = dict(zip(program.invars, inputs, strict=True))
        known |= {v: _constant(c) for v, c in zip(program.constvars, consts, strict=True)}

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                return _constant(np.asarray(atom.val, atom.aval.dtype))  # type: ignore[attr-defined]
            return known[atom]

        for eqn in program.eqns:
            values = [read(atom) for atom in eqn.invars]
            inner = _inner(eqn)
            results = self.apply(eqn, values) if inner is None else self.walk(inner, values)
            known |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in program.outvars]

    def inlined(self, fn: Callable[..., Any], *values: Value) -> list[Value]:
        """The results of a JAX function on values."""
        shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype if isinstance(v, Variable) else v.value.dtype) for v in values]
        return self.walk(jax.make_jaxpr(fn)(*shapes), values)

    def apply(self, eqn: Any, values: list[Value]) -> Sequence[Value]:
        constants = [value for value in values if isinstance(value, Constant)]
        if len(constants) == len(values) and not eqn.effects:
            results = _computed(Call(eqn.primitive, eqn.params, tuple(values), ()), constants, eqn.outvars)
            leaves = frozenset[str]().union(*(c.leaves for c in constants))
            return [c._replace(leaves=leaves) for c in results]
        if _does_nothing(eqn):
            return values[:1]
        if unrolls(eqn, values):
            return self.unrolled(eqn, values)
        special = {
            "dot_general": self.product,
            "conv_general_dilated": self.convolution,
            "transpose": self.transpose,
            "slice": self.slice,
            **dict.fromkeys(("reshape", "squeeze", "broadcast_in_dim"), self.reshape),
            **dict.fromkeys((*_ANY_ORDER, *_WINDOWS), self.before_transposition),
        }.get(eqn.primitive.name)
        empty = any(0 in value.shape for value in constants)  # a kernel without weights is no layer
        if special and not empty and (result := special(eqn, values)):
            return [result]
        return self.called(eqn, values)

    def called(self, eqn: Any, values: Sequence[Value]) -> tuple[Variable, ...]:
        outputs = tuple(self.variable(v.aval.shape, v.aval.dtype) for v in eqn.outvars)
        self.calls.append(Call(eqn.primitive, eqn.params, tuple(values), outputs))
        return outputs

    def product(self, eqn: Any, values: list[Value]) -> Value | None:
        """A product with a constant as `Linear`; a batched product, such as of experts, as one `Linear` each."""
        (contracted, batch), (left, right) = eqn.params["dimension_numbers"], values
        (out,) = eqn.outvars
        x, kernel = (left, right) if isinstance(left, Variable) else (right, left)
        if not contracted[0] or not isinstance(x, Variable) or not isinstance(kernel, Constant):
            return None
        if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (x.dtype, kernel.value.dtype, out.aval.dtype)):
            return None
        sides = [(c, b) for c, b in zip(contracted, batch, strict=True)]
        (over_x, batch_x), (over_kernel, batch_kernel) = sides if x is left else sides[::-1]
        rest_x, rest_kernel = (
            [i for i in range(len(v.shape)) if i not in (*over, *along)]
            for v, over, along in ((x, over_x, batch_x), (kernel, over_kernel, batch_kernel))
        )
        if x in self.strided and x is left and (over_x, over_kernel, len(kernel.shape)) == ((3,), (0,), 2):
            return self.strided_product(x, kernel, eqn.params["precision"], out.aval.dtype)
        lengths = tuple(kernel.shape[i] for i in batch_kernel)
        columns = tuple(kernel.shape[i] for i in rest_kernel)
        inputs, number = int(np.prod([kernel.shape[i] for i in over_kernel])), int(np.prod(lengths))
        if batch_x and not (0 < number <= MOST_EXPERTS and columns):
            return None
        order = (*batch_kernel, *over_kernel, *rest_kernel)
        matrices = _arranged(kernel, order, (number, inputs, -1))
        x = self.transposed(x, (*batch_x, *rest_x, *over_x))
        how = {"columns": columns, "precision": eqn.params["precision"], "dtype": out.aval.dtype}
        n, m = len(batch_x), len(rest_x)
        if not batch_x:
            result: Value = self.linear(x, self.taken(matrices, 0), m, **how)
        else:
            flat: Value = x
            if n > 1:
                (flat,) = self.inlined(lambda x: lax.reshape(x, (number, *x.shape[n:])), x)
            parts = [self.linear(self.taken(flat, i), self.taken(matrices, i), m, **how) for i in range(number)]
            result = self.stacked(parts)
            if n > 1:
                (result,) = self.inlined(lambda y: lax.reshape(y, (*lengths, *y.shape[1:])), result)
        assert isinstance(result, Variable)
        if left is kernel:  # the kernel's axes come first in the result
            axes = range(len(result.shape))
            return self.transposed(result, (*axes[:n], *axes[n + m :], *axes[n : n + m]))
        return result

    def slice(self, eqn: Any, values: list[Value]) -> Variable:
        """A slice; if it takes every n-th row and column of images, a product can use it as strides."""
        (x,), options = values, eqn.params
        (output,) = self.called(eqn, values)
        strides = options["strides"] or (1,) * len(x.shape)
        whole = all((n - 1) // s + 1 == m for n, s, m in zip(x.shape, strides, output.shape, strict=True))
        assert isinstance(x, Variable)  # since constant expressions are folded
        images = len(x.shape) == 4 and strides[0] == strides[3] == 1
        if images and whole and not any(options["start_indices"]):
            self.strided[output] = x, (strides[1], strides[2])
        return output

    def strided_product(self, x: Variable, kernel: Constant, precision: Any, dtype: Any) -> Value:
        """A product with every n-th row and column of images as a strided convolution, without a copy."""
        images, strides = self.strided[x]

        def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
            how: dict[str, Any] = {"precision": precision, "preferred_element_type": dtype}
            order = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(x, kernel[None, None], strides, "VALID", dimension_numbers=order, **how)

        return self.inlined(convolved, images, kernel)[0]

    def linear(self, x: Value, matrix: Value, lead: int, columns: tuple[int, ...], precision: Any, dtype: Any) -> Value:
        """A product of `x`, contracted axes last, with `(K, N)`; outputs are last in the result."""
        assert isinstance(x, Variable)
        assert isinstance(matrix, Constant)
        output = self.variable((*x.shape[:lead], *columns), dtype)
        about = jax.ShapeDtypeStruct(matrix.shape, matrix.value.dtype)
        layer = Layer(None, x, about, output, columns, precision=precision)
        self.calls.append(Linear(layer, matrix.value, origin=matrix.origin, leaves=matrix.leaves))
        return output

    def convolution(self, eqn: Any, values: list[Value]) -> Variable | None:
        """A convolution with a constant kernel as `Linear`, channels last in images, kernel and result."""
        (x, kernel), (out,) = values, eqn.outvars
        if not isinstance(x, Variable) or not isinstance(kernel, Constant) or eqn.params["batch_group_count"] != 1:
            return None
        if not jnp.issubdtype(kernel.value.dtype, jnp.floating) or not jnp.issubdtype(out.aval.dtype, jnp.floating):
            return None
        last = len(x.shape) - 1
        images, kernels, results = eqn.params["dimension_numbers"]
        images, results = ((spec[0], *spec[2:], spec[1]) for spec in (images, results))
        kernels = (*kernels[2:], kernels[1], kernels[0])
        spec = (0, last, *range(1, last))
        numbers = lax.ConvDimensionNumbers(spec, (last, last - 1, *range(last - 1)), spec)
        arranged = _arranged(kernel, kernels)
        full = arranged.value
        x = self.transposed(x, images)
        output = self.variable([out.aval.shape[i] for i in results], out.aval.dtype)
        call = Call(eqn.primitive, eqn.params | {"dimension_numbers": numbers}, (x,), (output,))
        about = jax.ShapeDtypeStruct(full.shape, full.dtype)
        layer = Layer(call, x, about, output, full.shape[-1:])
        self.calls.append(Linear(layer, full, origin=arranged.origin, leaves=arranged.leaves))
        return self.transposed(output, _inverse(results))

    def transpose(self, eqn: Any, values: list[Value]) -> Variable:
        (value,) = values
        assert isinstance(value, Variable)
        return self.transposed(value, eqn.params["permutation"])

    def transposed(self, x: Variable, permutation: Sequence[int]) -> Variable:
        """`x` transposed; two transpositions in a row are merged or cancelled."""
        if x in self.permuted:
            original, first = self.permuted[x]
            return self.transposed(original, [first[i] for i in permutation])
        if tuple(permutation) == tuple(range(len(x.shape))):
            return x
        key = x, tuple(permutation)
        if key not in self.transpositions:
            output = self.variable([x.shape[i] for i in permutation], x.dtype)
            self.calls.append(Call(lax.transpose_p, {"permutation": key[1]}, (x,), (output,)))
            self.permuted[output], self.transpositions[key] = key, output
        return self.transpositions[key]

    def before_transposition(self, eqn: Any, values: list[Value]) -> Variable | None:
        """Apply an operation on a transposed value to the original instead, so that transpositions meet and cancel."""
        turned = next((v for v in values if isinstance(v, Variable) and v in self.permuted), None)
        if turned is None or len(eqn.outvars) != 1:
            return None
        permutation = self.permuted[turned][1]
        inverse = _inverse(permutation)
        operands = [self.as_before(value, permutation) for value in values]
        if any(operand is None for operand in operands):
            return None
        options = eqn.params
        if eqn.primitive.name in _WINDOWS:
            options = {key: tuple(sides[i] for i in inverse) for key, sides in options.items()}
        (out,) = eqn.outvars
        output = self.variable([out.aval.shape[i] for i in inverse], out.aval.dtype)
        self.calls.append(Call(eqn.primitive, options, tuple(operands), (output,)))  # type: ignore[arg-type]
        return self.transposed(output, permutation)

    def as_before(self, value: Value, permutation: tuple[int, ...]) -> Value | None:
        """The value before a transposition, if it is constant or was transposed in the same way."""
        inverse = _inverse(permutation)
        if isinstance(value, Constant):
            if not value.shape:
                return value
            shape = tuple(value.shape[i] for i in inverse)
            return Constant(jnp.transpose(value.value, inverse), shape, leaves=value.leaves)
        if value in self.permuted and self.permuted[value][1] == permutation:
            return self.permuted[value][0]
        return self.transpositions.get((value, inverse)) if value.shape else value

    def reshape(self, eqn: Any, values: list[Value]) -> Variable | None:
        """Merge two reshapes in a row into one, or none if they cancel."""
        (out,) = eqn.outvars
        (x, *rest), shape = values, tuple(out.aval.shape)
        assert isinstance(x, Variable)
        permutes = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
        if rest or permutes or int(np.prod(shape)) != int(np.prod(x.shape)):
            return None
        original = self.reshaped.get(x, x)
        if shape == original.shape:
            return original
        if original is x:
            (output,) = self.called(eqn, values)
        else:
            output = self.variable(shape, x.dtype)
            options = {"new_sizes": shape, "dimensions": None, "sharding": None}
            self.calls.append(Call(lax.reshape_p, options, (original,), (output,)))
        self.reshaped[output] = original
        return output

    def unrolled(self, eqn: Any, values: list[Value]) -> list[Value]:
        """The steps of a loop one after another."""
        options = eqn.params
        first, length = options["num_consts"] + options["num_carry"], options["length"]
        consts, carry, over = values[: options["num_consts"]], values[options["num_consts"] : first], values[first:]
        results: dict[int, list[Value]] = {}
        for i in reversed(range(length)) if options["reverse"] else range(length):
            step = self.walk(options["jaxpr"], [*consts, *carry, *(self.taken(value, i) for value in over)])
            carry, results[i] = step[: len(carry)], step[len(carry) :]
        columns = zip(*(results[i] for i in range(length)), strict=True)
        return [*carry, *(self.stacked(column) for column in columns)]

    def taken(self, value: Value, i: int) -> Value:
        """`value[i]`."""
        if isinstance(value, Constant):
            place = 0 if len(value.value) == 1 else i
            origin = value.origin and value.origin._replace(positions=value.origin.positions[place])
            return Constant(jnp.asarray(value.value)[place], value.shape[1:], origin, value.leaves)
        return self.inlined(lambda x: lax.index_in_dim(x, i, keepdims=False), value)[0]

    def stacked(self, values: Sequence[Value]) -> Value:
        """Values stacked along a new first axis."""
        return self.inlined(lambda *x: lax.concatenate([lax.expand_dims(a, (0,)) for a in x], 0), *values)[0]


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(permutation))


def _does_nothing(eqn: Any) -> bool:
    """Whether an operation returns its first operand unchanged, such as padding of width 0."""
    name, operands = eqn.primitive.name, eqn.invars
    if name == "pad":
        return all(pad == (0, 0, 0) for pad in eqn.params["padding_config"])
    if name in ("reshape", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "stop_gradient", "squeeze"):
        (out,) = eqn.outvars
        same = (operands[0].aval.shape, operands[0].aval.dtype) == (out.aval.shape, out.aval.dtype)
        return len(operands) == 1 and same
    return False


def _inner(eqn: Any) -> Any:
    """The jaxpr that an operation calls, if it is only a call."""
    if eqn.primitive.name not in _INLINED:
        return None
    return eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))


def _constant(value: Any) -> Constant:
    return Constant(value, np.shape(value))


def _arranged(kernel: Constant, order: Sequence[int], shape: Sequence[int] | None = None) -> Constant:
    """A constant in full, transposed and then reshaped."""

    def arranged(value: Any) -> Any:
        full = jnp.broadcast_to(value, kernel.shape)
        full = full if tuple(order) == tuple(range(full.ndim)) else jnp.transpose(full, order)
        return full if shape is None else full.reshape(shape)

    value, origin = arranged(kernel.value), kernel.origin
    origin = origin and origin._replace(positions=arranged(origin.positions))
    return Constant(value, value.shape, origin, kernel.leaves)


def _computed(call: Call, inputs: list[Constant], outvars: Sequence[Any]) -> list[Constant]:
    """Run an operation on constants; broadcasting along constant axes is deferred as long as possible."""
    name = call.primitive.name
    if (origin := inputs[0].origin if inputs and name in _MOVES else None) is not None:
        (moved,) = _computed(call, [inputs[0]._replace(origin=None), *inputs[1:]], outvars)
        positions = origin.positions
        if name not in ("convert_element_type", "copy", "copy_p", "stop_gradient"):
            there = Constant(jnp.asarray(positions), inputs[0].shape)
            positions = _computed(call, [there, *inputs[1:]], outvars)[0].value
        return [moved._replace(origin=origin._replace(positions=positions))]
    if name == "broadcast_in_dim" and len(inputs) == 1:
        shape, axes = call.options["shape"], call.options["broadcast_dimensions"]
        narrow = [1] * len(shape)
        for axis, length in zip(axes, np.shape(inputs[0].value), strict=True):
            narrow[axis] = length
        return [Constant(jnp.reshape(inputs[0].value, narrow), tuple(shape))]
    if name in _ELEMENTWISE:
        narrow_shape = np.broadcast_shapes(*(np.shape(c.value) for c in inputs))
        results = call.run(*(jnp.broadcast_to(c.value, narrow_shape) for c in inputs))
    else:
        results = call.run(*(c.full for c in inputs))
    return [Constant(value, tuple(v.aval.shape)) for value, v in zip(results, outvars, strict=True)]
