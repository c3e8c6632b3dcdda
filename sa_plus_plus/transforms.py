"""Optax transformations: reset the optimizer at phase boundaries, and prune with one line."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sa_plus_plus import trees
from sa_plus_plus.blocks import at_least_float32
from sa_plus_plus.masking import zero_masked
from sa_plus_plus.sparsifier import PruneState, Sparsifier, Trainable

_NEEDS_PARAMS = "{} needs the current parameters: call `tx.update(grads, state, params)`"


class ResetState(NamedTuple):
    """State of `reset_on`.

    Attributes:
      phase: int32 scalar, the phase for which `inner` was last initialised.
      inner: state of the wrapped transformation.
    """

    phase: jax.Array
    inner: optax.OptState


def reset_on(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Reset the state of `inner`, and of nothing else, at the start of each phase (C.1: this is crucial).

    Its `update` takes one more keyword, `phase`: an integer scalar, `prune.phase` of a `Sparsifier`. If it differs from
    that of the last update, the state becomes `inner.init(params)` before the update is computed. Keep outside what
    must not be reset, above all the learning-rate schedule:

        tx = optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale_by_learning_rate(schedule))
        updates, opt_state = tx.update(grads, opt_state, trainable, phase=prune.phase)

    Hyperparameters of an `optax.inject_hyperparams` inside, which may have been set by hand, are kept. If another
    transformation discards or postpones an update (`optax.apply_if_finite`, `optax.MultiSteps`), the reset is not lost:
    it happens at the next update.

    Args:
      inner: momentum, Adam's moments, or any transformation.

    Raises:
      TypeError: if `inner` is not a transformation; by `update`, if `phase` is missing.
      ValueError: by `update`, if the parameters are missing.
    """
    inner = _transformation(inner, "reset_on")

    def init(params: Any) -> ResetState:
        return trees.unalias(ResetState(jnp.zeros((), jnp.int32), inner.init(params)), params)

    def update(updates: Any, state: ResetState, params: Any = None, *, phase: Any, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(_NEEDS_PARAMS.format("reset_on"))
        before = _reset_where(phase != state.phase, state.inner, inner.init(trees.arrays(params)))
        result, after = inner.update(updates, before, params, phase=phase, **extra)
        return trees.unalias((result, ResetState(jnp.array(phase, jnp.int32), after)), updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _reset_where(begins: Any, state: optax.OptState, fresh: optax.OptState) -> optax.OptState:
    """`fresh` where a phase begins, else `state`, which also stays where either is None: parameters may come and go."""

    def one(old: Any, new: Any) -> Any:
        if old is None or new is None:
            return old
        if not isinstance(old, optax.InjectStatefulHyperparamsState):
            return jnp.where(begins, new, old)
        inner = _reset_where(begins, old.inner_state, new.inner_state)
        return new._replace(hyperparams=old.hyperparams)._replace(inner_state=inner)

    def is_leaf(x: Any) -> bool:
        return x is None or isinstance(x, optax.InjectStatefulHyperparamsState)

    return jax.tree.map(one, state, fresh, is_leaf=is_leaf)


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Attributes:
      trainable: the weights (and logits) that are really trained.
      prune: masks, step, phase.
      inner: state of the wrapped optimizer.
    """

    trainable: Trainable
    prune: PruneState
    inner: optax.OptState


def sparsify(
    tx: optax.GradientTransformation,
    sp: Sparsifier,
    logits_tx: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prune in an existing optax loop: wrap the whole optimizer and change nothing else.

        tx = sapp.sparsify(tx, sp)

    The loop's `params` always hold the *effective* weights, masked blocks exactly zero, so that the loss, evaluation
    and checkpoints stay as they are, and after the last step they are the pruned network. The trained weights are
    part of the optimizer's state. Gradients with respect to the effective weights are pulled back to them by `jax.vjp`
    of `sp.apply`; `tx` gets `phase=` with each update, for `reset_on`. Without a `reset_on` inside, momentum and
    moments carry over from phase to phase, which costs accuracy: `init` warns about this.

    Changes that the loop makes to `params` between updates (loading trained weights after `tx.init`, clipping, decay)
    take effect as described at `sp.sync_from_params`, however small they are. As with optax, a gradient may be None,
    and `update` may be given more than `init` was (a whole Equinox model). Integers, booleans and random keys stay as
    the loop has them; `tx` sees None in their place. Nothing else belongs in a chain with `sparsify`. Before it,
    clipping and weight decay would see gradients and weights of the effective network, masked blocks included; after
    it, anything that alters the updates would make the network deviate from the plan. So wrap the whole chain:

        tx = sapp.sparsify(optax.chain(optax.clip_by_global_norm(1.0), sapp.reset_on(optax.adam(1e-3))), sp)

    An average of the loop's `params` is `ema`'s, which has their zeros; that of `optax.contrib.schedule_free_adamw`
    belongs inside, in `reset_on`. Line searches (`optax.lbfgs`) and `optax.lookahead` cannot be wrapped.
    After the loop, `check_pruned` raises an error if the network is not as planned.

    To accumulate gradients, wrap it: `optax.MultiSteps(sapp.sparsify(tx, sp), n)`; the schedule then counts the
    updates. The network is pruned when `total_steps` updates are done. Updates of parameters narrower than float32
    are float32. If the schedule begins sparse, start from `params = sp.finalize(state.trainable, state.prune)`, with
    the state that `tx.init` gave.

    Args:
      tx: the optimizer. It trains the `Trainable(params, logits)` tree, so masks inside it must be functions of the
        tree rather than trees; if `logits_tx` is given, it trains the params alone.
      sp: the algorithm.
      logits_tx: another optimizer for the logits.

    Raises:
      TypeError: if `tx` is not a transformation or `sp` not a `Sparsifier`, for example if the two are swapped; by
        `init`, if a leaf is not an array.
      ValueError: by `init`, if `tx` cannot be initialised on a `Trainable`; by `update`, if the parameters are missing,
        or not the tree that `init` was given.
    """
    if not isinstance(sp, Sparsifier):
        raise TypeError(f"sparsify(tx, sp) takes the optimizer first and a Sparsifier second, got {type(sp).__name__}")
    tx = _transformation(tx, "sparsify")
    if logits_tx is not None:
        tx = _side_by_side(tx, _transformation(logits_tx, "sparsify"))

    def init(params: Any) -> SparsifyState:
        trainable, prune = sp.init(params)
        state = SparsifyState(trainable, prune, _initialised(tx, trees.inexact(trainable)))
        if len(sp.phases.phases) > 1 and _never_resets(state.inner):
            warnings.warn(
                "this optimizer's moments go on from phase to phase, where the paper found it crucial that they start "
                "afresh: write sapp.reset_on(optax.adam(...)) instead of optax.adam(...)",
                stacklevel=2,
            )
        return trees.unalias(state)

    def update(grads: Any, state: SparsifyState, params: Any = None, **extra: Any) -> tuple[Any, SparsifyState]:
        if params is None:
            raise ValueError(_NEEDS_PARAMS.format("sparsify"))
        weights = state.trainable.params
        current = trees.match_state(params, weights, "parameters")
        complete = trees.fill_none(current, sp.apply(state.trainable, state.prune))
        trainable = sp.sync_from_params(state.trainable, state.prune, complete)
        differentiable = trees.inexact(trainable)

        def apply(differentiable: Trainable) -> Any:
            return trees.inexact(sp.apply(trees.fill_none(differentiable, trainable), state.prune))

        effective, pull_back = jax.vjp(apply, differentiable)
        matched = trees.match_state(grads, weights, "gradients")
        (trained_grads,) = pull_back(jax.tree.map(_cotangent, effective, matched, is_leaf=trees.is_none))
        updates, inner = tx.update(trained_grads, state.inner, differentiable, phase=state.prune.phase, **extra)
        trainable, prune = sp.update(trainable, state.prune, updates, trained_grads)
        layers = sp.plan(trainable.params).pruned
        effective = zero_masked(layers, sp.apply(trainable, prune), prune.masks)
        steps = jax.tree.map(_step_to, effective, current, is_leaf=trees.is_none)
        return trees.unalias((steps, SparsifyState(trainable, prune, inner)), grads, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _transformation(tx: Any, caller: str) -> optax.GradientTransformationExtraArgs:
    """Any optax optimizer as a transformation that takes extra arguments."""
    if isinstance(tx, optax.MultiSteps):
        tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)  # its own method for this drops extra arguments
    if not isinstance(tx, optax.GradientTransformation):
        call = f": call it, {tx.__name__}(...)" if callable(tx) and hasattr(tx, "__name__") else ""
        raise TypeError(f"{caller} takes an optax transformation such as optax.adam(1e-3), got {tx!r:.80}{call}")
    return optax.with_extra_args_support(tx)


def _initialised(tx: optax.GradientTransformation, trainable: Trainable) -> optax.OptState:
    try:
        return tx.init(trainable)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the optimizer cannot be initialised on the tree Trainable(params, logits): {error}\nMasks and labels "
            "inside it must be functions of the tree rather than trees of your parameters. Or pass logits_tx=..., and "
            "the optimizer sees your own tree."
        ) from error


def _never_resets(state: optax.OptState) -> bool:
    """Whether an optimizer's state holds arrays, such as moments, and nothing ever resets them."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ResetState))
    resets = any(isinstance(leaf, ResetState) for leaf in leaves)
    return not resets and any(jnp.ndim(leaf) > 0 for leaf in leaves)


def _cotangent(output: Any, gradient: Any) -> Any:
    """A loop's gradient in the dtype of the differentiated value; zero for None."""
    if output is None:
        return None
    return jnp.zeros_like(output) if gradient is None else jnp.asarray(gradient).astype(output.dtype)


def _step_to(target: Any, start: Any) -> Any:
    """The update that takes `start` to `target`; in float32 for narrower types, so that adding it is exact.

    Zero for integers and booleans, and None for random keys, to which nothing can be added.
    """
    if start is None or jnp.issubdtype(target.dtype, jax.dtypes.extended):
        return None
    start = jnp.asarray(start)
    if not trees.is_inexact(target):
        return jnp.zeros_like(start)
    return at_least_float32(target.astype(start.dtype)) - at_least_float32(start)


def _side_by_side(
    params_tx: optax.GradientTransformationExtraArgs, logits_tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Train the two fields of a `Trainable` with two independent optimizers."""

    def init(trainable: Trainable) -> tuple[Any, Any]:
        return params_tx.init(trainable.params), logits_tx.init(trainable.logits)

    def update(updates: Trainable, state: Any, trainable: Trainable, **extra: Any) -> tuple[Trainable, Any]:
        params, params_state = params_tx.update(updates.params, state[0], trainable.params, **extra)
        logits, logits_state = logits_tx.update(updates.logits, state[1], trainable.logits, **extra)
        return Trainable(params, logits), (params_state, logits_state)

    return optax.GradientTransformationExtraArgs(init, update)
