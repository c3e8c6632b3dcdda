"""Pruned kernels without the inputs, outputs, heads or filters that are entirely zero."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.checks import planned_kernels
from sa_plus_plus.planning import LeafPlan, Plan, map_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shrunk:
    """A dense kernel restricted, along each axis, to the indices that are not entirely zero.

    Attributes:
      kernel: the smaller kernel, with the same number of axes.
      indices: int32, one array per axis: the kept indices, ascending.
      shape: shape of the whole kernel.
    """

    kernel: jax.Array
    indices: tuple[jax.Array, ...]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def todense(self) -> jax.Array:
        """The whole kernel, zeros where nothing is kept."""
        return jnp.zeros(self.shape, self.kernel.dtype).at[jnp.ix_(*self.indices)].set(self.kernel)


def shrink(params: Any, plan: Plan) -> Any:
    """The same tree with each pruned kernel that has whole slices of zeros as a smaller dense one, `Shrunk`.

    For kernels that were pruned in groups: `block=(1, None)` removes inputs, `(None, 1)` outputs (neurons, filters),
    and `(None, head_dim)` heads. A dense layer `x @ w` becomes

        x[..., w.indices[0]] @ w.kernel    # outputs w.indices[1]; the others are zero

    Exact: only zero weights are removed. Kernels in which every slice has a nonzero weight, and leaves that are not
    pruned, stay as they are.

    Args:
      params: the result of `Sparsifier.finalize`, or of the loop around `sparsify`.
      plan: `sp.plan(params)`.

    Raises:
      ValueError: if a layer of the plan is missing from the tree or has another shape.
      TypeError: under `jax.jit`, where weights have no values to look at.

    >>> import sa_plus_plus as sapp
    >>> kernel = jnp.zeros((4, 3)).at[1].set(1.0)
    >>> plan = sapp.plan({"w": kernel}, block=(1, None), sparsity=0.75, min_blocks=1)
    >>> shrink({"w": kernel}, plan)["w"].indices[0].tolist()
    [1]
    """
    if any(isinstance(kernel, jax.core.Tracer) for kernel in planned_kernels(params, plan).values()):
        raise TypeError("shrink looks at the weights' values: call it outside jit, vmap and grad")
    return map_layers(_shrunk, params, plan.pruned)


def _shrunk(layer: LeafPlan | None, leaf: Any) -> Any:
    if layer is None:
        return leaf
    nonzero = np.asarray(leaf) != 0
    others = [tuple(a for a in range(leaf.ndim) if a != axis) for axis in range(leaf.ndim)]
    indices = [np.flatnonzero(nonzero.any(axes)).astype(np.int32) for axes in others]
    if all(len(kept) == side for kept, side in zip(indices, leaf.shape, strict=True)):
        return leaf
    kernel = jnp.asarray(np.asarray(leaf)[np.ix_(*indices)])
    return Shrunk(kernel, tuple(map(jnp.asarray, indices)), leaf.shape)
