"""The parts of a traced network: values, operations, and layers with and without their weights."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np


class Variable(NamedTuple):
    """A value that depends on the inputs."""

    number: int
    shape: tuple[int, ...]
    dtype: np.dtype


class Origin(NamedTuple):
    """The place in a parameter tree from which the entries of a constant come.

    Attributes:
      path: of the leaf.
      positions: int32, of the shape of the constant's `value`: the place of each entry in the flattened leaf.
    """

    path: str
    positions: Any


class Constant(NamedTuple):
    """A value that does not depend on the inputs.

    Attributes:
      value: of the same rank as `shape`, with 1 for axes along which it is constant.
      shape: the full shape.
      origin: of its entries, if they come from a leaf whose kernels are searched for, at most rearranged.
      leaves: paths of all such leaves from which it is computed.
    """

    value: Any
    shape: tuple[int, ...]
    origin: Origin | None = None
    leaves: frozenset[str] = frozenset()

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


Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]


def activate(activation: Activation, y: Any) -> Any:
    """The activation function of a value."""
    functions: dict[str, Callable[[Any], Any]] = {
        "relu": jax.nn.relu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "silu": jax.nn.silu,
    }
    return y if activation == "none" else functions[activation](y)


class Layer(NamedTuple):
    """A product with a kernel, without its weights: `activation(x @ kernel + bias + residual)`.

    Attributes:
      call: the convolution of `x` and a kernel as JAX traced it; None for a matmul.
      x: the left operand: images, or `(..., K)` with the contracted axes last.
      kernel: shape and dtype of the kernel: `(K, N)` of a product, otherwise the convolution's, outputs last.
      output: the result, after all of the above.
      columns: the last axes of the output, which hold the `N` columns.
      activation: applied last.
      residual: added before the activation, of the output's shape, or None.
      precision: of a matmul, as in `jax.lax.dot_general`.
    """

    call: Call | None
    x: Variable
    kernel: jax.ShapeDtypeStruct
    output: Variable
    columns: tuple[int, ...]
    activation: Activation = "none"
    residual: Variable | None = None
    precision: Any = None

    @property
    def rows(self) -> int:
        """Number of rows that are multiplied with the kernel's matrix."""
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
        return activate(self.activation, y)


class Linear(NamedTuple):
    """A layer with its weights: `activation(x @ (scale * original) + shift + residual)`.

    Attributes:
      layer: what it does.
      original: the original kernel.
      scale: `(N,)` float64, or None: its factor.
      shift: `(N,)` float64, or None.
      origin: of the entries of `original`, if they come from a leaf whose kernels are searched for.
      leaves: paths of all such leaves from which `original` is computed.
    """

    layer: Layer
    original: Any
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    origin: Origin | None = None
    leaves: frozenset[str] = frozenset()

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


def inputs_of(step: Call | Linear) -> list[Variable]:
    """The values that a step takes."""
    if isinstance(step, Linear):
        return [v for v in (step.layer.x, step.layer.residual) if v is not None]
    return [v for v in step.inputs if isinstance(v, Variable)]


def leaves_of(step: Call | Linear) -> frozenset[str]:
    """Paths of the leaves whose kernels are searched for from which a step's constants are computed."""
    if isinstance(step, Linear):
        return step.leaves
    return frozenset[str]().union(*(v.leaves for v in step.inputs if isinstance(v, Constant)))


def users_of(steps: Sequence[Call | Linear], outputs: Sequence[Value]) -> dict[Variable, list[int]]:
    """By value, the numbers of the steps that take it; `len(steps)` means the network's result."""
    users: dict[Variable, list[int]] = {}
    for number, step in enumerate(steps):
        for value in inputs_of(step):
            users.setdefault(value, []).append(number)
    for result in outputs:
        if isinstance(result, Variable):
            users.setdefault(result, []).append(len(steps))
    return users


def live(steps: Sequence[Step], outputs: Sequence[Value]) -> list[Step]:
    """The steps without those whose results are not used, except callbacks and steps without results."""
    needed, kept = {v for v in outputs if isinstance(v, Variable)}, []
    for step in reversed(steps):
        results = (step.layer.output,) if isinstance(step, Linear) else step.outputs  # type: ignore[attr-defined]
        calls_back = isinstance(step, Call) and "callback" in step.primitive.name
        if not results or calls_back or not needed.isdisjoint(results):
            needed.update(inputs_of(step))  # type: ignore[arg-type]
            kept.append(step)
    return kept[::-1]


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
