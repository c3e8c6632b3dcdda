"""Equal parameters in an order in which blocks hold more: what is worth keeping comes to lie together."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus import select
from sa_plus_plus.oneshot.capture import visit_layers
from sa_plus_plus.oneshot.layers import DAMPING, problem_of
from sa_plus_plus.oneshot.read_views import plan_for
from sa_plus_plus.oneshot.uses import Use
from sa_plus_plus.plan_options import PlanOptions
from sa_plus_plus.planning import Plan, path_string
from sa_plus_plus.reordering import axes
from sa_plus_plus.reordering.orders import Order
from sa_plus_plus.reordering.search import Scores, search, shares
from sa_plus_plus.sparse.arguments import listed, shape_and_type, shapes
from sa_plus_plus.text import table

SCORES = ("magnitude", "wanda", "obs")


class Share(NamedTuple):
    """How much of a layer's scores is kept at the planned sparsity.

    Attributes:
      before: by the best blocks of the parameters as they were given.
      after: by those of the reordered ones.
      weights: by as many single weights, which no order can exceed.
    """

    before: float
    after: float
    weights: float


class Reordered(NamedTuple):
    """Parameters in another order, with which the function is the same; `print` shows what was gained.

    Attributes:
      params: the reordered parameters.
      order: the permutations; `order.apply` reorders other trees, `order.inverse.apply` undoes it.
      plan: of the blocks that the order was made for.
      shares: the share of the scores that is kept, for each layer by path.
    """

    params: Any
    order: Order
    plan: Plan
    shares: dict[str, Share]

    def __str__(self) -> str:
        rows = [(path, *(f"{share:.1%}" for share in each)) for path, each in self.shares.items()]
        rows.append(("mean", *(f"{np.mean(column):.1%}" for column in zip(*self.shares.values(), strict=True))))
        head = ("scores kept in", "before", "after", "single weights")
        return f"{table(head, rows)}\n\n{self.order}"


def reorder(
    fn: Callable[..., Any],
    params: Any,
    examples: Any,
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    scores: str = "magnitude",
    damping: float = DAMPING,
    **options: Unpack[PlanOptions],
) -> Reordered:
    """Permute hidden units, channels, heads and the residual stream so that few blocks hold most of the scores.

    The result computes the same function, to rounding: axes are permuted only where all that depends on their order is
    permuted with them. Which these are is found by tracing `fn`; the axes of its inputs and results keep their order.
    The order maximises

        Σ_l (sum of the largest (1 - sparsity) of the blocks of S_l) / (sum of S_l)

    with a score `S_ij` of each weight of layer `l`, by a local search.

    Args:
      fn: `fn(params, *inputs)`, jittable, dropout off and averages running.
      params: its parameters; for a network with running averages, these too.
      examples: as `one_shot` takes them. With scores by magnitude only their shapes matter.
      block: `(b_r, b_c)`, as `plan` takes it.
      sparsity: share of the blocks to be removed later, in [0, 1).
      scores: `"magnitude"`, `W_ij²`; `"wanda"`, `W_ij² ‖X_i‖²`; or `"obs"`, `W_ij² / [H^-1]_ii`, the loss from removing
        this weight alone (Optimal Brain Surgeon).
      damping: for `"obs"`, as `one_shot` takes it.
      **options: as `plan` takes them: `min_blocks`, `where`, `overrides`, `views`, `min_kept`.

    Raises:
      ValueError: as `plan` does; for unknown scores; for examples of several shapes or without a batch; with scores
        from examples, also as `one_shot` does.
    """
    check_scores(scores)
    batches = of_one_shape(examples)
    plan = plan_for(fn, params, batches, block=block, sparsity=sparsity, **options)
    order, kept = find_order(fn, params, batches, plan, scores, damping)
    return Reordered(order.apply(params), order, plan, kept)


def check_scores(scores: str) -> None:
    """Refuse scores that are not known."""
    if scores not in SCORES:
        raise ValueError(f"scores must be one of {', '.join(SCORES)}, got {scores!r}")


def find_order(
    fn: Callable[..., Any], params: Any, batches: Sequence[Any], plan: Plan, scores: str, damping: float = DAMPING
) -> tuple[Order, dict[str, Share]]:
    """An order for the blocks of a plan, and what it keeps of each layer's scores; arguments as for `reorder`."""
    found = axes.find(fn, params, *batches[0])
    of_weights = weight_scores(fn, params, batches, plan, scores, damping)
    before = shares(of_weights, plan.pruned)
    order = search(found, of_weights, plan.pruned)
    after = shares({path: order.leaf(found.leaves[path], of_weights[path]) for path in plan.pruned}, plan.pruned)
    single = {path: _single(of_weights[path], layer.sparsity) for path, layer in plan.pruned.items()}
    return order, {path: Share(before[path], after[path], single[path]) for path in plan.pruned}


def weight_scores(
    fn: Callable[..., Any], params: Any, batches: Sequence[Any], plan: Plan, scores: str, damping: float = DAMPING
) -> Scores:
    """A score of each weight of the pruned leaves, by path, in the leaf's shape; arguments as for `reorder`."""
    leaves = {path_string(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    weights = {path: np.asarray(leaves[path]).astype(np.float32) for path in plan.pruned}
    if bad := [path for path, x in weights.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{bad[0]} holds NaN or infinite values")
    if scores == "magnitude":
        return {path: x**2 for path, x in weights.items()}
    matrices = {path: np.empty_like(blk.matrices(x, plan.pruned[path].view)) for path, x in weights.items()}

    def visit(use: Use, gram: np.ndarray, matrix: np.ndarray, rows: int) -> np.ndarray:
        if scores == "obs":
            known = problem_of(use, gram, matrix, damping).hessian[: len(matrix), : len(matrix)]
            each = 1 / np.diag(np.linalg.inv(known))
        else:
            each = np.diag(gram) if np.diag(gram).any() else np.ones(len(gram))
        here = matrices[use.layer.path].reshape(-1, *use.oriented(matrix).shape)
        here[use.stack] = use.oriented(matrix**2 * each[:, None])
        return matrix

    visit_layers(fn, params, batches, plan.pruned, visit)
    layers = plan.pruned
    return {
        path: np.asarray(blk.from_matrices(m, layers[path].shape, layers[path].view)) for path, m in matrices.items()
    }


def of_one_shape(examples: Any) -> list[tuple[Any, ...]]:
    """Examples as a list of batches, each a tuple of arguments.

    Raises:
      ValueError: for none, or batches of several shapes.
    """
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in listed(examples, name="examples")]
    if not batches:
        raise ValueError("examples has no batches: give one of typical inputs")
    first, *others = ([shape_and_type(x) for x in jax.tree.leaves(batch)] for batch in batches)
    for number, got in enumerate(others, 1):
        if got != first:
            raise ValueError(f"batch {number} of the examples is {shapes(got)}, but batch 0 is {shapes(first)}")
    return batches


def _single(scores: np.ndarray, sparsity: float) -> float:
    """The share of the scores in the largest single weights."""
    flat, kept = scores.ravel(), select.kept_blocks(scores.size, sparsity)
    total = float(flat.sum(dtype=np.float64))
    if not kept or not total:
        return float(not total)
    return float(np.partition(flat, flat.size - kept)[-kept:].sum(dtype=np.float64)) / total
