"""Outputs without any weight: which layers are to keep a block for each, and a warning about those that do not."""

import collections
import sys
import warnings
from collections.abc import Mapping

from sa_plus_plus import blocks as blk
from sa_plus_plus.plans import OUTPUTS, Plan, kept
from sa_plus_plus.views import View


def last_layers(kernels: Mapping[str, tuple[View, tuple[int, ...]]]) -> set[str]:
    """The kernels whose outputs, by their number, are no kernel's inputs, in a network of several kernels.

    Args:
      kernels: by path, how each is read as matrices, and its shape.
    """
    inputs = collections.Counter(
        size
        for view, shape in kernels.values()
        for size in {view.matrix(shape)[0], *(shape[axis] for axis in view.rows)}
    )
    return {path for path, (view, shape) in kernels.items() if len(kernels) > 1 and not inputs[view.matrix(shape)[1]]}


def warn_of_outputs_cut_off(plan: Plan) -> None:
    """Warn of layers that keep fewer blocks than their grids have columns.

    Args:
      plan: just made, by `planning.plan`.
    """
    lost = [(layer, layer.cut_off[1]) for layer in plan.pruned.values() if layer.cut_off[1]]
    if not lost:
        return
    named = [
        f"{layer.path} keeps {kept(layer)}: no weight for at least {outputs:,} of its "
        f"{blk.matrix_shape(layer.shape, layer.view)[1]:,} outputs"
        for layer, outputs in lost[:3]
    ]
    more = [f"{len(lost) - 3} more (print the plan)"] if lost[3:] else []
    warnings.warn(
        f'outputs without any weight are constant: {"; ".join(named + more)}. Set min_kept="{OUTPUTS}" there (see '
        "`overrides`) to keep a block for each, use smaller blocks or a lower sparsity, or leave the layer out by "
        "`where`",
        UserWarning,
        stacklevel=_level_of_user(),
    )


def _level_of_user() -> int:
    """The `stacklevel` of the line that called this package, directly or in a function that JAX transforms."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("sa_plus_plus", "jax"):
        frame, level = frame.f_back, level + 1
    return level
