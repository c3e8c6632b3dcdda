"""Optax transformations: start afresh at phase boundaries, and prune in one line."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sa_plus_plus.blocks import widened
from sa_plus_plus.sparsifier import PruneState, Sparsifier, Trainable

_NEEDS_PARAMS = "{} needs the current parameters: call `tx.update(grads, state, params)`"


def reset_on(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Let the state of `inner`, and of nothing else, start afresh where a phase begins (C.1: this is crucial).

    Its `update` takes one more keyword, `boundary`: a bool scalar, `prune.boundary` of a `Sparsifier`. Where it is true
    the state becomes `inner.init(params)` before the update is computed. Leave outside what must go on, above all the
    learning-rate schedule:

        tx = optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale_by_learning_rate(schedule))
        updates, opt_state = tx.update(grads, opt_state, trainable, boundary=prune.boundary)

    What calls `inner` on some steps only belongs inside too: `reset_on(optax.MultiSteps(optax.adam(1e-3), 4))`. The
    other way round, `optax.MultiSteps(reset_on(...), 4)` drops a boundary that falls on a step of mere accumulation.

    Args:
      inner: momentum, Adam's moments, or any transformation.

    Raises:
      TypeError: by `update`, if `boundary` is missing.
      ValueError: by `update`, if the parameters are missing.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, *, boundary: jax.Array, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(_NEEDS_PARAMS.format("reset_on"))
        state = jax.tree.map(lambda fresh, old: jnp.where(boundary, fresh, old), inner.init(params), state)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Attributes:
      trainable: the weights (and logits) that are really trained.
      prune: masks, step, boundary.
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
    """Prune in an existing optax loop: wrap its optimizer, change nothing else.

        tx = sapp.sparsify(tx, sp)

    The loop's `params` always hold the *effective* weights, masked blocks exactly zero, so that the loss, evaluation
    and checkpoints stay as they are, and after the last step they are the pruned network. The weights that are really
    trained live in the optimizer's state. Gradients with respect to the effective weights are pulled back to them by
    `jax.vjp` of `sp.apply`; `tx` gets `boundary=` with each update, for `reset_on`.

    Put it last in a chain: what comes after it would alter the effective weights. To accumulate gradients, wrap it:
    `optax.MultiSteps(sapp.sparsify(tx, sp), n)`; the schedule then counts the updates. The network is pruned when
    `total_steps` updates are done. Updates of parameters narrower than float32 are float32. Where the schedule begins
    sparse, start from `params = sp.finalize(state.trainable, state.prune)`, with the state that `tx.init` gave.

    Args:
      tx: the optimizer. Trains the `Trainable(params, logits)` tree, so masks inside it must be functions of the tree
        rather than trees; or the params alone where `logits_tx` is given.
      sp: the algorithm.
      logits_tx: another optimizer for the logits.

    Raises:
      TypeError: if `sp` is not a `Sparsifier`, as when the first two arguments are swapped.
      ValueError: by `update`, if the parameters are missing.
    """
    if not isinstance(sp, Sparsifier):
        raise TypeError(f"sparsify(tx, sp) takes the optimizer first and a Sparsifier second, got {type(sp).__name__}")
    tx = optax.with_extra_args_support(tx if logits_tx is None else _side_by_side(tx, logits_tx))

    def init(params: Any) -> SparsifyState:
        trainable, prune = sp.init(params)
        # Own buffers: the loop may donate its params to the step.
        trainable = jax.tree.map(jnp.copy, trainable)
        return SparsifyState(trainable, prune, tx.init(trainable))

    def update(grads: Any, state: SparsifyState, params: Any = None, **extra: Any) -> tuple[Any, SparsifyState]:
        if params is None:
            raise ValueError(_NEEDS_PARAMS.format("sparsify"))
        _, pull_back = jax.vjp(lambda trainable: sp.apply(trainable, state.prune), state.trainable)
        (grads,) = pull_back(grads)
        updates, inner = tx.update(grads, state.inner, state.trainable, boundary=state.prune.boundary, **extra)
        trainable, prune = sp.update(state.trainable, state.prune, updates)
        return jax.tree.map(_step_to, sp.finalize(trainable, prune), params), SparsifyState(trainable, prune, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _step_to(target: jax.Array, start: jax.Array) -> jax.Array:
    """The update that takes `start` to `target`; in float32 for narrower types, so that adding it rounds once."""
    return widened(target) - widened(jnp.asarray(start))


def _side_by_side(
    params_tx: optax.GradientTransformation, logits_tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Train the two fields of a `Trainable` by two optimizers that do not see each other's."""
    params_tx, logits_tx = optax.with_extra_args_support(params_tx), optax.with_extra_args_support(logits_tx)

    def init(trainable: Trainable) -> tuple[Any, Any]:
        return params_tx.init(trainable.params), logits_tx.init(trainable.logits)

    def update(updates: Trainable, state: Any, trainable: Trainable, **extra: Any) -> tuple[Trainable, Any]:
        params, params_state = params_tx.update(updates.params, state[0], trainable.params, **extra)
        logits, logits_state = logits_tx.update(updates.logits, state[1], trainable.logits, **extra)
        return Trainable(params, logits), (params_state, logits_state)

    return optax.GradientTransformationExtraArgs(init, update)
