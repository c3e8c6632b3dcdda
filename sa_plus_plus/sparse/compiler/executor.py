"""A network without its weights as a program of executable steps, and how to run it."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.compiler.depthwise import CompiledDepthwise, DepthwiseKernel, lower_depthwise
from sa_plus_plus.sparse.compiler.encodings import assign_encodings, keeps_type
from sa_plus_plus.sparse.compiler.ir import Constant, Layer, LayerSpec, Step, Traced, Value, Variable, users_of
from sa_plus_plus.sparse.compiler.lowering import CompiledLayer, Ranges, lower_in_network
from sa_plus_plus.sparse.compiler.planned import PackedKernel, PlannedStep
from sa_plus_plus.sparse.compiler.quantization import Encoding, convert
from sa_plus_plus.sparse.compiler.sequences import run_joined
from sa_plus_plus.sparse.ops.activation import activate
from sa_plus_plus.sparse.ops.convolution import block_sparse_conv
from sa_plus_plus.sparse.ops.matmul import Implementation, block_sparse_matmul

_INLINE = 1024  # size up to which a constant is compiled into the program rather than passed to it


class Program(NamedTuple):
    """A network without its weights.

    Attributes:
      inputs: its arguments' leaves.
      steps: operations, layers that run as traced or in another implementation, and compiled layers.
      outputs: its results' leaves.
      input_tree: the structure of its arguments.
      output_tree: that of its result.
      encodings: of each value that is not encoded as traced.
      implementation: of sparse layers that are not compiled.
      pieces: number of pieces of a batch; each goes through the whole network before the next.
    """

    inputs: Sequence[Variable]
    steps: Sequence[Step | LayerSpec | CompiledLayer | CompiledDepthwise]
    outputs: Sequence[Value]
    input_tree: Any
    output_tree: Any
    encodings: dict[Variable, Encoding]
    implementation: Implementation | None = None
    pieces: int = 1


def assemble(
    traced: Traced,
    planned: Sequence[PlannedStep],
    ranges: Ranges,
    implementation: Implementation | None = None,
    pieces: int = 1,
) -> tuple[Program, list[Any]]:
    """The network without its weights, so that no kernel is kept in full beside its blocks; and the weights.

    Args:
      traced: the network.
      planned: its steps.
      ranges: smallest and largest of each value that a step takes in uint8.
      implementation: of sparse layers that are not compiled.
      pieces: of a batch.
    """
    encodings = assign_encodings(planned, traced.outputs, ranges)
    users = users_of([p.step for p in planned], traced.outputs)
    steps: list[Any] = []
    weights: list[Any] = []
    for number, (step, kernel, _) in enumerate(planned):
        if isinstance(kernel, PackedKernel):
            compiled, arrays = lower_in_network(step, kernel, encodings, ranges)
            residual = step.spec.residual
            last_use = residual is not None and residual not in traced.inputs and max(users[residual]) == number
            steps.append(compiled._replace(in_place=last_use and residual != step.spec.x))
        elif isinstance(kernel, DepthwiseKernel):
            depthwise, arrays = lower_depthwise(step, kernel)
            steps.append(depthwise)
        elif isinstance(step, Layer):
            steps.append(step.spec)
            arrays = (step.kernel if kernel is None else kernel, step.bias)
        else:
            inputs = [v if isinstance(v, Variable) or _small(v) else Constant(None, v.shape) for v in step.inputs]
            steps.append(step._replace(inputs=tuple(inputs)))
            arrays = tuple(v.full for v in step.inputs if isinstance(v, Constant) and not _small(v))
        weights.append(arrays)
    ends = traced.outputs, traced.input_tree, traced.output_tree
    return Program(traced.inputs, steps, *ends, encodings, implementation, pieces), weights


def _small(constant: Constant) -> bool:
    random_keys = isinstance(constant.value, jax.Array) and jnp.issubdtype(constant.dtype, jax.dtypes.extended)
    return random_keys or int(np.prod(constant.shape)) <= _INLINE  # files have no type for keys among the weights


class Values:
    """The values computed so far, each as it is encoded and in the encodings that were requested."""

    def __init__(self, encodings: dict[Variable, Encoding]):
        self._encodings = encodings
        self._arrays: dict[tuple[Variable, Encoding], Any] = {}

    def encoding(self, value: Variable) -> Encoding:
        return self._encodings.get(value, Encoding(value.dtype))

    def put(self, value: Variable, array: Any) -> None:
        self._arrays[value, self.encoding(value)] = array

    def get(self, value: Variable, encoding: Encoding | None = None) -> Any:
        """The value in the requested encoding, by default as traced."""
        want, have = encoding or Encoding(value.dtype), self.encoding(value)
        if (value, want) not in self._arrays:
            self._arrays[value, want] = convert(self._arrays[value, have], have, want)
        return self._arrays[value, want]


def run(program: Program, weights: Sequence[Any], *inputs: Any) -> Any:
    """The network's results, piece by piece of the batch.

    Args:
      program: the network.
      weights: those that `assemble` returned with it.
      *inputs: the network's arguments.
    """
    run_once = functools.partial(run_joined, functools.partial(_run_once, program))
    if program.pieces == 1:
        return run_once(weights, inputs)
    pieces = jax.tree.map(lambda x: jnp.reshape(x, (program.pieces, -1, *x.shape[1:])), inputs)
    results = jax.lax.map(lambda piece: run_once(weights, piece), pieces)
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), results)


def _run_once(program: Program, weights: Sequence[Any], inputs: Any) -> Any:
    values = evaluate(program, weights, inputs)
    results = [values.get(v) if isinstance(v, Variable) else v.full for v in program.outputs]
    return jax.tree.unflatten(program.output_tree, results)


def evaluate(program: Program, weights: Sequence[Any], inputs: Any) -> Values:
    """All values of a network."""
    values = Values(program.encodings)
    for variable, leaf in zip(program.inputs, jax.tree.leaves(inputs), strict=True):
        values.put(variable, leaf)
    for step, arrays in zip(program.steps, weights, strict=True):
        if isinstance(step, CompiledLayer | CompiledDepthwise):
            residual = None if step.residual is None else values.get(step.spec.residual, step.residual)  # type: ignore[arg-type]
            values.put(step.spec.output, step.run(values.get(step.spec.x, step.x), residual, *arrays))
        elif isinstance(step, LayerSpec):
            values.put(step.output, _run_layer(step, values, arrays, program.implementation))
        else:
            for variable, result in zip(step.outputs, _run_operation(step, values, arrays), strict=True):
                values.put(variable, result)
    return values


def _run_layer(spec: LayerSpec, values: Values, weights: tuple[Any, Any], implementation: Any) -> Any:
    (kernel, bias), x = weights, values.get(spec.x)
    residual = None if spec.residual is None else values.get(spec.residual)
    if isinstance(kernel, BlockSparse):
        return run_by_blocks(spec, x, kernel, bias, residual, implementation)
    return spec.run(x, kernel, bias, residual)


def _run_operation(step: Step, values: Values, constants: Sequence[Any]) -> Sequence[Any]:
    encoding = values.encoding(step.outputs[0]) if keeps_type(step) else None
    rest = iter(constants)

    def argument(value: Value) -> Any:
        if isinstance(value, Variable):
            return values.get(value, encoding)
        return jnp.asarray(value.full) if _small(value) else next(rest)

    return step.run(*map(argument, step.inputs))


def run_by_blocks(
    spec: LayerSpec, x: Any, w: BlockSparse, bias: Any, residual: Any, implementation: Implementation | None
) -> Any:
    """A layer by its blocks in an implementation other than the compiled kernel."""
    relu = spec.activation == "relu" and residual is None
    options: dict[str, Any] = {"bias": bias, "relu": relu, "implementation": implementation}
    if spec.conv is not None:
        strides, padding = spec.conv["window_strides"], spec.conv["padding"]
        y = block_sparse_conv(x, w, strides=strides, padding=padding, **options)
    else:
        y = block_sparse_matmul(x.reshape(spec.rows, w.shape[0]), w, **options).reshape(spec.output.shape)
    if residual is not None:
        y = y + residual
    return y if relu else activate(spec.activation, y)
