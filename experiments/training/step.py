"""A run's pure functions: initialise, step, evaluate, finish; for one seed or mapped over several."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sa_plus_plus as sapp
from experiments import tasks
from experiments.models import tables
from experiments.training import evaluation, weights
from experiments.training.setup import Setup


class TrainState(NamedTuple):
    """Everything that a step changes. The number of steps done is `prune.step`.

    Attributes:
      trainable: weights and logits.
      prune: masks, step, phase.
      opt_state: the optimizer's.
      model_state: what the model carries itself, such as running averages; may be empty.
      sparse_masks: those of the latest sparse phase: what the next one's churn is measured against.
    """

    trainable: sapp.Trainable
    prune: sapp.PruneState
    opt_state: optax.OptState
    model_state: Any
    sparse_masks: dict[str, jax.Array]


class Functions(NamedTuple):
    """The pure functions of a run.

    Attributes:
      init: `init(seed, start=None) -> state`; the seed is an integer, or a tracer to be mapped over; `start` has
        trained weights, the same for all seeds, as `Setup.start`.
      step: `step(state, batch, teacher=None) -> (state, {name: mean over the batch, and churn})`; `teacher` as
        `Setup.teacher`, for runs with one.
      evaluate: `evaluate(state, batch) -> ({name: sum over the batch's real examples, and weight}, ranked)`.
      finalize: `finalize(state) -> (params, model_state)`: the pruned network.
    """

    init: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., tuple[dict[str, jax.Array], Any]]
    finalize: Callable[..., Any]


def functions(setup: Setup) -> Functions:
    """The pure functions of a run."""
    task, tx, sp = setup.task, setup.tx, setup.sparsifier

    def init(seed: Any, start: weights.Variables | None = None) -> TrainState:
        key = jax.random.key(seed)
        params, model_state = task.init(key)
        if start is not None:
            given, state = jax.tree.map(jnp.copy, start)  # buffers of its own, as below
            params, model_state = given, model_state if state is None else state
        trainable, prune = sp.init(params, key)
        # Its own buffers: a state is donated leaf by leaf.
        sparse_masks = jax.tree.map(jnp.copy, prune.masks)
        return TrainState(trainable, prune, tx.init(trainable), model_state, sparse_masks)

    def step(
        state: TrainState,
        batch: Any,
        teacher: weights.Variables | None = None,
        outputs_of: Callable[..., Any] = task.outputs,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        if teacher is not None:
            outputs_of = functools.partial(outputs_of, teacher=teacher)

        def mean_loss(trainable: sapp.Trainable) -> tuple[jax.Array, Any]:
            params = sp.apply(trainable, state.prune)
            outputs, model_state = outputs_of(params, state.model_state, batch, training=True)
            means = evaluation.mean(outputs, batch.get("weight"))
            return means["loss"], (means, model_state)

        grads, (means, model_state) = jax.grad(mean_loss, has_aux=True)(state.trainable)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable, phase=state.prune.phase)
        trainable, prune = sp.update(state.trainable, state.prune, updates, grads)
        entered = (prune.phase != state.prune.phase) & sp.phases.kind_in(["sparse"], prune.step)
        churn = list(sapp.metrics.churn(state.sparse_masks, prune.masks).values())
        sparse_masks = jax.tree.map(lambda new, old: jnp.where(entered, new, old), prune.masks, state.sparse_masks)
        state = TrainState(trainable, prune, opt_state, model_state, sparse_masks)
        return state, means | ({"churn": jnp.mean(jnp.stack(churn))} if churn else {})

    def evaluate_batch(state: TrainState, batch: Any) -> tuple[dict[str, jax.Array], Any]:
        return evaluate(task, sp.apply(state.trainable, state.prune), state.model_state, batch)

    def finalize(state: TrainState) -> Any:
        return sp.finalize(state.trainable, state.prune), state.model_state

    return Functions(init, _on_rows(step, setup) if setup.table else step, evaluate_batch, finalize)


def evaluate(
    task: tasks.Task, params: Any, model_state: Any, batch: Any
) -> tuple[dict[str, jax.Array], evaluation.Ranked | None]:
    """What `evaluation.means` takes of a batch: sums of the outputs over its real examples, and what is ranked."""
    outputs, _ = task.outputs(params, model_state, batch, training=False)
    ranked = None
    if task.ranked:
        scores, labels = (outputs[name] for name in task.ranked)
        ranked = evaluation.Ranked(scores, labels, batch["weight"])
    return evaluation.weighted_sums(outputs, batch["weight"]), ranked


def _on_rows(step: Callable[..., Any], setup: Setup) -> Callable[..., Any]:
    """The same step with the table cut down to the rows of the batch, which are then put back."""
    table, phases = setup.table, setup.sparsifier.phases
    assert table is not None
    path = table.path

    def step_on_rows(state: TrainState, batch: Any, teacher: None = None) -> tuple[TrainState, dict[str, jax.Array]]:
        rows, positions = tables.taken(table.rows(batch), table.length)
        opt_state = tables.fresh_at(phases.is_boundary(state.prune.step), path, state.opt_state)
        small = state._replace(
            trainable=tables.take(path, state.trainable, rows), opt_state=tables.take(path, opt_state, rows)
        )
        outputs_of = table.outputs(rows.shape[0])
        small, means = step(small, batch | {"positions": positions}, outputs_of=outputs_of)
        return small._replace(
            trainable=tables.put_back(path, state.trainable, small.trainable, rows),
            opt_state=tables.put_back(path, opt_state, small.opt_state, rows),
        ), means

    return step_on_rows


def _axes() -> TrainState:
    """Which axis of a state's arrays is that of the seeds."""
    prune: Any = sapp.PruneState(step=None, phase=None, masks=0, key=0)  # type: ignore[arg-type]  # axes, not arrays
    return TrainState(0, prune, 0, 0, 0)  # type: ignore[arg-type]


def of_seed(state: TrainState, number: int) -> TrainState:
    """One seed's part of a state of several."""
    alone = jax.tree.map(lambda x: x[number], _counting(state, None, None))
    return _counting(alone, state.prune.step, state.prune.phase)


def side_by_side(states: Sequence[TrainState]) -> TrainState:
    """The state of several seeds from one of each, after the same steps."""
    together = jax.tree.map(lambda *x: jnp.stack(x), *(_counting(state, None, None) for state in states))
    return _counting(together, states[0].prune.step, states[0].prune.phase)


def _counting(state: TrainState, step: Any, phase: Any) -> TrainState:
    return state._replace(prune=state.prune._replace(step=step, phase=phase))


def over_seeds(fns: Functions) -> Functions:
    """The same for several seeds at once: every argument and result gains a leading axis, but for the test batch and
    weights to start or to learn from.

    The step counter and the phase are the same for all seeds and stay scalars, so that the choice of masks remains a
    branch: mapped over, it would be computed at every step.
    """
    axes = _axes()

    def init(seeds: Any, start: weights.Variables | None = None) -> TrainState:
        return jax.vmap(fns.init, in_axes=(0, None), out_axes=axes)(seeds, start)

    def step(
        state: TrainState, batch: Any, teacher: weights.Variables | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return jax.vmap(fns.step, in_axes=(axes, 0, None), out_axes=(axes, 0))(state, batch, teacher)

    return Functions(
        init=init,
        step=step,
        evaluate=jax.vmap(fns.evaluate, in_axes=(axes, None)),
        finalize=jax.vmap(fns.finalize, in_axes=(axes,)),
    )
