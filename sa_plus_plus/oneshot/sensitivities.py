"""The effect of pruning one layer of a trained network alone: the loss against the layer's sparsity."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus import progress
from sa_plus_plus.oneshot.capture import visit_layers
from sa_plus_plus.oneshot.layers import DAMPING, problem_of
from sa_plus_plus.oneshot.prune import changes, changes_in, relative, solver, warn_of_unreached
from sa_plus_plus.oneshot.read_views import plan_for
from sa_plus_plus.oneshot.uses import Use
from sa_plus_plus.plan_options import PlanOptions
from sa_plus_plus.planning import LeafPlan, Plan, map_layers
from sa_plus_plus.sparse.arguments import listed
from sa_plus_plus.text import table

SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
Costs = dict[str, np.ndarray]  # by path, one for each sparsity


class Sensitivity(NamedTuple):
    """Loss against the sparsity of each layer alone, all others as they were trained; `print` shows it as a table.

    Attributes:
      plan: the layers, at sparsity 0.
      sparsities: in rising order, from 0.
      loss: of the network as it was trained.
      losses: by path `(len(sparsities),)`; NaN where a sparsity leaves no block of the layer.
      errors: likewise, `‖X V - X W‖ / ‖X W‖` of the layer's outputs, over all its uses; NaN also for a leaf that no
        calibration input reaches.
      rows: by path, rows of inputs of each of the leaf's matrices in a batch.
    """

    plan: Plan
    sparsities: tuple[float, ...]
    loss: float
    losses: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]
    rows: dict[str, float]

    def weights(self) -> Costs:
        """Number of weights of each layer at each sparsity, those in kept blocks; blocks on the edges count as full."""
        return {path: layer.weights * self._kept(layer) for path, layer in self.plan.pruned.items()}

    def multiply_adds(self) -> Costs:
        """Multiplications of each layer for a batch, at each sparsity."""
        return {path: self.rows[path] * weights for path, weights in self.weights().items()}

    def _kept(self, layer: LeafPlan) -> np.ndarray:
        each = layer.grid[0] * layer.grid[1]
        return np.array([layer.kept_each_at(s) / each for s in self.sparsities])

    def plot(self, ax: Any = None) -> Any:
        """Plot the increase of the loss against sparsity, one line per layer. Needs matplotlib.

        Args:
          ax: matplotlib axes to draw on; by default those of a new figure.

        Returns:
          The axes.
        """
        from matplotlib import pyplot as plt  # noqa: PLC0415 - optional

        ax = ax or plt.figure(figsize=(9, 5), layout="constrained").add_subplot()
        colours = plt.colormaps["viridis"](np.linspace(0, 0.95, len(self.losses)))
        for colour, (path, losses) in zip(colours, self.losses.items(), strict=True):
            ax.plot(self.sparsities, losses - self.loss, "o-", ms=3, lw=1, color=colour, label=path)
        ax.set(xlabel="sparsity of the layer alone", ylabel="increase of the loss")
        ax.set_yscale("symlog", linthresh=max(1e-3, 0.01 * abs(self.loss)))
        ax.legend(fontsize="x-small", ncols=2)
        return ax

    def __str__(self) -> str:
        head = ["path", "weights", *(f"{s:.1%}".replace(".0%", "%") for s in self.sparsities)]
        rows = [
            [path, f"{self.plan.pruned[path].weights:,}", *("-" if np.isnan(x) else f"{x:.4g}" for x in losses)]
            for path, losses in self.losses.items()
        ]
        return table(head, rows)


@progress.doing("sensitivity")
def sensitivity(
    fn: Callable[..., Any],
    params: Any,
    data: Any,
    loss: Callable[[Any, Any], jax.Array],
    *,
    block: int | Sequence[int | None],
    sparsities: Sequence[float] = SPARSITIES,
    method: str = "obs",
    refit: bool = False,
    damping: float = DAMPING,
    calibration: Any = None,
    **options: Unpack[PlanOptions],
) -> Sensitivity:
    """Prune each layer alone to each of some sparsities, and measure the network's loss.

        L(l, s) = mean over data of loss(outputs, targets), layer l at sparsity s

    `budget` turns the result into a sparsity for each layer.

    Args:
      fn: `fn(params, *inputs)`, jittable, dropout off and averages running.
      params: its trained parameters.
      data: a list of batches `(inputs, targets)`, inputs an array or a tuple of arguments, all of one shape; a pair
        alone is one batch, unless both parts are pairs too.
      loss: `loss(outputs, targets)`, which is averaged, such as
        `optax.softmax_cross_entropy_with_integer_labels`.
      block: `(b_r, b_c)`, as `plan` takes it.
      sparsities: each in (0, 1); 0 is added.
      method: as `one_shot` takes it, likewise `refit` and `damping`.
      calibration: inputs for choosing blocks and adjusting weights, as `one_shot` takes them; by default those of
        `data`, on which the loss then rises less than on other data.
      **options: as `plan` takes them; sparsities of `overrides` have no effect.

    Raises:
      ValueError: as `one_shot` does; for sparsities out of range, data that are no pairs, or a loss that is not finite
        as trained.

    Warns:
      UserWarning: as `one_shot` does.
    """
    if not sparsities or not all(0 < s < 1 for s in sparsities):
        raise ValueError(f"sparsities must be in (0, 1), some of them, got {sparsities!r}")
    steps = (0.0, *sorted({float(s) for s in sparsities}))
    solve = solver(method, refit)
    batches = [(x if isinstance(x, tuple) else (x,), y) for x, y in _pairs(data)]
    inputs = [x for x, _ in batches]
    plan = plan_for(fn, params, inputs, block=block, sparsity=0.0, **_without_sparsity(options))

    @jax.jit
    def mean_loss(params: Any, inputs: Any, targets: Any) -> jax.Array:
        return jnp.mean(loss(fn(params, *inputs), targets))

    def measured(params: Any) -> float:
        return float(np.mean([mean_loss(params, *batch) for batch in batches]))

    if not np.isfinite(base := measured(params)):
        raise ValueError(f"the loss of the network as it was trained is {base}")
    pruned = {path: np.full((len(steps), layer.weights), np.nan) for path, layer in plan.pruned.items()}
    squares = {path: np.zeros((len(steps), 2)) for path in pruned}
    rows = dict.fromkeys(pruned, 0.0)

    def visit(use: Use, gram: np.ndarray, matrix: np.ndarray, count: int) -> np.ndarray:
        layer, (height, width) = use.layer, matrix.shape
        rows[layer.path] += count / len(batches) / math.prod(layer.stack)
        choose = solve(problem_of(use, gram, matrix, damping))
        for i, kept in enumerate(map(layer.kept_each_at, steps)):
            if kept:
                weights = choose(kept)[1][:height, :width] if i else matrix
                squares[layer.path][i] += changes(gram, weights, matrix)
                place = slice(use.stack * matrix.size, (use.stack + 1) * matrix.size)
                pruned[layer.path][i, place] = use.oriented(weights).ravel()
        return matrix

    inputs = [x for x, _ in batches] if calibration is None else listed(calibration)
    visited = visit_layers(fn, params, inputs, plan.pruned, visit)
    warn_of_unreached(visited, plan)
    for path in visited.ahead:
        for i, flat in enumerate(pruned[path]):
            if i and not np.isnan(flat[0]):
                alone = _with(params, plan, path, flat)
                squares[path][i] = changes_in(fn, alone, params, inputs, plan, [path])[path]
    for path, layer in plan.pruned.items():
        if sum(use.layer.path == path for use in visited.unreached) == math.prod(layer.stack):
            squares[path][:] = np.nan
    losses = {path: np.full(len(steps), base) for path in pruned}
    pairs = [(path, i) for path in pruned for i in range(1, len(steps))]
    for path, i in progress.each(pairs, "loss"):
        losses[path][i] = measured(_with(params, plan, path, pruned[path][i]))
    errors = {path: np.array([relative(pair) for pair in squares[path]]) for path in squares}
    return Sensitivity(plan, steps, base, losses, errors, rows)


def _pairs(data: Any) -> list[Any]:
    """The batches of inputs and targets; one alone is a list of one."""
    if isinstance(data, tuple) and len(data) == 2 and not all(isinstance(part, tuple) for part in data):
        return [data]
    alone = hasattr(data, "shape") or isinstance(data, Mapping)
    batches = [data] if alone else list(data)
    if not batches:
        raise ValueError("data has no batches: give some of inputs and targets")
    for number, batch in enumerate(batches):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            found = f"an array of shape {batch.shape}" if hasattr(batch, "shape") else f"{type(batch).__name__}"
            raise ValueError(f"batch {number} of data is {found}, not a pair: give [(inputs, targets), ...]")
    return batches


def _without_sparsity(options: Any) -> Any:
    """The options of a plan, with overrides of sparsity left out."""
    overrides = options.get("overrides") or {}
    kept = {pattern: {k: v for k, v in dict(o).items() if k != "sparsity"} for pattern, o in overrides.items()}
    return options | {"overrides": kept}


def _with(params: Any, plan: Plan, path: str, flat: np.ndarray) -> Any:
    """The parameters with one leaf replaced, given as a sequence of its matrices."""
    layer = plan.pruned[path]
    matrices = flat.reshape(*layer.stack, *blk.matrix_shape(layer.shape, layer.view))

    def one(here: LeafPlan | None, leaf: Any) -> Any:
        return jnp.asarray(blk.from_matrices(matrices, layer.shape, layer.view), leaf.dtype) if here else leaf

    return map_layers(one, params, {path: layer})
