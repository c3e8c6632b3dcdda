"""The intermediate representation of a network: values, operations, and layers with and without their weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.ops.activation import Activation, activate


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
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def full(self) -> jax.Array:
        return jnp.broadcast_to(self.value, self.shape)


Value = Variable | Constant


class Call(NamedTuple):
    """Any operation as JAX traced it."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Variable, ...]

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name

    def with_inputs(self, inputs: Sequence[Value]) -> "Call":
        return self._replace(inputs=tuple(inputs))

    def run(self, *inputs: Any) -> Any:
        results = self.primitive.bind(*inputs, **self.primitive.get_bind_params(self.params))
        return results if self.primitive.multiple_results else [results]


class LayerSpec(NamedTuple):
    """A layer without its weights: `activation(x @ kernel + bias + residual)`.

    Attributes:
      conv: parameters of `lax.conv_general_dilated_p`, channels last in images, kernel and result; None for a matmul.
      x: the left operand: images, or `(..., K)` with the contracted axes last.
      kernel: shape and dtype of the kernel: `(K, N)` of a product, otherwise the convolution's, outputs last.
      output: the result, after all of the above.
      columns: the last axes of the output, which hold the `N` columns.
      activation: applied last.
      residual: added before the activation, of the output's shape, or None.
      precision: of a matmul, as in `jax.lax.dot_general`.
    """

    conv: dict[str, Any] | None
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

    @property
    def depthwise(self) -> bool:
        """Whether each of several channels is convolved alone."""
        return self.conv is not None and 1 < self.conv["feature_group_count"] == self.x.shape[-1]

    @property
    def description(self) -> str:
        """What it is, for people: `convolution 3×3, strides 2×2`."""
        if self.conv is None:
            return "dense"
        window = "×".join(str(n) for n in self.kernel.shape[:-2])
        strides = "×".join(map(str, self.conv["window_strides"]))
        kind = "depthwise convolution" if self.depthwise else "convolution"
        return f"{kind} {window}" + (f", strides {strides}" if set(self.conv["window_strides"]) != {1} else "")

    @property
    def name(self) -> str:
        """The description and the fused operations: `dense, residual, relu`."""
        absorbed = ["residual"] * (self.residual is not None) + [self.activation] * (self.activation != "none")
        return ", ".join([self.description, *absorbed])

    def run(self, x: Any, kernel: Any, bias: Any, residual: Any = None) -> Any:
        """The layer as it was traced."""
        if self.conv is None:
            y = jax.lax.dot_general(
                x.reshape(self.rows, self.kernel.shape[0]),
                kernel,
                (((1,), (0,)), ((), ())),
                precision=self.precision,
                preferred_element_type=self.output.dtype,
            ).reshape(self.output.shape)
        else:
            y = jax.lax.conv_general_dilated_p.bind(x, kernel, **self.conv)
        if bias is not None:
            y = y + jnp.reshape(bias, (1,) * (y.ndim - len(self.columns)) + self.columns)
        if residual is not None:
            y = y + residual
        return activate(self.activation, y)


class Layer(NamedTuple):
    """A layer with its weights: `activation(x @ (scale * original) + shift + residual)`.

    Attributes:
      spec: the layer without its weights.
      original: the original kernel.
      scale: `(N,)` float64, or None: its factor.
      shift: `(N,)` float64, or None.
      origin: of the entries of `original`, if they come from a leaf whose kernels are searched for.
      leaves: paths of all such leaves from which `original` is computed.
    """

    spec: LayerSpec
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
        scaled = np.asarray(self.original, np.float64) * self.scale
        return jax.device_put(scaled.astype(self.original.dtype))  # jnp.asarray compiles a copy for each shape

    @property
    def bias(self) -> jax.Array | None:
        """The shift in the kernel's type."""
        return None if self.shift is None else jax.device_put(self.shift.astype(self.original.dtype))

    @property
    def inputs(self) -> tuple[Variable, ...]:
        spec = self.spec
        return (spec.x,) if spec.residual is None else (spec.x, spec.residual)

    @property
    def outputs(self) -> tuple[Variable]:
        return (self.spec.output,)

    def with_inputs(self, inputs: Sequence[Any]) -> "Layer":
        return self._replace(spec=self.spec._replace(x=inputs[0], residual=inputs[1] if len(inputs) > 1 else None))


Step = Any  # `Call`, `Layer`, or another tuple with `inputs` and `outputs`


class Traced(NamedTuple):
    """A traced network.

    Attributes:
      inputs: its arguments' leaves.
      steps: in the order in which they can be run.
      outputs: its results' leaves.
      input_tree: the structure of its arguments.
      output_tree: that of its result.
    """

    inputs: Sequence[Variable]
    steps: Sequence[Step]
    outputs: Sequence[Value]
    input_tree: Any
    output_tree: Any

    @property
    def layers(self) -> list[Layer]:
        return [step for step in self.steps if isinstance(step, Layer)]


def variables(step: Step) -> list[Variable]:
    """The values that a step takes and that depend on the network's inputs."""
    return [v for v in step.inputs if isinstance(v, Variable)]


def leaves_of(step: Step) -> frozenset[str]:
    """Paths of the leaves whose kernels are searched for from which a step's constants are computed."""
    if isinstance(step, Layer):
        return step.leaves
    return frozenset[str]().union(*(v.leaves for v in step.inputs if isinstance(v, Constant)))


def users_of(steps: Sequence[Step], outputs: Sequence[Value]) -> dict[Variable, list[int]]:
    """By value, the numbers of the steps that take it; `len(steps)` means the network's result."""
    users: dict[Variable, list[int]] = {}
    for number, step in enumerate(steps):
        for value in variables(step):
            users.setdefault(value, []).append(number)
    for result in outputs:
        if isinstance(result, Variable):
            users.setdefault(result, []).append(len(steps))
    return users


def live(steps: Sequence[Step], outputs: Sequence[Value]) -> list[Step]:
    """The steps without those whose results are not used, except callbacks and steps without results."""
    needed, kept = {v for v in outputs if isinstance(v, Variable)}, []
    for step in reversed(steps):
        calls_back = isinstance(step, Call) and "callback" in step.name
        if not step.outputs or calls_back or not needed.isdisjoint(step.outputs):
            needed.update(variables(step))
            kept.append(step)
    return kept[::-1]
