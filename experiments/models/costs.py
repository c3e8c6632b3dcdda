"""The cost of running a network."""

import math
from typing import Any

import flax.linen as nn
import jax

import sa_plus_plus as sapp


def multiply_adds(model: nn.Module, variables: Any, x: Any) -> dict[str, int]:
    """Multiply-adds of each convolution and dense layer for one example, by the path of its kernel.

    Nothing is computed. Each weight is used once at every position of the result.

    Args:
      model: a flax linen module.
      variables: its parameters and what else it carries, arrays or shapes.
      x: an input `(batch, ...)`, an array or its shape.
    """

    def results(variables: Any, x: Any) -> Any:
        captured = model.apply(variables, x, mutable=["intermediates"], capture_intermediates=_is_layer)
        return captured[1]["intermediates"]

    shapes = jax.eval_shape(results, variables, x)
    kernels = {sapp.path_string(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])}
    costs: dict[str, int] = {}
    for path, result in jax.tree_util.tree_leaves_with_path(shapes):
        kernel = sapp.path_string(path).split("/__call__")[0] + "/kernel"
        positions = math.prod(result.shape[1:-1])
        costs[kernel] = costs.get(kernel, 0) + positions * math.prod(kernels[kernel].shape)
    return costs


def _is_layer(module: nn.Module, method: str) -> bool:
    return isinstance(module, nn.Conv | nn.Dense) and method == "__call__"
