"""What of an optimizer's state starts afresh with a phase: moments and what counts them, but no schedule.

Optax's states are known by their types. Of others, leaves like the parameters (`optax.tree_map_params`) are moments,
and counters alone go on; what mixes the two is refused, since a counter may be that of a bias correction or a schedule.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sa_plus_plus import trees


class _Rule(NamedTuple):
    """What becomes of the fields of a state.

    Attributes:
      restarts: whether the fields start afresh; otherwise they go on.
      inner: fields that hold the state of wrapped transformations, to which their own rules apply.
      but: fields of which the opposite of `restarts` is true.
    """

    restarts: bool
    inner: tuple[str, ...] = ()
    but: tuple[str, ...] = ()


_MOMENTS = (
    "COCOBState DoGState DoWGState EmaState FactoredState MuonState ScaleByAdaDeltaState ScaleByAdamState "
    "ScaleByAdanState ScaleByAmsgradState ScaleByBeliefState ScaleByDistanceOverGradientsState ScaleByLBFGSState "
    "ScaleByLionState ScaleByNovogradState ScaleByOptimisticGradientState ScaleByRStdDevState "
    "ScaleByRStdDevWithCountState ScaleByRmsState ScaleByRmsWithCountState ScaleByRpropState ScaleByRssState "
    "ScaleBySM3State TraceState"
)
_SCHEDULES = (  # counters of schedules, sums of gradients not yet used, random keys, measurements
    "AddNoiseState ApplyEvery DifferentiallyPrivateAggregateState MonitorState ReduceLROnPlateauState "
    "ScaleByScheduleState SnapshotState WeightDecaySchedule ZeroNansState"
)
_RULES = {
    **dict.fromkeys(_MOMENTS.split(), _Rule(restarts=True)),
    **dict.fromkeys(_SCHEDULES.split(), _Rule(restarts=False)),
    "ApplyIfFiniteState": _Rule(restarts=False, inner=("inner_state",)),
    "ConditionallyMaskState": _Rule(restarts=False, inner=("inner_state",)),
    "ConditionallyTransformState": _Rule(restarts=False, inner=("inner_state",)),
    "InjectHyperparamsState": _Rule(restarts=False, inner=("inner_state",)),
    "InjectStatefulHyperparamsState": _Rule(restarts=False, inner=("inner_state",)),
    "MaskedState": _Rule(restarts=False, inner=("inner_state",)),
    "MultiStepsState": _Rule(restarts=False, inner=("inner_opt_state",)),
    "PartitionState": _Rule(restarts=False, inner=("inner_states",)),
    "SplitRealAndImaginaryState": _Rule(restarts=False, inner=("inner_state",)),
    "GaLoreState": _Rule(restarts=True, inner=("base_optimizer_state",)),
    "MechanicState": _Rule(restarts=True, inner=("base_optimizer_state",)),
    "ScaleByAdemamixState": _Rule(
        restarts=True, but=("count_m2",)
    ),  # counts the steps of the schedules of b3 and alpha
    "ScheduleFreeState": _Rule(restarts=True, inner=("base_optimizer_state",), but=("step_count",)),
}
_SHARED_COUNTERS = {  # what the one counter serves besides the moments
    "DAdaptAdamWState": "learning rate",
    "MadgradState": "learning rate",
    "MomoAdamState": "learning rate",
    "MomoState": "learning rate",
    "ProdigyState": "learning rate",
    "ScaleBySimplifiedAdEMAMixState": "alpha",
}
_NEEDS_LOSS = "it evaluates the loss at weights of its own choice, but those that it sees are not the network's"
_UNSUPPORTED = {
    "DifferentiallyPrivateAggregateState": "it needs a gradient for each example, and `sparsify` passes on their mean",
    "HutchinsonState": _NEEDS_LOSS,
    "LookaheadState": "it has two sets of weights, and one of them would never be pruned",
    "SAMState": _NEEDS_LOSS,
    "ScaleByBacktrackingLinesearchState": _NEEDS_LOSS,
    "ScaleByZoomLinesearchState": _NEEDS_LOSS,
    "SophiaState": _NEEDS_LOSS,
}
_INSTEAD = "write sapp.reset_on(...) around the part of the optimizer that restarts as a whole"


def restart(
    begins: Any, state: optax.OptState, fresh: optax.OptState, tx: optax.GradientTransformation | None = None
) -> optax.OptState:
    """`state`, with moments and what counts them from `fresh` if a phase begins.

    Where a moment is None in either tree, the state stays: parameters may come and go.

    Args:
      begins: boolean scalar, may be traced.
      state: of the optimizer.
      fresh: `tx.init` of the current parameters.
      tx: the optimizer. If given, a state that cannot be told is refused; otherwise it starts afresh as a whole.

    Raises:
      ValueError: naming the type of a state whose moments and schedules cannot be told apart.
    """
    like_params = functools.cache(lambda: _like_params(tx, state))
    before = 0  # leaves of `state` before the node

    def from_fresh(old: Any, new: Any) -> Any:
        return jax.tree.map(
            lambda x, y: x if x is None or y is None else jnp.where(begins, y, x), old, new, is_leaf=trees.is_none
        )

    def visit(old: Any, new: Any) -> Any:
        nonlocal before
        name, rule = _optax_name(old), _RULES.get(_optax_name(old))
        if rule is not None:
            fields = {}
            for field, of_old, of_new in zip(old._fields, old, new, strict=True):
                if field in rule.inner:
                    fields[field] = visit(of_old, of_new)
                    continue
                before += _size(of_old)
                fields[field] = from_fresh(of_old, of_new) if rule.restarts != (field in rule.but) else of_old
            return old._replace(**fields)
        if _holds_states(old):
            return jax.tree.map(visit, old, new, is_leaf=lambda x: x is not old)
        before += (size := _size(old))
        if tx is None:
            return from_fresh(old, new)
        if name in _SHARED_COUNTERS:
            raise ValueError(
                f"{name} counts the steps of its moments and of a schedule of the {_SHARED_COUNTERS[name]} with one "
                f"counter, and only the former should restart with each phase: {_INSTEAD}, which is right if the "
                f"{_SHARED_COUNTERS[name]} is constant, or pass reset=False"
            )
        restarts = size > 0 and _unknown_restarts(old, like_params()[before - size : before])
        return from_fresh(old, new) if restarts else old

    return visit(state, fresh)


def check_supported(state: optax.OptState) -> None:
    """Refuse optimizers that cannot train the weights behind a pruned network.

    Args:
      state: of the optimizer.

    Raises:
      ValueError: naming the type of the state.
    """
    for node in jax.tree.leaves(state, is_leaf=lambda node: _optax_name(node) in _UNSUPPORTED):
        if (name := _optax_name(node)) in _UNSUPPORTED:
            raise ValueError(f"sparsify cannot wrap the optimizer with {name}: {_UNSUPPORTED[name]}")


def _optax_name(node: Any) -> str:
    """The name of the type of one of optax's states; empty for anything else."""
    return type(node).__name__ if type(node).__module__.partition(".")[0] == "optax" else ""


def _children(node: Any) -> list[Any]:
    return jax.tree.leaves(node, is_leaf=lambda x: x is not node)


def _holds_states(node: Any) -> bool:
    """Whether it is a container such as that of `optax.chain`: not itself a state, and no array is directly in it."""
    if not isinstance(node, tuple | list | dict) or hasattr(node, "_fields"):
        return False
    return not any(jax.tree_util.all_leaves([child]) for child in _children(node))


def _size(node: Any) -> int:
    return len(jax.tree.leaves(node))


def _unknown_restarts(node: Any, like_params: list[bool]) -> bool:
    """Whether a state of unknown type starts afresh."""
    if all(like_params):
        return True
    numbers = [trees.is_inexact(leaf) for leaf in jax.tree.leaves(node)]
    if not any(like_params) and not any(numbers):
        return False
    fields = f" ({', '.join(node._fields)})" if hasattr(node, "_fields") else ""
    raise ValueError(
        f"cannot tell which part of an optimizer's state of type {type(node).__name__}{fields} should restart with "
        f"each phase, and which is the counter of a schedule: {_INSTEAD}, or pass reset=False"
    )


def _like_params(tx: Any, state: optax.OptState) -> list[bool]:
    """For each leaf of a state, whether it belongs to a tree like the parameters."""
    try:
        marks = optax.tree_map_params(tx, lambda _: True, state, transform_non_params=lambda _: False)
    except (ValueError, TypeError, AttributeError, LookupError, AssertionError):  # `init` needs real parameters
        return [False] * _size(state)
    return jax.tree.leaves(marks)
