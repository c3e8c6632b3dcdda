"""Steps on the rows of the batch alone."""

import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import sa_plus_plus as sapp
from configs import mnist
from configs import planted as planted_config
from experiments.models import tables
from experiments.training import factories, program, sharding
from experiments.training.setup import prepare

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS = 12


SHAPES = st.sampled_from([(1, 1), (1, 40), (7, 3), (40, 60)])  # rows of the table, lookups: each is a compilation


@functools.partial(jax.jit, static_argnums=2)
def there_and_back(tree, ids, path):
    """Rows taken, their positions, what is looked up in the small table, and the whole one with 1 added to them."""
    taken = tables.taken(ids, jax.tree.leaves(tree)[-1].shape[0])
    small = tables.take(path, tree, taken.rows)
    moved = tables.put_back(path, tree, jax.tree.map(lambda x: x + 1, small), taken.rows)
    return taken, jax.tree.leaves(small)[-1][taken.positions], moved


@hypothesis.given(SHAPES, st.integers(0, 100))
@problems.examples(10)
def test_taken_rows_are_the_distinct_ones(shape, seed):
    length, lookups = shape
    rng = np.random.default_rng(seed)
    ids, table = rng.integers(0, length, (lookups, 2)).astype(np.int32), rng.normal(size=(length, 3)).astype(np.float32)
    tree = {"other": np.ones(2, np.float32), "table": {"embedding": table}}
    (rows, _), looked_up, whole = there_and_back(tree, ids, "table/embedding")
    distinct = np.unique(ids)
    np.testing.assert_array_equal(rows[: len(distinct)], distinct)
    np.testing.assert_array_equal(rows[len(distinct) :], length)
    np.testing.assert_array_equal(looked_up, table[ids])
    table[distinct] += 1
    np.testing.assert_array_equal(whole["table"]["embedding"], table)
    np.testing.assert_array_equal(whole["other"], 2)


@jax.jit
def both_ways(tree, ids):
    """Lookups in the whole table and in the small one, and the gradients of their sums with respect to the whole."""

    def looked_up(tree, at):
        return nn.Embed(*tree["table"].shape).apply({"params": {"embedding": tree["table"]}}, at)

    def gradient(tree, at):
        return jax.grad(lambda t: jnp.nansum(looked_up(t, at)))(tree)

    rows, positions = tables.taken(ids, tree["table"].shape[0])
    small, zeros = tables.take("table", tree, rows), jax.tree.map(jnp.zeros_like, tree)
    part = tables.put_back("table", zeros, gradient(small, positions), rows)
    return looked_up(tree, ids), looked_up(small, positions), gradient(tree, ids)["table"], part["table"]


@hypothesis.given(SHAPES, st.integers(0, 100))
@problems.examples(10)
def test_lookups_outside_the_table_give_what_they_give_in_all_of_it(shape, seed):
    length, lookups = shape
    rng = np.random.default_rng(seed)
    ids = rng.integers(-2 * length, 2 * length, (lookups, 2)).astype(np.int32)
    ids[0] = length + 1, -1
    table = rng.normal(size=(length, 3)).astype(np.float32)
    whole, small, gradient, gradient_by_part = both_ways({"table": table}, ids)
    inside = (ids >= -length) & (ids < length)
    if length > 1:  # a table of one row is broadcast by flax, whatever the id
        np.testing.assert_array_equal(whole, np.where(inside[..., None], table[ids % length], np.nan))
    np.testing.assert_array_equal(small, whole)
    np.testing.assert_array_equal(gradient_by_part, gradient)


def test_a_step_with_ids_outside_the_table_is_the_same_both_ways():
    losses, ends = [], []
    for rows in ("all", "batch"):
        run = run_of(rows, {"name": "sgd", "momentum": 0.0}, algorithm="dense")
        state = run.functions.init(program.seed_argument((0,)))
        batch = program.next_batch(run, program.train_streams(run, (0,)))
        ids = np.array(batch["ids"])
        ids[3, -1] = run.setup.task.table.length
        state, means = run.functions.step(state, batch | {"ids": ids})
        losses.append(float(means["loss"]))
        ends.append(state.trainable)
    assert np.isnan(losses).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *ends)


def test_only_the_table_itself_is_taken():
    """Not what has a path that ends alike, in parameters, logits or an optimizer's state."""
    params = {"table": {"embedding": jnp.ones((4, 2))}, "a": {"table": {"embedding": jnp.ones((4, 2))}}}
    params["params"] = {"table": {"embedding": jnp.ones((4, 2))}}
    trainable = sapp.Trainable(params, {"table/embedding": jnp.ones((4, 2))})
    rows = jnp.array([1])

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {sapp.path_string(at): x.shape[0] for at, x in leaves if x.ndim}

    def smaller(tree):
        return {at for at, length in shapes(tables.take("table/embedding", tree, rows)).items() if length == 1}

    assert smaller(params) == {"table/embedding"}
    assert smaller(trainable) == {"params/table/embedding"}
    assert smaller(optax.chain(optax.adam(0.1), optax.trace(0.9)).init(trainable)) == {
        "0/0/mu/params/table/embedding",
        "0/0/nu/params/table/embedding",
        "1/trace/params/table/embedding",
    }


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_optimizer_starts_with_zeros_for_a_table(name):
    config = planted_config.get_config().optimizer
    config.update({"name": name, "momentum": 0.9, "schedule": "constant"})
    tx, _ = factories.optimizer(config, 10)
    moments = [x for x in jax.tree.leaves(tx.init(sapp.Trainable({"t": jnp.ones((5, 2))}, {}))) if x.shape == (5, 2)]
    assert moments
    assert not any(x.any() for x in moments)


def run_of(rows, optimizer, algorithm="sequential_attention", seeds=1, devices=1):
    config = planted_config.get_config()
    config.data.options.update({"rows": 3_000, "held_out": 100})
    config.steps, config.batch_size, config.eval_batch_size = STEPS, 16, 100
    config.optimizer.update({"rows": rows, "weight_decay": 0.0, **optimizer})
    config.sparsifier.name = algorithm
    config.sparsifier.schedule = (("dense", 4), ("sparsification", 4), ("sparse", 4))
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    return program.compiled(prepare(config, mesh), seeds)


def states(run, seeds=(0,)):
    """`(batch, state after it)` for each step, the first of them `(None, initial state)`."""
    seed, streams = program.seed_argument(seeds), program.train_streams(run, seeds)
    state = run.functions.init(seed)
    yield None, jax.tree.map(np.array, state)
    for _ in range(STEPS):
        batch = program.next_batch(run, streams)
        ids = np.array(batch["ids"])
        state, _ = run.functions.step(state, batch)
        yield ids, jax.tree.map(np.array, state)


@pytest.mark.parametrize(("seeds", "devices"), [(1, 1), (2, 2)])
def test_where_an_optimizer_has_no_memory_both_ways_are_the_same(seeds, devices):
    ends = []
    for rows in ("all", "batch"):
        run = run_of(rows, {"name": "sgd", "momentum": 0.0}, seeds=seeds, devices=devices)
        *_, (_, last) = states(run, tuple(range(seeds)))
        ends.append((last.trainable, last.prune))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *ends)


def test_adam_on_the_rows_of_the_batch_against_a_masked_adam_on_all():
    """Every row keeps its weights and moments but in the steps whose batch looks it up."""
    run = run_of("batch", {"name": "adamw", "learning_rate": 0.01, "schedule": "constant"}, algorithm="dense")
    task, tx = run.setup.task, optax.adam(0.01)
    walk = states(run)
    _, first = next(walk)
    params, source = first.trainable.params, task.dataset.train
    state = tx.init(params)
    for ids, got in walk:
        label = _labels_of(source, ids)
        batch = {"ids": ids, "label": label}
        grads = jax.grad(lambda p, batch=batch: jnp.mean(task.outputs(p, {}, batch, True)[0]["loss"]))(params)
        updates, new_state = tx.update(grads, state, params)
        touched = np.zeros((task.table.length, 1), bool)
        touched[np.asarray(task.table.rows({"ids": ids})).ravel()] = True

        def keep(new, old, touched=touched):
            return np.where(touched, new, old) if new.shape[:1] == touched.shape[:1] else new

        params = jax.tree.map(keep, optax.apply_updates(params, updates), params)
        state = jax.tree.map(keep, new_state, state)
        assert 0 < touched.mean() < 0.9
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), got.trainable.params, params)


def _labels_of(source, ids):
    """Labels of rows, found by their ids (all features together tell rows apart)."""
    arrays = source.arrays
    at = {row.tobytes(): label for row, label in zip(arrays["ids"], arrays["label"], strict=True)}
    return np.array([at[row.tobytes()] for row in ids.astype(arrays["ids"].dtype)])


def test_moments_of_all_rows_start_afresh_with_a_phase():
    run = run_of("batch", {"name": "sgd", "momentum": 0.9})
    table = run.setup.task.table
    walk, seen = states(run), set()
    next(walk)
    for step, (ids, state) in enumerate(walk):
        (moment,) = (x for x in jax.tree.leaves(state.opt_state) if x.shape[:1] == (table.length,))
        moving = np.flatnonzero((moment != 0).any(1))
        seen = (set() if step in (4, 8) else seen) | set(np.ravel(table.rows({"ids": ids})).tolist())
        assert set(moving.tolist()) <= seen
        assert len(moving) > 0.9 * len(seen)  # all but those whose gradient happens to be zero


def test_models_without_a_table_are_refused():
    config = mnist.get_config()
    config.batch_size = config.eval_batch_size = 96
    config.optimizer.rows = "batch"
    with pytest.raises(ValueError, match=r'config\.optimizer\.rows="batch" is for models with an embedding table'):
        prepare(config)
    config.optimizer.rows = "rows"
    with pytest.raises(ValueError, match=r"config\.optimizer\.rows"):
        prepare(config)
