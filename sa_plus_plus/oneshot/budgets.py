"""A sparsity for each layer: the lowest loss under a budget of weights, multiply-adds or measured time."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus import progress, select
from sa_plus_plus.masking import apply_mask
from sa_plus_plus.oneshot.sensitivities import Costs, Sensitivity
from sa_plus_plus.oneshot.uses import uses_of
from sa_plus_plus.planning import LeafPlan, Plan, map_layers
from sa_plus_plus.sparse.compiler.frontend import layer_tracer
from sa_plus_plus.sparse.compiler.ir import Layer
from sa_plus_plus.sparse.compiler.planned import Choice
from sa_plus_plus.sparse.specialize import specialized
from sa_plus_plus.text import table


class Uniform(NamedTuple):
    """All layers at one sparsity, the lowest that a budget allows.

    Attributes:
      sparsity: of every layer; NaN if none of the measured ones is within the budget.
      cost: of all layers.
      loss: predicted.
    """

    sparsity: float
    cost: float
    loss: float


class Budget(NamedTuple):
    """A sparsity for each layer; `print` shows them.

    Attributes:
      sparsities: by path.
      cost: of all layers together, in the unit of the costs given.
      limit: the upper limit of the cost.
      dense: the cost without pruning.
      loss: predicted: that of the trained network plus the increases of all layers.
      uniform: the control.
      min_kept: what `plan` takes, for layers that keep so many blocks at least.
    """

    sparsities: dict[str, float]
    cost: float
    limit: float
    dense: float
    loss: float
    uniform: Uniform
    min_kept: Mapping[str, int | str] = types.MappingProxyType({})

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """As `plan`, `one_shot` and the training algorithms take them."""
        least = {path: {"min_kept": number} for path, number in self.min_kept.items()}
        return {path: {"sparsity": sparsity} | least.get(path, {}) for path, sparsity in self.sparsities.items()}

    def __str__(self) -> str:
        rows = [(path, f"{sparsity:.1%}") for path, sparsity in self.sparsities.items()]
        control = self.uniform
        return "\n".join(
            [
                table(("path", "sparsity"), rows),
                f"cost {self.cost:,.4g} of {self.dense:,.4g} ({self.cost / self.dense:.1%}), limit {self.limit:,.4g}",
                f"predicted loss {self.loss:.4g}; with all layers at {control.sparsity:.1%} {control.loss:.4g}",
            ]
        )


def budget(
    sensitivity: Sensitivity,
    costs: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    *,
    share: float | None = None,
    limit: float | None = None,
    between: int = 4,
) -> Budget:
    """A sparsity for each layer: the lowest predicted loss under a limit on the total cost of all layers.

        min Σ_l L(l, s_l)   subject to   Σ_l c(l, s_l) <= limit

    The loss increases of the layers are assumed to add up, and losses and costs to be linear between measured
    sparsities. This is a knapsack problem with a choice for each layer, solved exactly by integer programming (HiGHS,
    through SciPy).

    Args:
      sensitivity: of the network.
      costs: by path, one for each of `sensitivity.sparsities`: `sensitivity.weights()`, the default;
        `sensitivity.multiply_adds()`; `milliseconds(...)`; or any other.
      share: of the cost without pruning, in (0, 1].
      limit: instead, in the unit of the costs.
      between: number of additional candidate sparsities between two measured ones.

    Raises:
      ValueError: for a negative `between`, neither or both of `share` and `limit`, costs that do not fit, or a limit
        below the cost of the layers at the highest sparsities.
    """
    table = _checked_costs(sensitivity, sensitivity.weights() if costs is None else costs)
    dense = float(sum(each[0] for each in table.values()))
    if (share is None) == (limit is None):
        raise ValueError(f"give either share or limit; got share={share}, limit={limit}")
    if share is not None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be a fraction of the cost without pruning, in (0, 1], got {share}")
        limit = share * dense
    assert limit is not None
    if between < 0:
        raise ValueError(f"between must be at least 0, got {between}")
    sparsities = _finer(np.array(sensitivity.sparsities), between).round(6).tolist()
    table = {path: _finer(each, between) for path, each in table.items()}
    losses = {path: _finer(each, between) for path, each in sensitivity.losses.items()}
    losses = {path: np.where(np.isnan(each), np.inf, each) for path, each in losses.items()}
    least = sum(float(np.min(table[path][np.isfinite(losses[path])])) for path in table)
    if not limit >= least:
        raise ValueError(
            f"the limit of {limit:.4g} is below {least:.4g}, the least that the layers cost at the sparsities measured "
            f"(without pruning {dense:.4g}): raise it, or measure the sensitivity at higher sparsities"
        )
    with progress.doing("budget"):
        progress.say("solving the integer program")
        chosen = _solved(list(losses.values()), [table[path] for path in losses], limit)
    picks = dict(zip(losses, chosen, strict=True))
    base = sensitivity.loss

    def totals(picks: Mapping[str, int]) -> tuple[float, float]:
        cost = sum(float(table[path][i]) for path, i in picks.items())
        return cost, base + sum(float(losses[path][i]) - base for path, i in picks.items())

    uniform = [(s, *totals(dict.fromkeys(losses, i))) for i, s in enumerate(sparsities)]
    fits = [Uniform(*row) for row in uniform if row[1] <= limit and np.isfinite(row[2])]
    control = fits[0] if fits else Uniform(float("nan"), float("nan"), float("nan"))
    cost, loss = totals(picks)
    at_least = {path: layer.min_kept for path, layer in sensitivity.plan.pruned.items() if layer.min_kept}
    return Budget({path: sparsities[i] for path, i in picks.items()}, cost, limit, dense, loss, control, at_least)


def _finer(values: np.ndarray, between: int) -> np.ndarray:
    """The same with linearly interpolated values between each two."""
    part = np.arange(between + 1) / (between + 1)
    steps = values[:-1, None] * (1 - part) + values[1:, None] * part
    steps[:, 0] = values[:-1]  # though the next is NaN
    return np.append(steps, values[-1])


def _checked_costs(sensitivity: Sensitivity, costs: Mapping[str, Any]) -> Costs:
    table = {path: np.asarray(costs[path], np.float64) for path in sensitivity.losses if path in costs}
    count = len(sensitivity.sparsities)
    for path in sensitivity.losses:
        if path not in table or table[path].shape != (count,):
            found = "missing" if path not in table else f"of shape {table[path].shape}"
            raise ValueError(f"the costs of {path} are {found}: give one for each of the {count} sparsities")
        if not (np.isfinite(table[path]).all() and (table[path] >= 0).all()):
            raise ValueError(f"the costs of {path} must be finite and not negative, got {table[path].tolist()}")
    return table


def _solved(losses: Sequence[np.ndarray], costs: Sequence[np.ndarray], limit: float) -> list[int]:
    """One choice from each list: the lowest sum of losses with the sum of costs within the limit."""
    from scipy import optimize, sparse  # noqa: PLC0415 - what jax brings along; a second to import

    possible = [np.flatnonzero(np.isfinite(each)) for each in losses]
    group = np.repeat(np.arange(len(losses)), [len(p) for p in possible])
    value = np.concatenate([each[p] - each[p].min() for each, p in zip(losses, possible, strict=True)])
    cost = np.concatenate([each[p] for each, p in zip(costs, possible, strict=True)])
    one_each = sparse.csr_array((np.ones(len(group)), (group, np.arange(len(group)))))
    largest = max(float(value.max()), 1e-300)
    found = optimize.milp(
        value / largest,
        integrality=np.ones(len(value)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(cost[None] / max(limit, 1e-300), ub=1),
        ],
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise RuntimeError(f"the integer program was not solved: {found.message}")
    picked = found.x > 0.5
    return [int(p[np.flatnonzero(picked[group == i])[0]]) for i, p in enumerate(possible)]


def milliseconds(
    fn: Callable[..., Any], params: Any, sensitivity: Sensitivity, *examples: Any, **options: Any
) -> Costs:
    """Time of each layer on this machine at each sparsity of a sensitivity, measured by `specialize`.

    At each sparsity the blocks of largest norm are kept in all layers, and the network is specialised; the time does
    not depend on which blocks are kept. A layer's time is that of the implementation chosen for it.

    Args:
      fn: `fn(params, *inputs)`.
      params: its parameters.
      sensitivity: of the network.
      examples: inputs as in deployment, or their shapes and dtypes.
      **options: of `specialize`, such as `precision`.

    Returns:
      By path, milliseconds at each sparsity, over all uses of the leaf.

    Raises:
      ValueError: as `specialize` does, or if a layer cannot be measured here.
    """
    traced = layer_tracer(fn, params, sensitivity.plan.pruned, *examples)(params)
    where = {use.step: path for (path, _), uses in uses_of(traced, sensitivity.plan.pruned).items() for use in uses}
    linear = [i for i, step in enumerate(traced.steps) if isinstance(step, Layer)]
    costs = {path: np.zeros(len(sensitivity.sparsities)) for path in sensitivity.losses}
    defaults = {"plan": sensitivity.plan, **options}
    with progress.doing("milliseconds"):
        for column, sparsity in enumerate(progress.each(sensitivity.sparsities, "sparsity")):
            pruned = _largest_kept(params, sensitivity.plan, sparsity)
            with progress.doing("specialize"):
                network = specialized(lambda *x, pruned=pruned: fn(pruned, *x), examples, **defaults)
            choices = [choice for choice in network.choices if choice.rows]
            for step, choice in zip(linear, choices, strict=True):
                if step in where:
                    costs[where[step]][column] += _milliseconds_of(choice, where[step])
    return costs


def _largest_kept(params: Any, plan: Plan, sparsity: float) -> Any:
    """The parameters with the blocks of the largest norm, at least one of each matrix."""

    def one(layer: LeafPlan | None, leaf: Any) -> Any:
        if layer is None:
            return leaf
        kept = max(1, layer.kept_each_at(sparsity))
        norms = blk.frobenius(jnp.asarray(leaf), layer.block, layer.view).reshape(-1, layer.grid[0] * layer.grid[1])
        mask = jnp.stack([select.top_k(scores, kept) for scores in norms])
        return apply_mask(jnp.asarray(leaf), mask.reshape(layer.full_grid), layer)

    return map_layers(one, params, plan.pruned)


def _milliseconds_of(choice: Choice, path: str) -> float:
    """Milliseconds of a layer in the implementation chosen for it."""
    seconds = choice.traced_seconds if choice.runs == "traced" else choice.compiled_seconds
    if not np.isfinite(seconds):
        raise ValueError(
            f"{path} cannot be measured here: it runs as it was traced ({choice.note or 'no other implementation'})"
        )
    return 1e3 * seconds
