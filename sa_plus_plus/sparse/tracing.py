"""A network with its weights as a list of what remains to be done for each input.

A function of its inputs is traced; whatever depends on weights alone is computed at once, and scales and shifts of each
output channel, such as those of batch normalisation at inference, are folded into the kernel and bias before them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_INLINED = (
    *("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call"),
)
_ELEMENTWISE = (
    *("add", "sub", "mul", "div", "neg", "max", "min", "sqrt", "rsqrt", "exp", "log", "square", "integer_pow", "pow"),
    *("convert_element_type", "copy", "copy_p", "stop_gradient"),
)


class Variable(NamedTuple):
    """A value that depends on the inputs."""

    number: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Constant(NamedTuple):
    """A value that does not.

    Attributes:
      value: of the same rank as `shape`, with 1 for axes along which it is constant.
      shape: what it stands for.
    """

    value: Any
    shape: tuple[int, ...]

    @property
    def full(self) -> jax.Array:
        return jnp.broadcast_to(self.value, self.shape)


Value = Variable | Constant


class Call(NamedTuple):
    """Any operation as JAX traced it."""

    primitive: Any
    options: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Variable, ...]

    def run(self, *inputs: Any) -> Any:
        results = self.primitive.bind(*inputs, **self.primitive.get_bind_params(self.options))
        return results if self.primitive.multiple_results else [results]


class Layer(NamedTuple):
    """A product with a kernel, without its weights: `relu?(x @ kernel + bias + residual)`.

    Attributes:
      call: the convolution as JAX traced it, of `x` and a kernel; None for a product of matrices.
      x: what is multiplied: images, or `(..., K)` with the contracted axes last.
      kernel: shape and dtype of the kernel: `(K, N)` of a product, otherwise the convolution's, outputs last.
      output: the result, after all of the above.
      columns: the last axes of the output, over which the `N` columns go.
      relu: whether `max(., 0)` follows.
      residual: what is added before that, of the output's shape, or None.
      precision: of a product, as `jax.lax.dot_general` takes it.
    """

    call: Call | None
    x: Variable
    kernel: jax.ShapeDtypeStruct
    output: Variable
    columns: tuple[int, ...]
    relu: bool = False
    residual: Variable | None = None
    precision: Any = None

    @property
    def rows(self) -> int:
        """How many rows the matrix that the kernel stands for is multiplied with."""
        return int(np.prod(self.output.shape)) // self.kernel.shape[-1]

    def dense(self, x: Any, kernel: Any, bias: Any, residual: Any = None) -> Any:
        """Run it as it was traced."""
        if self.call is None:
            y = jax.lax.dot_general(
                x.reshape(self.rows, self.kernel.shape[0]),
                kernel,
                (((1,), (0,)), ((), ())),
                precision=self.precision,
                preferred_element_type=self.output.dtype,
            ).reshape(self.output.shape)
        else:
            (y,) = self.call.run(x, kernel)
        if bias is not None:
            y = y + jnp.reshape(bias, (1,) * (y.ndim - len(self.columns)) + self.columns)
        if residual is not None:
            y = y + residual
        return jax.nn.relu(y) if self.relu else y


class Linear(NamedTuple):
    """A layer with its weights: `relu?(x @ (scale * original) + shift + residual)`.

    Attributes:
      layer: what it does.
      original: the kernel as it was.
      scale: `(N,)` float64, or None: what to multiply it by.
      shift: `(N,)` float64, or None.
    """

    layer: Layer
    original: Any
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None

    @property
    def kernel(self) -> Any:
        """The kernel, scaled, in its type."""
        if self.scale is None:
            return self.original
        return jnp.asarray((np.asarray(self.original, np.float64) * self.scale).astype(self.original.dtype))

    @property
    def bias(self) -> jax.Array | None:
        """The shift in the kernel's type."""
        return None if self.shift is None else jnp.asarray(self.shift, self.original.dtype)


Step = TypeVar("Step")


class Traced(NamedTuple, Generic[Step]):
    """A traced network.

    Attributes:
      inputs: its arguments' leaves.
      steps: in the order in which they can be run.
      outputs: its results' leaves.
      input_tree: the structure of its arguments.
      tree: that of its result.
    """

    inputs: Sequence[Variable]
    steps: Sequence[Step]
    outputs: Sequence[Value]
    input_tree: Any
    tree: Any


def trace(fn: Callable[..., Any], *examples: Any) -> Traced[Call | Linear]:
    """Trace a network on arguments of given shapes; its weights are what it closes over.

    Custom derivatives are not kept: what is traced is for inference.

    Args:
      fn: jittable.
      examples: arrays, or their shapes and dtypes.
    """
    closed, result = jax.make_jaxpr(fn, return_shape=True)(*examples)
    if any(isinstance(constant, jax.core.Tracer) for constant in closed.consts):
        raise TypeError("weights must have values to look at: specialize a network outside jit, vmap and grad")
    recorder = _Recorder()
    inputs = [recorder.variable(v.aval) for v in closed.jaxpr.invars]
    outputs = recorder.walk(closed, inputs)
    structures = jax.tree.structure(examples), jax.tree.structure(result)
    return Traced(inputs, _folded(recorder.calls, outputs), outputs, *structures)


class _Recorder:
    """Walks through a program; keeps what depends on its inputs."""

    def __init__(self) -> None:
        self.calls: list[Call | Linear] = []
        self.permuted: dict[Variable, tuple[Variable, tuple[int, ...]]] = {}
        self.transpositions: dict[tuple[Variable, tuple[int, ...]], Variable] = {}
        self.count = 0

    def variable(self, aval: Any) -> Variable:
        self.count += 1
        return Variable(self.count, tuple(aval.shape), aval.dtype)

    def walk(self, closed: Any, inputs: Sequence[Value]) -> list[Value]:
        # Some programs carry their constants, others have none; which do differs between versions of JAX.
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

    def apply(self, eqn: Any, values: list[Value]) -> Sequence[Value]:
        constants = [value for value in values if isinstance(value, Constant)]
        if len(constants) == len(values) and not eqn.effects:
            return _computed(Call(eqn.primitive, eqn.params, tuple(values), ()), constants, eqn.outvars)
        if _does_nothing(eqn):
            return values[:1]
        if eqn.primitive.name == "dot_general" and (product := self.product(eqn, values)):
            return [product]
        if eqn.primitive.name == "transpose":
            (value,) = values
            assert isinstance(value, Variable)
            return [self.transposed(value, eqn.params["permutation"])]
        outputs = tuple(self.variable(v.aval) for v in eqn.outvars)
        self.calls.append(Call(eqn.primitive, eqn.params, tuple(values), outputs))
        return outputs

    def product(self, eqn: Any, values: list[Value]) -> Variable | None:
        """A product with a constant as `Linear`, its contracted axes last in `x` and its own outputs last in `y`."""
        (contracted, batch), (left, right) = eqn.params["dimension_numbers"], values
        (out,) = eqn.outvars
        x, kernel = (left, right) if isinstance(left, Variable) else (right, left)
        if any(batch) or not contracted[0] or not isinstance(x, Variable) or not isinstance(kernel, Constant):
            return None
        if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (x.dtype, kernel.value.dtype, out.aval.dtype)):
            return None
        over_x, over_kernel = contracted if x is left else contracted[::-1]
        rest_x, rest_kernel = (
            [i for i in range(len(v.shape)) if i not in over]
            for v, over in zip((x, kernel), (over_x, over_kernel), strict=True)
        )
        columns = tuple(kernel.shape[i] for i in rest_kernel)
        matrix = jnp.transpose(kernel.full, (*over_kernel, *rest_kernel))
        matrix = matrix.reshape(int(np.prod([kernel.shape[i] for i in over_kernel])), -1)
        shape = (*(x.shape[i] for i in rest_x), *columns)
        x = self.transposed(x, (*rest_x, *over_x))
        output = self.variable(jax.ShapeDtypeStruct(shape, out.aval.dtype))
        about = jax.ShapeDtypeStruct(matrix.shape, matrix.dtype)
        self.calls.append(Linear(Layer(None, x, about, output, columns, precision=eqn.params["precision"]), matrix))
        if left is kernel:  # whose axes come first in the result
            n = len(rest_x)
            return self.transposed(output, (*range(n, len(shape)), *range(n)))
        return output

    def transposed(self, x: Variable, permutation: Sequence[int]) -> Variable:
        """`x` with its axes in another order; two such operations in a row are one, or none."""
        if x in self.permuted:
            original, first = self.permuted[x]
            return self.transposed(original, [first[i] for i in permutation])
        if tuple(permutation) == tuple(range(len(x.shape))):
            return x
        key = x, tuple(permutation)
        if key not in self.transpositions:
            output = self.variable(jax.ShapeDtypeStruct([x.shape[i] for i in permutation], x.dtype))
            self.calls.append(Call(jax.lax.transpose_p, {"permutation": key[1]}, (x,), (output,)))
            self.permuted[output], self.transpositions[key] = key, output
        return self.transpositions[key]


def _does_nothing(eqn: Any) -> bool:
    """Whether an operation's result is its first operand, as padding by nothing."""
    name, operands = eqn.primitive.name, eqn.invars
    if name == "pad":
        return all(pad == (0, 0, 0) for pad in eqn.params["padding_config"])
    if name in ("reshape", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "stop_gradient", "squeeze"):
        (out,) = eqn.outvars
        same = (operands[0].aval.shape, operands[0].aval.dtype) == (out.aval.shape, out.aval.dtype)
        return len(operands) == 1 and same
    return False


def _inner(eqn: Any) -> Any:
    """The program that an operation stands for, if it is one that only calls another."""
    if eqn.primitive.name not in _INLINED:
        return None
    return eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))


def _constant(value: Any) -> Constant:
    return Constant(value, np.shape(value))


def _computed(call: Call, inputs: list[Constant], outvars: Sequence[Any]) -> list[Constant]:
    """Run an operation on constants; what is constant along an axis is not repeated along it before it must be."""
    name = call.primitive.name
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


def _folded(calls: list[Call | Linear], outputs: list[Value]) -> list[Call | Linear]:
    """Products with kernels as `Linear`, with all that may be folded into them; nothing whose result nobody uses."""
    uses: dict[Value, int] = {}
    needed = {value for value in outputs if isinstance(value, Variable)}
    live = []
    for call in reversed(calls):
        results = (call.layer.output,) if isinstance(call, Linear) else call.outputs
        if results and needed.isdisjoint(results) and not _calls_back(call):
            continue
        inputs = [v for v in ((call.layer.x,) if isinstance(call, Linear) else call.inputs) if isinstance(v, Variable)]
        needed.update(inputs)
        live.append(call)
        for value in inputs:
            uses[value] = uses.get(value, 0) + 1
    for value in needed.intersection(v for v in outputs if isinstance(v, Variable)):
        uses[value] = uses.get(value, 0) + 1
    steps: list[Call | Linear | None] = []
    open_ends: dict[Value, int] = {}  # by result: where in `steps` products are that nobody else sees
    for call in reversed(live):
        linear = call if isinstance(call, Linear) else _convolution(call)
        if linear is not None:
            open_ends[linear.layer.output] = len(steps)
            steps.append(linear)
            continue
        assert isinstance(call, Call)
        steps.append(call)
        for at, value in enumerate(call.inputs):
            if isinstance(value, Constant) or value not in open_ends or uses[value] > 1:
                continue
            place = open_ends[value]
            before = steps[place]
            assert isinstance(before, Linear)
            if folded := _folded_into(before, call, at):
                # It takes the place of what was folded: a residual may come later than the product.
                steps[place], steps[-1] = None, folded
                if not folded.layer.relu:
                    open_ends[folded.layer.output] = len(steps) - 1
                break
    return [step for step in steps if step is not None]


def _calls_back(call: Call | Linear) -> bool:
    return isinstance(call, Call) and "callback" in call.primitive.name


def _convolution(call: Call) -> Linear | None:
    """A convolution of something variable with a constant kernel, channels last in kernel and result."""
    if call.primitive.name != "conv_general_dilated" or isinstance(call.inputs[0], Constant):
        return None
    x, kernel = call.inputs
    if isinstance(kernel, Variable):
        return None
    numbers, last = call.options["dimension_numbers"], len(x.shape) - 1
    channels_last = (numbers.lhs_spec[1], numbers.rhs_spec[0], numbers.out_spec[1]) == (last, last, last)
    (output,) = call.outputs
    if not channels_last or call.options["batch_group_count"] != 1:
        return None
    if not jnp.issubdtype(kernel.value.dtype, jnp.floating) or not jnp.issubdtype(output.dtype, jnp.floating):
        return None
    about = jax.ShapeDtypeStruct(kernel.shape, kernel.value.dtype)
    return Linear(Layer(call._replace(inputs=(x,)), x, about, output, kernel.shape[-1:]), kernel.full)


def _folded_into(linear: Linear, call: Call, at: int) -> Linear | None:
    """A product together with an operation on its result, if that changes no more than the rounding of its last digit.

    So nothing is folded across a change of type, where a network may mean to round, nor into types of few digits.
    """
    if len(call.outputs) != 1 or len(call.inputs) != 2:
        return None
    (output,), (other,) = call.outputs, call.inputs[:at] + call.inputs[at + 1 :]
    layer, name = linear.layer, call.primitive.name
    if (output.shape, output.dtype) != (layer.output.shape, layer.output.dtype):
        return None
    wide = output.dtype in (np.float32, np.float64) and layer.kernel.dtype == output.dtype
    if isinstance(other, Variable):
        alike = (other.shape, other.dtype) == (output.shape, output.dtype) and other != layer.output
        if not wide or name not in ("add", "add_any") or not alike or layer.residual is not None:
            return None
        return linear._replace(layer=layer._replace(residual=other, output=output))
    value = np.asarray(other.value)
    if name == "max" and value.size == 1 and not value.any():
        return linear._replace(layer=layer._replace(relu=True, output=output))
    value = value.reshape((1,) * (len(output.shape) - value.ndim) + value.shape)
    lead = len(output.shape) - len(layer.columns)
    if not wide or any(n != 1 for n in value.shape[:lead]) or layer.residual is not None:
        return None
    value = np.broadcast_to(value.reshape(value.shape[lead:]).astype(np.float64), layer.columns).reshape(-1)
    return _affine(linear, name, at, value, output)


def _affine(linear: Linear, name: str, at: int, c: np.ndarray, output: Variable) -> Linear | None:
    """`y + c`, `y - c`, `c - y`, `y * c` or `y / c`, with a `c` for each column."""
    scale, shift = linear.scale, linear.shift
    if name in ("add", "add_any", "sub"):
        by = -1 if name == "sub" and at == 1 else 1  # c - y
        shift = (0 if shift is None else by * shift) + (-c if name == "sub" and at == 0 else c)
        if by == -1:
            scale = -(np.ones_like(c) if scale is None else scale)
    elif name == "mul" or (name == "div" and at == 0):
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            factor = c if name == "mul" else 1 / c
            scale = factor if scale is None else scale * factor
            shift = None if shift is None else shift * factor
    else:
        return None
    if not _holds(linear.original, scale) or not _holds(np.ones(1, output.dtype), shift):
        return None
    return Linear(linear.layer._replace(output=output), linear.original, scale, shift)


def _holds(original: Any, factor: np.ndarray | None) -> bool:
    """Whether the type of an array can hold its product with a factor, neither overflowing nor losing digits."""
    if factor is None:
        return True
    limits = jnp.finfo(original.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = np.abs(np.asarray(original, np.float64) * factor)
    return bool(np.isfinite(factor).all() and (sizes <= float(limits.max)).all() and _no_denormals(sizes, limits))


def _no_denormals(sizes: np.ndarray, limits: Any) -> bool:
    return not ((sizes > 0) & (sizes < float(limits.tiny))).any()
