"""A network without its weights: steps, how values are held between them, and how to run them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sa_plus_plus.sparse.lowering as lowering
from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.attention import Attention
from sa_plus_plus.sparse.convolution import block_sparse_conv
from sa_plus_plus.sparse.forms import Form, converted, forms_of, keeps_type
from sa_plus_plus.sparse.lowering import Compiled
from sa_plus_plus.sparse.matmul import Implementation, block_sparse_matmul
from sa_plus_plus.sparse.steps import Call, Constant, Layer, Linear, Traced, Variable, activate, users_of

_INLINE = 1024  # size up to which a constant is compiled into the program rather than passed to it


class Program(NamedTuple):
    """A network without its weights.

    Attributes:
      traced: its steps: calls, layers that run as traced or in another implementation, and compiled ones.
      forms: the form of each value that is not held as traced.
      implementation: of sparse layers that are not compiled.
      compiles: whether any step runs in the compiled kernel, so that the program needs a CPU for which it was built.
      pieces: number of pieces of a batch, each of which goes through the whole network before the next.
    """

    traced: Traced[Call | Layer | Compiled]
    forms: dict[Variable, Form]
    implementation: Implementation | None
    compiles: bool
    pieces: int = 1


def assembled(
    traced: Traced[Call | Linear], kernels: Sequence[Any], ranges: Any, implementation: Implementation | None
) -> tuple[Program, list[Any]]:
    """The network without its weights, so that no kernel is kept in full beside its blocks; and the weights."""
    types = {i: kernel.dtype for i, kernel in enumerate(kernels) if isinstance(kernel, lowering.Packed)}
    forms = forms_of(traced, types, ranges)
    steps: list[Any] = []
    weights: list[Any] = []
    users = users_of(traced.steps, traced.outputs)
    for number, (step, kernel) in enumerate(zip(traced.steps, kernels, strict=True)):
        if isinstance(kernel, lowering.Packed):
            assert isinstance(step, Linear)
            compiled, needs = lowering.assembled(step, kernel, forms, ranges)
            residual = step.layer.residual
            gone = residual is not None and residual not in traced.inputs and max(users[residual]) == number
            steps.append(compiled._replace(in_place=gone and residual != step.layer.x))
            weights.append(needs)
        else:
            steps.append(_without_weights(step))
            weights.append(_needs(step, kernel))
    program = Traced(traced.inputs, steps, traced.outputs, traced.input_tree, traced.tree)
    compiles = bool(types) or any(isinstance(step, Attention) for step in steps)
    return Program(program, forms, implementation, compiles), weights


def _needs(step: Call | Linear, form: BlockSparse | None) -> Any:
    """The arrays that a step needs besides its variables."""
    if isinstance(step, Linear):
        return (step.kernel if form is None else form, step.bias)
    return [value.full for value in step.inputs if isinstance(value, Constant) and not _small(value)]


def _without_weights(step: Call | Linear) -> Call | Layer:
    """The step as a function of the arrays of `_needs`."""
    if isinstance(step, Linear):
        return step.layer
    values = (v if isinstance(v, Variable) or _small(v) else Constant(None, v.shape) for v in step.inputs)
    return step._replace(inputs=tuple(values))


def _small(constant: Constant) -> bool:
    random_keys = isinstance(constant.value, jax.Array) and jnp.issubdtype(constant.value.dtype, jax.dtypes.extended)
    return random_keys or int(np.prod(constant.shape)) <= _INLINE  # files have no type for keys among the weights


class Values:
    """The values computed so far, each as it is held and in the forms that were requested."""

    def __init__(self, forms: dict[Variable, Form]):
        self.forms = forms
        self.held: dict[tuple[Variable, Form], Any] = {}

    def form(self, value: Variable) -> Form:
        return self.forms.get(value, Form(value.dtype))

    def put(self, value: Variable, array: Any) -> None:
        self.held[value, self.form(value)] = array

    def get(self, value: Variable, form: Form | None = None) -> Any:
        """The value in the requested form, by default as traced."""
        want, have = form or Form(value.dtype), self.form(value)
        if (value, want) not in self.held:
            self.held[value, want] = converted(self.held[value, have], have, want)
        return self.held[value, want]


def run(program: Program, weights: Sequence[Any], *inputs: Any) -> Any:
    if program.pieces == 1:
        return _run_once(program, weights, inputs)
    pieces = jax.tree.map(lambda x: jnp.reshape(x, (program.pieces, -1, *x.shape[1:])), inputs)
    results = jax.lax.map(lambda piece: _run_once(program, weights, piece), pieces)
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), results)


def _run_once(program: Program, weights: Sequence[Any], inputs: Any) -> Any:
    traced = program.traced
    values = computed(program, weights, inputs)
    results = [values.get(v) if isinstance(v, Variable) else v.full for v in traced.outputs]
    return jax.tree.unflatten(traced.tree, results)


def computed(program: Program, weights: Sequence[Any], inputs: Any) -> Values:
    values = Values(program.forms)
    for variable, leaf in zip(program.traced.inputs, jax.tree.leaves(inputs), strict=True):
        values.put(variable, leaf)
    for step, given in zip(program.traced.steps, weights, strict=True):
        if isinstance(step, Compiled):
            residual = None if step.residual is None else values.get(step.layer.residual, step.residual)  # type: ignore[arg-type]
            values.put(step.layer.output, step.run(values.get(step.layer.x, step.x), residual, *given))
        elif isinstance(step, Layer):
            kernel, bias = given
            x, residual = values.get(step.x), None if step.residual is None else values.get(step.residual)
            if isinstance(kernel, BlockSparse):
                y = by_blocks(step, x, kernel, bias, residual, program.implementation)
            else:
                y = step.dense(x, kernel, bias, residual)
            values.put(step.output, y)
        else:
            rest = iter(given)
            kept = keeps_type(step) and values.form(step.outputs[0]) if step.outputs else None
            arguments = [
                values.get(v, kept or None)
                if isinstance(v, Variable)
                else jnp.asarray(v.full)
                if _small(v)
                else next(rest)
                for v in step.inputs
            ]
            pools = program.compiles and isinstance(step, Call) and arguments
            fast = lowering.pooled(step, arguments[0]) if pools else None
            for variable, result in zip(step.outputs, step.run(*arguments) if fast is None else [fast], strict=True):
                values.put(variable, result)
    return values


def by_blocks(layer: Layer, x: Any, w: BlockSparse, bias: Any, residual: Any, implementation: Any) -> Any:
    """Run a layer by its blocks in an implementation other than the compiled kernel."""
    relu = layer.activation == "relu" and residual is None
    if layer.call is not None:
        strides, padding = layer.call.options["window_strides"], layer.call.options["padding"]
        y = block_sparse_conv(
            x, w, strides=strides, padding=padding, bias=bias, relu=relu, implementation=implementation
        )
    else:
        x = x.reshape(layer.rows, w.shape[0])
        y = block_sparse_matmul(x, w, bias=bias, relu=relu, implementation=implementation)
        y = y.reshape(layer.output.shape)
    if residual is not None:
        y = y + residual
    return y if relu else activate(layer.activation, y)


def described(layer: Layer) -> str:
    if layer.call is None:
        return "dense"
    options = layer.call.options
    window = "×".join(str(n) for n in layer.kernel.shape[:-2])
    strides = "×".join(map(str, options["window_strides"]))
    return f"convolution {window}" + (f", strides {strides}" if set(options["window_strides"]) != {1} else "")
