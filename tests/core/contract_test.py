"""What every algorithm promises, through one table.

Where it matters what an algorithm does, all of them run; where only its parts matter, such as for types or devices, one
of each kind. Where types matter, kinds run in bfloat16 too.
"""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sa_plus_plus as sapp

every_algorithm = pytest.mark.parametrize("name", problems.NAMES)
every_kind = pytest.mark.parametrize("name", problems.KINDS)
TYPED = [*((name, "float32") for name in problems.NAMES), *((name, "bfloat16") for name in problems.KINDS)]
every_dtype = pytest.mark.parametrize(("name", "dtype"), TYPED)


def whole_run(step, run, dtype, first=0, last=problems.STEPS):
    for i in range(first, last):
        run = step(run, problems.batch(i, dtype))
    return run


def masks_of(tree):
    return {path: np.asarray(mask) for path, mask in tree.prune.masks.items()}


@every_algorithm
def test_unknown_option_raises(name):
    with pytest.raises(TypeError, match=f"{name}.*unexpected keyword argument 'blokc'"):
        problems.sparsifier(name, blokc=3)


@every_dtype
def test_tree_shapes_and_dtypes_are_kept(name, dtype):
    params = problems.network(dtype=dtype)
    sp, step = problems.algorithm(name)
    run = jax.eval_shape(functools.partial(problems.start, sp), params)
    after = jax.eval_shape(step, run, problems.batch(0, dtype))
    chex.assert_trees_all_equal_shapes_and_dtypes(run, after)
    for tree in (*(jax.eval_shape(f, *run[:2]) for f in (sp.apply, sp.finalize)), after.trainable.params):
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, params)


@every_dtype
def test_starts_as_the_model_does(name, dtype):
    params = problems.network(dtype=dtype)
    sp, _ = problems.algorithm(name)
    run = problems.start(sp, params)
    expected = params
    if sp.phases.phases[0].kind == "sparse":
        expected = sp.finalize(sapp.Trainable(params, {}), run.prune)
    chex.assert_trees_all_close(sp.apply(*run[:2]), expected, rtol=1e-6 if dtype == "float32" else 2e-2)


@every_dtype
def test_compiles_once_in_a_whole_run(name, dtype):
    sp, step = problems.algorithm(name)
    run = step(problems.start(sp, problems.network(dtype=dtype)), problems.batch(0, dtype))
    programs = step._cache_size()
    run = whole_run(step, run, dtype, first=1)
    assert step._cache_size() == programs
    assert run.prune.step == problems.STEPS


@every_dtype
def test_donated_state_is_reused(name, dtype):
    sp, step = problems.algorithm(name)
    run = problems.start(sp, problems.network(dtype=dtype))
    after = step(run, problems.batch(0, dtype))  # warnings are errors: JAX warns of donated buffers it could not use
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(run))
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(after))


def buffers(tree):
    """Where each array of a tree lies in memory."""

    def address(leaf):
        if isinstance(leaf, np.ndarray):
            return leaf.ctypes.data
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return (jax.random.key_data(leaf) if is_key else leaf).unsafe_buffer_pointer()

    return [address(leaf) for leaf in jax.tree.leaves(tree)]


def assert_apart(result, *given):
    """No array of the result is in a buffer of another, or of an argument."""
    own = buffers(result)
    assert len(set(own)) == len(own), "two arrays share a buffer, so that donating both would fail"
    assert not set(own) & set(buffers(given)), "an array is an argument's, which donating it would delete"


def mixed_network():
    """The network with what else may be in a tree: arrays of NumPy, one array twice, integers, a random key."""
    params = problems.network()
    rest = {"key": jax.random.key(3), "steps": jnp.arange(5), "on": jnp.asarray([True, False])}
    params["rest"] = {**rest, "tied": params["head"]["bias"], "numpy": np.linspace(0, 1, 9, dtype=np.float32)}
    params["wide"]["kernel"] = np.asarray(params["wide"]["kernel"])
    return params


@pytest.mark.parametrize(
    ("name", "jit"), [*((name, None) for name in problems.KINDS), ("sequential_attention", jax.jit)]
)
def test_results_share_no_buffer_with_arguments_or_each_other(name, jit):
    """So that any of them may be donated, as the docs recommend."""
    sp, _ = problems.algorithm(name)
    init, apply, update, finalize, sync = map(jit, sp[:5]) if jit else sp[:5]
    params = mixed_network()
    for key in (None, jax.random.key(5), jax.random.key_data(jax.random.key(5))):
        state = init(params, key)
        assert_apart(state, params, key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that has not ended
        assert_apart(finalize(*state), state)
    given = apply(*state)
    assert_apart(given, state)
    assert_apart(sync(*state, given), state, given)
    assert_apart(update(*state), state)
    updates = jax.tree.map(jnp.ones_like, state[0])
    updates.params["rest"] = dict.fromkeys(params["rest"])  # None: left as they are
    after = update(*state, updates, state[0])
    assert_apart(after, state, updates)
    np.testing.assert_array_equal(after[0].params["rest"]["steps"], np.arange(5))


@every_kind
def test_both_loops_may_donate_all_they_hold(name):
    """From the network that the docs say to start from; the caller's own survives."""
    sp, _ = problems.algorithm(name)
    own, expected = problems.network(), jax.device_get(problems.network())
    inner = optax.trace(0.9)
    if name == "powerpropagation":  # with an optimizer whose state holds the weights once more, and hyperparameters
        inner = optax.inject_hyperparams(optax.contrib.schedule_free_sgd)(learning_rate=0.05)
    tx, tx_inside = sapp.sparsify(sapp.reset_on(inner), sp), sapp.reset_on(optax.trace(0.9))
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        state = tx.init(own)
        assert_apart(state, own)
        params = sp.finalize(state.trainable, state.prune)
        assert_apart(params, state)
        grads = jax.tree.map(jnp.ones_like, params)
        if name == "powerpropagation":  # in eager mode, where results are not copied in any case
            assert_apart(tx.update(grads, state, params), grads, state, params)

        def one_line(params, state):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        donating = jax.jit(one_line, donate_argnums=(0, 1))
        for _ in range(2):
            params, state = donating(params, state)

        def explicit(trainable, prune, opt_state):
            gradients = sapp.Trainable(grads, jax.tree.map(jnp.ones_like, trainable.logits))
            updates, opt_state = tx_inside.update(gradients, opt_state, trainable, phase=prune.phase)
            return *sp.update(trainable, prune, updates, gradients), opt_state

        trainable, prune = sp.init(own)
        run = trainable, prune, tx_inside.init(trainable)
        donating = jax.jit(explicit, donate_argnums=(0, 1, 2))
        for _ in range(2):
            run = donating(*run)
    chex.assert_trees_all_equal(jax.device_get(own), expected)


@every_kind
def test_vmap_over_seeds(name):
    sp, step = problems.algorithm(name)
    singles = [problems.start(sp, problems.network(seed)) for seed in range(3)]
    together = jax.jit(jax.vmap(functools.partial(problems.start, sp)))(
        jax.tree.map(lambda *x: jnp.stack(x), *map(problems.network, range(3)))
    )
    vmapped = jax.jit(jax.vmap(functools.partial(problems.step, sp), in_axes=(0, None)))
    for i in range(20):
        data = problems.batch(i)
        together, singles = vmapped(together, data), [step(run, data) for run in singles]
    for seed, run in enumerate(singles):
        one = jax.tree.map(lambda x, seed=seed: x[seed], together)
        chex.assert_trees_all_equal(one.prune, run.prune)
        chex.assert_trees_all_close(one.trainable, run.trainable, atol=1e-5)


@every_kind
def test_sharded_over_eight_devices_equals_one(name):
    assert len(jax.devices()) == 8, "conftest.py asks XLA for 8 host devices"
    sp, step = problems.algorithm(name)
    one = problems.start(sp, problems.network())
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(AxisType.Auto,))

    def place(leaf):
        """Cut along the first axis that 8 divides, else replicate."""
        cut = next((i for i, n in enumerate(leaf.shape) if n % 8 == 0), None)
        spec = PartitionSpec(*["shard" if i == cut else None for i in range(leaf.ndim)])
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    many = jax.tree.map(place, problems.start(sp, problems.network()))
    assert not many.trainable.params["conv"]["kernel"].sharding.is_fully_replicated
    many, one = (whole_run(step, run, "float32") for run in (many, one))
    chex.assert_trees_all_equal(masks_of(many), masks_of(one))
    chex.assert_trees_all_close(many.trainable, one.trainable, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype", "separate_logits"),
    [
        *((*typed, False) for typed in TYPED),
        ("acdc", "float32", True),  # has no logits
        *(("sequential_attention", dtype, True) for dtype in ("float32", "bfloat16")),
    ],
)
def test_explicit_use_equals_one_line(name, dtype, separate_logits):
    sp, step = problems.algorithm(name)
    params = problems.network(dtype=dtype)
    run = problems.start(sp, params)
    tx = sapp.sparsify(problems.optimizer(), sp, problems.optimizer() if separate_logits else None)

    @jax.jit
    def one_line(params, state, data):
        grads = jax.grad(problems.loss)(params, data)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    params = sp.apply(state.trainable, state.prune)  # only matters where a schedule begins sparse
    # bfloat16: both round their effective weights alike, but not the gradients that led there.
    steps = problems.STEPS if dtype == "float32" else 10
    for i in range(steps):
        data = problems.batch(i, dtype)
        run = step(run, data)
        with jax.numpy_dtype_promotion("standard"):  # optax: schedules, and bfloat16 plus float32
            params, state = one_line(params, state, data)
        if i % 4 and i + 1 < steps:
            continue
        chex.assert_trees_all_equal(state.prune, run.prune)
        tolerance = {"atol": 1e-5} if dtype == "float32" else {"atol": 2e-2, "rtol": 2e-2}
        chex.assert_trees_all_close(params, sp.apply(*run[:2]), **tolerance)
        masked = [path for path in run.prune.masks if not np.asarray(run.prune.masks[path]).all()]
        for path in masked:
            zero = ~np.asarray(sapp.blocks.expand_blocks(run.prune.masks[path], *_shape_and_block(sp, params, path)))
            assert not np.asarray(_leaf(params, path))[zero].any()


def _leaf(params, path):
    layer, leaf = path.split("/")
    return params[layer][leaf]


def _shape_and_block(sp, params, path):
    layer = sp.plan(params).pruned[path]
    return layer.shape, layer.block


@every_dtype
def test_finalize_prunes_exactly_as_planned(name, dtype):
    sp, step = problems.algorithm(name)
    run = whole_run(step, problems.start(sp, problems.network(dtype=dtype)), dtype)
    final = sp.finalize(*run[:2])
    pruned = sp.plan(final).pruned
    assert (set(pruned) == {"conv/kernel", "wide/kernel"}) == (name != "dense")
    for path, layer in pruned.items():
        blocks = sapp.blocks.to_blocks(_leaf(final, path), layer.block)
        alive = np.asarray(blocks != 0).any(axis=(1, 3))
        assert alive.sum() == layer.kept == sapp.select.kept_blocks(layer.blocks, 0.8)
        np.testing.assert_array_equal(alive, np.asarray(run.prune.masks[path]))
        assert not np.signbit(
            np.asarray(blocks, np.float32)[~alive[:, None, :, None] & np.ones(blocks.shape, bool)]
        ).any()
    data = problems.batch(0, dtype)
    assert problems.loss(final, data) == problems.loss(sp.apply(*run[:2]), data)


@every_dtype
def test_saved_and_restored_in_any_phase_continues_bit_for_bit(name, dtype):
    sp, step = problems.algorithm(name)
    run = problems.start(sp, problems.network(dtype=dtype))
    saved, middles = {}, {(p.start + p.stop) // 2 for p in sp.phases.phases}
    starts = {p.start for p in sp.phases.phases}
    for i in range(problems.STEPS):
        if i in middles | starts:
            saved[i] = serialization.to_bytes(run)
        run = step(run, problems.batch(i, dtype))
    blank = problems.start(sp, problems.network(7, dtype))
    for i, data in saved.items():
        restored = jax.tree.map(jnp.asarray, serialization.from_bytes(blank, data))
        chex.assert_trees_all_equal(whole_run(step, restored, dtype, first=i), run)


@every_algorithm
def test_run_learns(name):
    sp, step = problems.algorithm(name)
    run = problems.start(sp, problems.network())
    before = problems.loss(sp.apply(*run[:2]), problems.batch(0))
    run = whole_run(step, run, "float32")
    assert problems.loss(sp.finalize(*run[:2]), problems.batch(0)) < 0.9 * before
