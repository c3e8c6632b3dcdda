"""Tracing of a function to the list of steps that depend on its inputs; constant expressions are computed."""

from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import numpy as np

from sa_plus_plus.planning import path_string
from sa_plus_plus.sparse.compiler.builder import Builder, walk
from sa_plus_plus.sparse.compiler.constants import constant
from sa_plus_plus.sparse.compiler.ir import Constant, Origin, Traced, Value
from sa_plus_plus.sparse.compiler.unsupported import unrolls


def trace(fn: Callable[..., Any], *examples: Any) -> Traced:
    """Trace a function on arguments of given shapes; its weights are closed over.

    Custom derivatives are dropped: the trace is for inference.

    Args:
      fn: jittable.
      examples: arrays, or their shapes and dtypes.
    """
    closed, result = jax.make_jaxpr(fn, return_shape=True)(*examples)
    if any(isinstance(constant, jax.core.Tracer) for constant in closed.consts):
        raise TypeError("weights must have values to look at: specialize a network outside jit, vmap and grad")
    return recorded(closed, (), jax.tree.structure(examples), jax.tree.structure(result))


def tracer_with_origins(
    fn: Callable[..., Any], params: Any, paths: Container[str], *examples: Any
) -> Callable[[Any], Traced]:
    """Trace a function whose weights are its first argument, as constants whose entries have an origin.

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
    structures = jax.tree.structure(examples), jax.tree.structure(result)

    def leaf(path: str, leaf: Any) -> Constant:
        if path not in paths:
            return constant(leaf)
        positions = np.arange(np.size(leaf), dtype=np.int32).reshape(np.shape(leaf))
        return Constant(leaf, np.shape(leaf), Origin(path, positions), frozenset({path}))

    def traced(params: Any) -> Traced:
        weights = [leaf(path_string(keys), x) for keys, x in jax.tree_util.tree_leaves_with_path(params)]
        return recorded(closed, weights, *structures)

    return traced


def recorded(closed: Any, weights: Sequence[Constant], input_tree: Any, output_tree: Any) -> Traced:
    """The steps of a jaxpr whose first arguments are the weights.

    Args:
      closed: of a function's leaves.
      weights: its first arguments; the others are inputs.
      input_tree: the structure of the inputs.
      output_tree: that of the results.
    """
    builder = Builder()
    inputs = [builder.variable(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars[len(weights) :]]

    def apply(eqn: Any, values: list[Value]) -> Sequence[Value]:
        known = all(isinstance(value, Constant) for value in values)
        unroll = not known and unrolls(eqn, values)
        return _unrolled(builder, eqn, values, apply) if unroll else builder.equation(eqn, values)

    outputs = walk(closed, [*weights, *inputs], apply)
    return Traced(inputs, builder.steps, outputs, input_tree, output_tree)


def _unrolled(builder: Builder, eqn: Any, values: list[Value], apply: Any) -> list[Value]:
    """The steps of a loop one after another."""
    params = eqn.params
    first, length = params["num_consts"] + params["num_carry"], params["length"]
    consts, carry, over = values[: params["num_consts"]], values[params["num_consts"] : first], values[first:]
    results: dict[int, list[Value]] = {}
    for i in reversed(range(length)) if params["reverse"] else range(length):
        inputs = [*consts, *carry, *(builder.item(value, i) for value in over)]
        outputs = walk(params["jaxpr"], inputs, apply)
        carry, results[i] = outputs[: len(carry)], outputs[len(carry) :]
    columns = zip(*(results[i] for i in range(length)), strict=True)
    return [*carry, *(builder.stack(column) for column in columns)]
