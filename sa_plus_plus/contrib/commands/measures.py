"""What is left of each pruned kernel: its blocks, norms and bytes, against the plan and the dense network."""

from typing import Any, NamedTuple

import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.checks import occupied, planned_kernels
from sa_plus_plus.planning import LeafPlan, Plan
from sa_plus_plus.sparse.summaries import Summary, stored_bytes


class Measured(NamedTuple):
    """One pruned kernel.

    Attributes:
      layer: its blocks; those planned where there is a plan, else those found.
      norms: the Frobenius norm of each block, `(*stack, grid_r, grid_c)`.
      mask: which blocks hold anything but zeros, of the same shape.
      planned: number of blocks that should be left; None without a plan.
      norm: `‖V‖ / ‖W‖` of the kernel and the dense one; None if that is not known.
      change: `‖V - W‖ / ‖W‖`; None too.
      bytes: in full.
      stored_bytes: by its kept blocks.
    """

    layer: LeafPlan
    norms: np.ndarray
    mask: np.ndarray
    planned: int | None
    norm: float | None
    change: float | None
    bytes: int
    stored_bytes: int

    @property
    def kept(self) -> int:
        """Number of blocks that are left."""
        return int(self.mask.sum())


def measure(params: Any, found: Summary, plan: Plan | None, dense: Any) -> list[Measured]:
    """What is left of each kernel of the plan or, without one, of each that has blocks of zeros.

    Args:
      params: of the pruned network.
      found: its summary.
      plan: by which it was pruned; None if that is not known.
      dense: parameters of the dense network; None if they are not known.

    Raises:
      ValueError: if the plan, or the dense network, is of other kernels.
    """
    layers = plan.pruned if plan else {leaf.path: leaf.layer for leaf in found.kernels if leaf.has_blocks}
    shapes = Plan(tuple(layer._replace(skip_reason="") for layer in layers.values()))
    kernels = planned_kernels(params, shapes)
    originals = _originals(dense, shapes)
    return [
        _measured(layer, kernels[path], originals.get(path), layer.kept if plan else None)
        for path, layer in layers.items()
    ]


def _originals(dense: Any, shapes: Plan) -> dict[str, Any]:
    if dense is None:
        return {}
    try:
        return planned_kernels(dense, shapes)
    except ValueError as error:
        raise ValueError(f"--against is another network: {error}") from error


def _measured(layer: LeafPlan, kernel: Any, dense: Any, planned: int | None) -> Measured:
    kernel = np.asarray(kernel)
    values = kernel.astype(np.float64)
    cut = blk.to_blocks(values, layer.block, layer.view)
    norms = np.sqrt(np.square(cut).sum((-3, -1)))
    mask = occupied(kernel, layer.block, layer.view)
    norm = change = None
    if dense is not None:
        original = np.asarray(dense, np.float64)
        size = float(np.linalg.norm(original.ravel())) or 1.0
        norm = float(np.linalg.norm(values.ravel())) / size
        change = float(np.linalg.norm((values - original).ravel())) / size
    stored = stored_bytes(layer, mask, kernel.dtype.itemsize)
    return Measured(layer, norms, mask, planned, norm, change, kernel.nbytes, min(stored, kernel.nbytes))
