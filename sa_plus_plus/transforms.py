"""Optax transformations: reset the optimizer at phase boundaries, and prune with one line."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from sa_plus_plus import resets, trees
from sa_plus_plus.blocks import at_least_float32
from sa_plus_plus.compose import PruningOptions
from sa_plus_plus.masking import zero_masked
from sa_plus_plus.planning import Plan
from sa_plus_plus.recommended import recommended
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
    """Reset the moments of `inner`, and of nothing else, at the start of each phase (C.1: this is crucial).

    Its `update` takes one more keyword, `phase`: an integer scalar, `prune.phase` of a `Sparsifier`. If it differs from
    that of the last update, the state becomes that of `inner.init(params)` before the update is computed, apart from
    the counters of schedules, sums of gradients (`optax.MultiSteps`), random keys and hyperparameters, which go on:

        tx = sapp.reset_on(optax.adamw(schedule))
        updates, opt_state = tx.update(grads, opt_state, trainable, phase=prune.phase)

    A state of a type that is not optax's starts afresh as a whole, and so does one whose only counter serves moments
    and a schedule alike (`optax.contrib.prodigy`). `sparsify` needs no `reset_on`; with one inside, it resets nothing
    else.

    If another transformation discards or postpones an update (`optax.apply_if_finite`, `optax.MultiSteps`), the reset
    is not lost: it happens at the next update.

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
        fresh = inner.init(trees.arrays(params))
        before = resets.restart(phase != state.phase, state.inner, fresh)
        result, after = inner.update(updates, before, params, phase=phase, **extra)
        return trees.unalias((result, ResetState(jnp.array(phase, jnp.int32), after)), updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


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


class Sparsify(optax.GradientTransformationExtraArgs):
    """What `sparsify` returns: an optax transformation that also knows its algorithm.

    Attributes:
      sparsifier: the algorithm.
    """

    sparsifier: Sparsifier

    def plan(self, params: Any) -> Plan:
        """Which layers are pruned and how.

        Args:
          params: the parameters, or their shapes.
        """
        return self.sparsifier.plan(params)


def sparsify(
    tx: optax.GradientTransformation,
    sp: Sparsifier | None = None,
    logits_tx: optax.GradientTransformation | None = None,
    *,
    block: int | Sequence[int | None] | None = None,
    sparsity: float | None = None,
    steps: int | None = None,
    reset: bool = True,
    **options: Unpack[PruningOptions],
) -> Sparsify:
    """Prune in an existing optax loop: wrap the whole optimizer and change nothing else.

        tx = sapp.sparsify(optax.adamw(schedule), block=16, sparsity=0.9, steps=1000)

    The loop's `params` always hold the *effective* weights, masked blocks exactly zero, so that the loss, evaluation
    and checkpoints stay as they are, and after `steps` updates they are the pruned network. The trained weights are
    part of the optimizer's state. `tx.plan(params)` says which layers are pruned. Blocks are chosen as `recommended`
    does, or by an algorithm of your choice: `sapp.sparsify(tx, sapp.acdc(...))`.

    Gradients with respect to the effective weights are pulled back by `jax.vjp` of `sp.apply`; `tx` gets `phase=` with
    each update. At the start of each phase, moments and what counts them restart, for the paper found this crucial;
    schedules, gradients that `optax.MultiSteps` accumulates, random keys and hyperparameters go on. A `reset_on` inside
    `tx` says that only what it wraps restarts.

    Changes that the loop makes to `params` between updates (loading trained weights after `tx.init`, clipping, decay)
    take effect as described at `sp.sync_from_params`, however small they are. As with optax, a gradient may be None,
    and `update` may be given more than `init` was (a whole Equinox model). Integers, booleans and random keys stay as
    the loop has them; `tx` sees None in their place. Nothing else belongs in a chain with `sparsify`. Before it,
    clipping and weight decay would see gradients and weights of the effective network, masked blocks included; after
    it, anything that alters the updates would make the network deviate from the plan. So wrap the whole chain:

        tx = sapp.sparsify(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), sp)

    An average of the loop's `params` is `ema`'s, which has their zeros; that of `optax.contrib.schedule_free_adamw`
    belongs inside. Optimizers that evaluate the loss themselves (`optax.lbfgs`, `optax.contrib.sam`) and
    `optax.lookahead` cannot be wrapped. After the loop, `check_pruned` raises an error if the network is not as
    planned.

    To accumulate gradients, wrap it: `optax.MultiSteps(sapp.sparsify(tx, sp), n)`; phases then count the updates, and
    inside they count calls. The network is pruned when all steps are done. Updates of parameters narrower than
    float32 are float32. If the schedule begins sparse, start from `params = sp.finalize(state.trainable, state.prune)`,
    with the state that `tx.init` gave.

    Args:
      tx: the optimizer. It trains the `Trainable(params, logits)` tree, so masks inside it must be functions of the
        tree rather than trees; if `logits_tx` is given, it trains the params alone.
      sp: the algorithm; by default `recommended(block=block, sparsity=sparsity, steps=steps, **options)`.
      logits_tx: another optimizer for the logits.
      block: `(b_r, b_c)`, or one integer for a square; without `sp`.
      sparsity: share of the blocks removed, in [0, 1); without `sp`.
      steps: number of updates in the run; without `sp`.
      reset: whether moments restart at the start of each phase. A `reset_on` inside `tx` works in either case.
      **options: see `PruningOptions`; without `sp`.

    Raises:
      TypeError: if `tx` is not a transformation or `sp` not a `Sparsifier`, for example if the two are swapped; if both
        `sp` and options are given, or `block`, `sparsity` or `steps` is missing; by `init`, if a leaf is not an array.
      ValueError: for options out of range; by `init`, if `tx` cannot be initialised on a `Trainable`, cannot train the
        weights behind a pruned network, or has a state whose moments and schedules cannot be told apart; by `update`,
        if the parameters are missing, or not the tree that `init` was given.
    """
    sp = _algorithm(sp, {"block": block, "sparsity": sparsity, "steps": steps}, options)
    tx = _transformation(tx, "sparsify")
    if logits_tx is not None:
        tx = _side_by_side(tx, _transformation(logits_tx, "sparsify"))

    def resets_itself(inner: optax.OptState) -> bool:
        return reset and len(sp.phases.phases) > 1 and not _has_reset_on(inner)

    def init(params: Any) -> SparsifyState:
        trainable, prune = sp.init(params)
        inner = _initialised(tx, trees.inexact(trainable))
        resets.check_supported(inner)
        if resets_itself(inner):
            jax.eval_shape(lambda state: resets.restart(False, state, state, tx), inner)  # refuses what it cannot tell
        state = SparsifyState(trainable, prune, inner)
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
        inner = state.inner
        if resets_itself(inner):
            begins, fresh = sp.phases.is_boundary(state.prune.step), tx.init(differentiable)
            inner = resets.restart(begins, inner, fresh, tx)
        updates, inner = tx.update(trained_grads, inner, differentiable, phase=state.prune.phase, **extra)
        trainable, prune = sp.update(trainable, state.prune, updates, trained_grads)
        layers = sp.plan(trainable.params).pruned
        effective = zero_masked(layers, sp.apply(trainable, prune), prune.masks)
        steps = jax.tree.map(_step_to, effective, current, is_leaf=trees.is_none)
        return trees.unalias((steps, SparsifyState(trainable, prune, inner)), grads, state, params)

    transformation = Sparsify(init, update)
    transformation.sparsifier = sp
    return transformation


def _algorithm(sp: Any, needed: dict[str, Any], options: PruningOptions) -> Sparsifier:
    """The algorithm that was given, or the recommended one."""
    given = [f"{name}={value!r:.40}" for name, value in {**needed, **options}.items() if value is not None]
    if isinstance(sp, Sparsifier):
        if given:
            raise TypeError(
                f"sparsify got both an algorithm and {', '.join(given)}: give these to the algorithm, or leave it out"
            )
        return sp
    if sp is not None:
        raise TypeError(
            "sparsify(tx, sp) takes the optimizer first and an algorithm, a Sparsifier, second; got "
            f"{type(sp).__name__}. Or write sparsify(tx, block=16, sparsity=0.9, steps=1000)"
        )
    if missing := [name for name, value in needed.items() if value is None]:
        raise TypeError(
            f"sparsify needs {', '.join(missing)}: write sparsify(tx, block=16, sparsity=0.9, steps=1000), where steps "
            "is the number of updates in the run, or give an algorithm"
        )
    return recommended(**needed, **options)


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


def _has_reset_on(state: optax.OptState) -> bool:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ResetState))
    return any(isinstance(leaf, ResetState) for leaf in leaves)


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
