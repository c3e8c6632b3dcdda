"""Pruning of a trained network without training, and refitting of a pruned one."""

import functools
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

import sa_plus_plus.oneshot.layers as layers
from sa_plus_plus import progress
from sa_plus_plus.oneshot.alps import alps
from sa_plus_plus.oneshot.capture import Visited, matrices_of, visit_layers
from sa_plus_plus.oneshot.layers import DAMPING, Choose, Problem, Solved, problem_of
from sa_plus_plus.oneshot.obs import obs
from sa_plus_plus.oneshot.read_views import plan_for
from sa_plus_plus.oneshot.reorder import SCORES, find_order, of_one_shape
from sa_plus_plus.oneshot.uses import Use
from sa_plus_plus.plan_options import PlanOptions
from sa_plus_plus.planning import LeafPlan, Plan
from sa_plus_plus.reordering.orders import Order
from sa_plus_plus.sparse.arguments import listed
from sa_plus_plus.text import table


class LayerReport(NamedTuple):
    """The outcome for one leaf.

    Attributes:
      plan: the plan of the leaf.
      kept: number of kept blocks.
      error: `‖X V - X W‖ / ‖X W‖`: deviation of its outputs on the calibration data from those of its trained weights,
        over all its uses in the pruned network; NaN if no calibration input reaches it.
      rows: of `X`, over all batches and uses, of its first matrix.
      unreached: number of its matrices that no calibration input reaches: they are pruned by magnitude.
    """

    plan: LeafPlan
    kept: int
    error: float
    rows: int
    unreached: int = 0


class OneShot(NamedTuple):
    """A network pruned without training; `print` shows its layers.

    Attributes:
      params: the pruned parameters, with the given structure and dtypes.
      masks: boolean `(*stack, grid_r, grid_c)` by path, true where a block stays.
      plan: the plan, for `export` and `check_pruned`.
      layers: the outcome for each leaf.
      order: with `reorder=True`, the order that the parameters are in; `order.inverse.apply` undoes it.
    """

    params: Any
    masks: dict[str, jax.Array]
    plan: Plan
    layers: tuple[LayerReport, ...]
    order: Order | None = None

    def __str__(self) -> str:
        return table(("path", "shape", "block", "kept", "error", "rows"), [*map(_cells, self.layers)])


def _cells(layer: LayerReport) -> tuple[str, ...]:
    shape, block = ("×".join(map(str, sides)) for sides in (layer.plan.shape, layer.plan.block))
    kept = f"{layer.kept:,} of {layer.plan.blocks:,}, {layer.kept / layer.plan.blocks:.1%}"
    error = "-" if np.isnan(layer.error) else f"{layer.error:.4f}"
    magnitude = f", {layer.unreached} of {math.prod(layer.plan.stack)} by magnitude" if layer.unreached else ""
    return (layer.plan.path, shape, block, kept, error, f"{layer.rows:,}{magnitude}")


def one_shot(
    fn: Callable[..., Any],
    params: Any,
    calibration: Any,
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    method: str = "obs",
    refit: bool = False,
    damping: float = DAMPING,
    reorder: bool = False,
    **options: Unpack[PlanOptions],
) -> OneShot:
    """Prune a trained network by blocks without training, changing each layer's outputs on calibration data least.

    Layer by layer, in the order in which the network uses them, blocks of `W` are removed so that

        ‖X V - X W‖² + damping · mean(diag X^T X) · ‖V - W‖²

    is small, where `X` is the layer's input once the layers before it are pruned. Kernels are found by tracing,
    wherever `fn` multiplies by a leaf or convolves with it, even if it is transposed or reshaped, used in several
    places or in a `scan` of up to 128 steps. Biases and all other leaves stay as they are. What else is computed from a
    leaf, such as the lookups of a tied embedding, is computed from the pruned one, which is chosen for its products.

    Args:
      fn: `fn(params, *inputs)`, jittable, dropout off and averages running.
      params: its trained parameters.
      calibration: a list of batches of typical inputs, each an array (or another pytree) or a tuple of arguments, all
        of one shape; an array or a dictionary alone is one batch. A few hundred examples; memory holds the activations
        between two layers for all of them.
      block: `(b_r, b_c)`, as `plan` takes it.
      sparsity: share of the blocks removed, in [0, 1).
      method: which blocks stay: `"magnitude"`, the largest; `"wanda"`, those with the largest norm of `|W_ij| ‖X_i‖`;
        `"obs"` (Optimal Brain Surgeon) and `"alps"` (ADMM), those that change the outputs least. The last two also
        adjust the remaining weights.
      refit: for `"magnitude"` and `"wanda"`: adjust the remaining weights as `refit` does.
      damping: added to the diagonal of `X^T X`, as a multiple of its mean.
      reorder: whether `sapp.reorder` first permutes the axes that can be, by the scores of the method. The parameters
        returned are in this order. Not for `"magnitude"` where inputs differ much in size: large weights on small ones
        come to lie together then, and stay.
      **options: as `plan` takes them: `min_blocks`, `where`, `overrides`, `views`, `min_kept`.

    Returns:
      The pruned parameters and masks. `sapp.export(result.params, result.plan)` stores them by their blocks.

    Raises:
      ValueError: as `plan` does; for an unknown method or a bad damping; for calibration data that are empty, not
        finite or of several shapes; for too few of them without damping; for weights or inputs of a layer that are not
        finite; for a leaf that is never the kernel of a product, or is one both as it is and transposed;
        and if no input reaches any layer.

    Warns:
      UserWarning: naming the matrices that no calibration input reaches, such as those of an expert that no example is
        routed to. Nothing is known of their inputs, so their largest blocks stay, with their weights as they are.
    """
    solve = solver(method, refit)
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in listed(calibration)]
    plan = plan_for(fn, params, batches, block=block, sparsity=sparsity, **options)
    order = None
    with progress.doing("one_shot"):
        if reorder:
            scores = method if method in SCORES else "obs"
            order, _ = find_order(fn, params, of_one_shape(batches), plan, scores, damping)
            params = order.apply(params)
        pruned = _walked(fn, params, batches, plan, lambda problem, use: solve(problem)(use.layer.kept_each), damping)
    return pruned._replace(order=order)


def solver(method: str, refit: bool) -> Callable[[Problem], Choose]:
    """A method by its name: `solver(...)(problem)(kept)` is a layer's mask and weights.

    Raises:
      ValueError: for an unknown one.
    """
    scores = {"magnitude": layers.magnitude, "wanda": layers.wanda}
    adjusting: dict[str, Any] = {"obs": obs, "alps": lambda problem: functools.partial(alps, problem)}
    if method in adjusting:
        return adjusting[method]
    if method not in scores:
        raise ValueError(f"method must be one of {', '.join([*scores, *adjusting])}, got {method!r}")

    def by_score(problem: Problem) -> Choose:
        of_blocks = scores[method](problem)

        def choose(kept: int) -> Solved:
            mask = problem.covering(layers.top(of_blocks, kept), of_blocks)
            return mask, layers.refitted(problem, mask) if refit else problem.weights * problem.spread(mask)

        return choose

    return by_score


def changes(gram: np.ndarray, weights: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """`‖X V - X W‖²` and `‖X W‖²`."""
    return np.array([np.sum(a * (gram @ a)) for a in (weights - trained, trained)])


def relative(squares: np.ndarray) -> float:
    """`‖X V - X W‖ / ‖X W‖` from sums of `changes`; 0 for outputs that are all zero."""
    change, size = np.maximum(squares, 0)
    return float(np.sqrt(change / size)) if size else 0.0


def refit(
    fn: Callable[..., Any],
    params: Any,
    calibration: Any,
    masks: Mapping[str, Any],
    plan: Plan,
    *,
    damping: float = DAMPING,
) -> OneShot:
    """The least-squares optimal weights of each layer for given masks: `one_shot` with fixed blocks.

    Args:
      fn: `fn(params, *inputs)`.
      params: the trained parameters before pruning; their outputs are the target of the fit.
      calibration: as `one_shot` takes it.
      masks: by path, boolean `(*stack, grid_r, grid_c)`, such as `prune.masks` of an algorithm.
      plan: `sp.plan(params)`, which has the blocks.
      damping: as `one_shot` takes it.

    Raises:
      ValueError: if masks are missing or of another shape, or as `one_shot` does.
    """
    by_matrix: dict[str, np.ndarray] = {}
    for path, layer in plan.pruned.items():
        mask = None if path not in masks else np.asarray(masks[path])
        if mask is None or mask.shape != layer.full_grid or mask.dtype != bool:
            found = "missing" if mask is None else f"{mask.dtype} {mask.shape}"
            raise ValueError(f"the mask of {path} is {found}: give a boolean array of shape {layer.full_grid}")
        by_matrix[path] = mask.reshape(-1, *layer.grid)

    def solve(problem: Problem, use: Use) -> Solved:
        mask = use.oriented(by_matrix[use.layer.path][use.stack])
        return mask, layers.refitted(problem, mask)

    with progress.doing("refit"):
        return _walked(fn, params, calibration, plan, solve, damping)


def _walked(
    fn: Callable[..., Any],
    params: Any,
    calibration: Any,
    plan: Plan,
    solve: Callable[[Problem, Use], Solved],
    damping: float,
) -> OneShot:
    batches = listed(calibration)
    masks = {path: np.ones((int(np.prod(layer.stack)), *layer.grid), bool) for path, layer in plan.pruned.items()}
    squares = {path: np.zeros(2) for path in plan.pruned}
    rows_of: dict[str, int] = {}

    def visit(use: Use, gram: np.ndarray, matrix: np.ndarray, rows: int) -> np.ndarray:
        path = use.layer.path
        mask, weights = solve(problem_of(use, gram, matrix, damping), use)
        weights = weights[: matrix.shape[0], : matrix.shape[1]]
        squares[path] += changes(gram, weights, matrix)
        masks[path][use.stack] = use.oriented(mask)
        rows_of.setdefault(path, rows)
        return weights

    visited = visit_layers(fn, params, batches, plan.pruned, visit)
    warn_of_unreached(visited, plan)
    squares |= changes_in(fn, visited.params, params, batches, plan, visited.ahead)
    reports = []
    for path, layer in plan.pruned.items():
        unreached = sum(use.layer.path == path for use in visited.unreached)
        error = relative(squares[path]) if unreached < math.prod(layer.stack) else float("nan")
        reports.append(LayerReport(layer, int(masks[path].sum()), error, rows_of[path], unreached))
    grids = {path: jnp.asarray(mask.reshape(plan.pruned[path].full_grid)) for path, mask in masks.items()}
    return OneShot(visited.params, grids, plan, tuple(reports))


def changes_in(
    fn: Callable[..., Any], pruned: Any, trained: Any, batches: Sequence[Any], plan: Plan, paths: Collection[str]
) -> dict[str, np.ndarray]:
    """`changes` of some leaves of a pruned network, by path, over all their uses on their inputs in that network."""
    if not paths:
        return {}
    layers = {path: plan.pruned[path] for path in paths}
    matrices, squares = matrices_of(trained, layers), {path: np.zeros(2) for path in paths}

    def visit(use: Use, gram: np.ndarray, matrix: np.ndarray, rows: int) -> np.ndarray:
        path = use.layer.path
        squares[path] += changes(gram, matrix, use.oriented(matrices[path][use.stack]).astype(np.float64))
        return matrix

    with progress.doing("errors of leaves used in several places"):
        visit_layers(fn, pruned, batches, layers, visit)
    return squares


def warn_of_unreached(visited: Visited, plan: Plan) -> None:
    """Warn of matrices that no calibration input reaches; an error if there is no other."""
    if not visited.unreached:
        return
    names = [use.name for use in visited.unreached]
    if len(names) == sum(math.prod(layer.stack) for layer in plan.pruned.values()):
        raise ValueError("no calibration input reaches any layer: their inputs are all zero. Give typical inputs")
    several = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
    warnings.warn(
        f"no calibration input reaches {several}: its inputs are all zero. Blocks are chosen there "
        "by magnitude, and weights that stay are not adjusted. Give examples that reach it, or leave it out by `where`",
        UserWarning,
        stacklevel=4,
    )
