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
    """A product with a kernel whose output channels come last, without its weights: `relu?(x @ kernel + bias)`.

    Attributes:
      call: the dense layer or convolution, as JAX traced it, of `x` and a kernel.
      x: what is multiplied.
      kernel: shape and dtype of the kernel; its last axis are the output channels.
      relu: whether `max(., 0)` follows.
      output: the result, after all of them.
    """

    call: Call
    x: Variable
    kernel: jax.ShapeDtypeStruct
    relu: bool
    output: Variable

    @property
    def is_convolution(self) -> bool:
        return self.call.primitive.name == "conv_general_dilated"

    def dense(self, x: Any, kernel: Any, bias: Any) -> Any:
        """Run it as it was traced."""
        (y,) = self.call.run(x, kernel)
        if bias is not None:
            y = y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
        return jax.nn.relu(y) if self.relu else y


class Linear(NamedTuple):
    """A layer with its weights: `relu?(x @ (scale * original) + shift)`.

    Attributes:
      layer: what it does.
      original: the kernel as it was.
      scale: `(channels,)` float64, or None: what to multiply it by.
      shift: `(channels,)` float64, or None.
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
        self.calls: list[Call] = []
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
        outputs = tuple(self.variable(v.aval) for v in eqn.outvars)
        self.calls.append(Call(eqn.primitive, eqn.params, tuple(values), outputs))
        return outputs


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


def _folded(calls: list[Call], outputs: list[Value]) -> list[Call | Linear]:
    """Products with kernels as `Linear`, with all that may be folded into them."""
    uses: dict[Value, int] = {}
    for value in [*(value for call in calls for value in call.inputs), *outputs]:
        if isinstance(value, Variable):
            uses[value] = uses.get(value, 0) + 1
    steps: list[Call | Linear] = []
    open_ends: dict[Value, tuple[int, Linear]] = {}  # by result: products, and where in `steps`, that nobody else sees
    for call in calls:
        if linear := _linear(call):
            open_ends[linear.layer.output] = len(steps), linear
            steps.append(linear)
            continue
        at = next((i for i, v in enumerate(call.inputs) if isinstance(v, Variable) and v in open_ends), None)
        if at is None or uses[call.inputs[at]] > 1:
            steps.append(call)
            continue
        place, linear = open_ends[call.inputs[at]]
        folded = _folded_into(linear, call, at)
        if folded is None:
            steps.append(call)
            continue
        steps[place] = folded
        if not folded.layer.relu:
            open_ends[folded.layer.output] = place, folded
    return steps


def _linear(call: Call) -> Linear | None:
    """A product of something variable with a constant kernel whose output channels are last in kernel and result."""
    if len(call.inputs) != 2 or isinstance(call.inputs[0], Constant) or isinstance(call.inputs[1], Variable):
        return None
    x, kernel = call.inputs
    assert isinstance(x, Variable)
    assert isinstance(kernel, Constant)
    name, options = call.primitive.name, call.options
    if name == "dot_general":
        (left, right), batch = options["dimension_numbers"]
        n = len(right)
        matches = tuple(left) == tuple(range(len(x.shape) - n, len(x.shape))) and tuple(right) == tuple(range(n))
        if n < 1 or any(batch) or not matches or len(kernel.shape) != n + 1:
            return None
    elif name == "conv_general_dilated":
        numbers, last = options["dimension_numbers"], len(x.shape) - 1
        channels_last = (numbers.lhs_spec[1], numbers.rhs_spec[0], numbers.out_spec[1]) == (last, last, last)
        if not channels_last or options["batch_group_count"] != 1:
            return None
    else:
        return None
    (output,) = call.outputs
    if not jnp.issubdtype(kernel.value.dtype, jnp.floating) or not jnp.issubdtype(output.dtype, jnp.floating):
        return None
    shape = jax.ShapeDtypeStruct(kernel.shape, kernel.value.dtype)
    return Linear(Layer(call._replace(inputs=(x,)), x, shape, False, output), kernel.full)


def _folded_into(linear: Linear, call: Call, at: int) -> Linear | None:
    """A product together with an operation on its result, if that changes no more than the rounding of its last digit.

    So nothing is folded across a change of type, where a network may mean to round, nor into types of few digits.
    """
    if len(call.outputs) != 1 or len(call.inputs) != 2:
        return None
    (output,), (other,) = call.outputs, call.inputs[:at] + call.inputs[at + 1 :]
    layer = linear.layer
    if (output.shape, output.dtype) != (layer.output.shape, layer.output.dtype) or isinstance(other, Variable):
        return None
    value = np.asarray(other.value)
    if call.primitive.name == "max" and value.size == 1 and not value.any():
        return linear._replace(layer=layer._replace(relu=True, output=output))
    if value.size != (value.shape or (1,))[-1]:  # it varies along another axis than the channels
        return None
    if output.dtype not in (np.float32, np.float64) or layer.kernel.dtype != output.dtype:
        return None
    return _affine(linear, call.primitive.name, at, value, output)


def _affine(linear: Linear, name: str, at: int, value: np.ndarray, output: Variable) -> Linear | None:
    """`y + c`, `y - c`, `c - y`, `y * c` or `y / c`, with a `c` for each channel or for all."""
    c = np.broadcast_to(value.reshape(-1).astype(np.float64), output.shape[-1:])
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
