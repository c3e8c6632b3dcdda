"""From a function to steps with layers: the trace, and the passes that follow it whatever the target is."""

from collections.abc import Callable, Container
from typing import Any

from sa_plus_plus.sparse.compiler.ir import Traced, live
from sa_plus_plus.sparse.compiler.passes.find_layers import find_layers
from sa_plus_plus.sparse.compiler.passes.fold_affine import fold_affine
from sa_plus_plus.sparse.compiler.passes.fuse_activation import fuse_activations
from sa_plus_plus.sparse.compiler.passes.transpose import merge_transpositions
from sa_plus_plus.sparse.compiler.trace import trace, tracer_with_origins


def layers_fused(fn: Callable[..., Any], *examples: Any) -> Traced:
    """A network with its weights closed over, as layers fused with what follows them.

    Args:
      fn: jittable.
      examples: arrays, or their shapes and dtypes.
    """
    return fuse_activations(fold_affine(merge_transpositions(find_layers(trace(fn, *examples)))))


def layer_tracer(fn: Callable[..., Any], params: Any, paths: Container[str], *examples: Any) -> Callable[[Any], Traced]:
    """A network whose weights are its first argument; each layer has the origin of its kernel. Nothing is fused.

    Args:
      fn: `fn(params, *inputs)`, jittable.
      params: tree of arrays.
      paths: of the leaves whose kernels are searched for.
      examples: inputs, or their shapes and dtypes.

    Returns:
      A function from parameters to the network with these. The steps and values of any two results have the same
      numbers; only constants differ.
    """
    trace = tracer_with_origins(fn, params, paths, *examples)

    def layers(params: Any) -> Traced:
        traced = merge_transpositions(find_layers(trace(params)))
        return traced._replace(steps=live(traced.steps, traced.outputs))

    return layers
