"""Reordering while training: at a boundary of phases, by the scores that the weights have there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from sa_plus_plus.oneshot.layers import DAMPING
from sa_plus_plus.oneshot.reorder import Share, check_scores, find_order, of_one_shape
from sa_plus_plus.planning import Plan
from sa_plus_plus.reordering.orders import Order
from sa_plus_plus.reordering.states import Training, check_step, permuted, permuted_like
from sa_plus_plus.sparsifier import PruneState, Sparsifier, Trainable
from sa_plus_plus.transforms import SparsifyState

PARAMS = "params/"  # prefix of the parameters' paths where the model has a state too


class ReorderedState(NamedTuple):
    """The state of an explicit loop in another order, with which the function is the same.

    Attributes:
      trainable: weights and logits.
      prune: masks, step, phase.
      opt_state: the optimizer's.
      model_state: what the model carries besides, in this order.
      order: the permutations; of the tree `{"params": ..., "model_state": ...}` where there is a model state.
      shares: the share of the scores that the best blocks keep, for each layer by path.
    """

    trainable: Trainable
    prune: PruneState
    opt_state: optax.OptState
    model_state: Any
    order: Order
    shares: dict[str, Share]


class ReorderedTraining(NamedTuple):
    """The state of a loop with `sparsify` in another order, with which the function is the same.

    Attributes:
      params: the effective parameters.
      opt_state: the optimizer's state.
      model_state: what the model carries besides, in this order.
      order: the permutations; of the tree `{"params": ..., "model_state": ...}` where there is a model state.
      shares: the share of the scores that the best blocks keep, for each layer by path.
    """

    params: Any
    opt_state: optax.OptState
    model_state: Any
    order: Order
    shares: dict[str, Share]


def reorder_training(
    fn: Callable[..., Any],
    params: Any,
    opt_state: optax.OptState,
    tx: Any,
    examples: Any,
    *,
    model_state: Any = None,
    scores: str = "magnitude",
    damping: float = DAMPING,
) -> ReorderedTraining:
    """Reorder a network during training: parameters, the optimizer's state, logits and masks.

    For a loop with `sparsify`, between two steps and outside `jit`, before the blocks are chosen: at the end of a dense
    phase, when the weights have scores, or during a sparsification phase. Nothing compiled has to be compiled again.

        if step == 1000:
            params, opt_state, *_ = sapp.reorder_training(model.apply, params, opt_state, tx, examples)

    The function is the same before and after, to rounding. All blocks are active again until the next step that
    chooses.

    Args:
      fn: `fn(params, *inputs)`, jittable, dropout off and averages running; with a model state,
        `fn(params, model_state, *inputs)`.
      params: the loop's.
      opt_state: the loop's.
      tx: what `sparsify` returned.
      examples: as `reorder` takes them.
      model_state: what the model carries besides its parameters, such as running averages.
      scores: of the effective weights, as `reorder` takes them; likewise `damping`.
      damping: see `scores`.

    Raises:
      TypeError: if `tx` is not from `sparsify`, or the state is not its state.
      ValueError: in a sparse phase, whose blocks are chosen; for a leaf of the optimizer's state whose axes cannot be
        told; for parameters of another structure than those trained; as `reorder` does.
    """
    sp = tx if isinstance(tx, Sparsifier) else getattr(tx, "sparsifier", None)
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(x)]
    if sp is None or len(states) != 1:
        raise TypeError(
            "reorder_training takes what sparsify returned, and a state of its init: got "
            f"{type(tx).__name__} and a state with {len(states)} SparsifyState. For other loops see reorder_state"
        )
    (state,) = states
    here, there = (str(jax.tree.structure(tree)) for tree in (params, state.trainable.params))
    if here != there:
        raise ValueError(f"the parameters {here:.200} have another structure than those that are trained, {there:.200}")
    trainable = sp.sync_from_params(state.trainable, state.prune, params)
    found = reorder_state(
        sp, fn, trainable, state.prune, state.inner, examples, model_state=model_state, scores=scores, damping=damping
    )
    prefix, layers = _prefix(model_state), sp.plan(params).pruned

    inner = SparsifyState(found.trainable, found.prune, found.opt_state)
    around = permuted_like(found.order, trainable, layers, opt_state, prefix, is_leaf=_is_state)
    whole = jax.tree.map(lambda x: inner if _is_state(x) else x, around, is_leaf=_is_state)
    effective = sp.apply(found.trainable, found.prune)
    return ReorderedTraining(effective, whole, found.model_state, found.order, found.shares)


def reorder_state(
    sp: Sparsifier,
    fn: Callable[..., Any],
    trainable: Trainable,
    prune: PruneState,
    opt_state: optax.OptState,
    examples: Any,
    *,
    model_state: Any = None,
    scores: str = "magnitude",
    damping: float = DAMPING,
) -> ReorderedState:
    """`reorder_training` for a loop that calls the functions of an algorithm itself.

    Args:
      sp: the algorithm.
      fn: as `reorder_training` takes it; its parameters are the effective ones.
      trainable: the loop's.
      prune: the loop's.
      opt_state: the loop's, of an optimizer of `trainable`.
      examples: as `reorder` takes them.
      model_state: as in `reorder_training`, likewise `scores` and `damping`.
      scores: see `model_state`.
      damping: see `model_state`.

    Raises:
      ValueError: as `reorder_training` does.
    """
    check_scores(scores)
    check_step(sp, prune)
    effective, batches = sp.apply(trainable, prune), of_one_shape(examples)
    plan, prefix, tree, whole = sp.plan(trainable.params), _prefix(model_state), effective, fn
    if prefix:
        tree = {"params": effective, "model_state": model_state}

        def whole(tree: Any, *inputs: Any) -> Any:
            return fn(tree["params"], tree["model_state"], *inputs)

    order, shares = find_order(whole, tree, batches, _prefixed(plan, prefix), scores, damping)
    moved = permuted(sp, order, Training(trainable, prune, opt_state), prefix)
    state = order.apply(tree)["model_state"] if prefix else model_state
    return ReorderedState(*moved, state, order, {path.removeprefix(prefix): share for path, share in shares.items()})


def _is_state(node: Any) -> bool:
    return isinstance(node, SparsifyState)


def _prefix(model_state: Any) -> str:
    return PARAMS if jax.tree.leaves(model_state) else ""


def _prefixed(plan: Plan, prefix: str) -> Plan:
    return plan._replace(leaves=tuple(leaf._replace(path=prefix + leaf.path) for leaf in plan.leaves))
