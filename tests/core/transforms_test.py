"""`reset_on` and `sparsify`: what they reset, what they refuse, where weight decay goes."""

import functools
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sa_plus_plus as sapp

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_reset_on_resets_what_it_wraps_and_nothing_else():
    schedule = optax.exponential_decay(1.0, 1, 0.5)
    tx = optax.chain(sapp.reset_on(optax.scale_by_adam()), optax.scale_by_learning_rate(schedule))
    params = {"w": jnp.arange(3.0)}
    grads = {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(grads, state, params, phase=jnp.asarray(0))
    assert state[0].inner.count == 4
    updates, state = tx.update(grads, state, params, phase=jnp.asarray(1))
    fresh, _ = optax.scale_by_adam().update(grads, optax.scale_by_adam().init(params))
    assert state[0].inner.count == 1, "Adam starts afresh, its bias correction too"
    assert state[1].count == 5, "the schedule goes on"
    chex.assert_trees_all_close(updates, jax.tree.map(lambda u: -(0.5**4) * u, fresh))
    _, state = tx.update(grads, state, params, phase=jnp.asarray(1))
    assert state[0].inner.count == 2


def test_a_rate_set_by_hand_outlives_a_reset():
    tx = sapp.reset_on(optax.inject_hyperparams(optax.adam)(learning_rate=0.1))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    state.inner.hyperparams["learning_rate"] = jnp.asarray(0.025)
    for phase in (0, 0, 1):
        updates, state = tx.update({"w": jnp.ones(3)}, state, params, phase=phase)
    assert state.inner.inner_state[0].count == 1
    np.testing.assert_allclose(updates["w"], -0.025, rtol=1e-6)


@pytest.mark.parametrize("nested", ["inside", "outside"])
def test_a_postponed_update_does_not_lose_the_reset(nested):
    """The phase changes on a step that only accumulates: the next real update starts afresh all the same."""
    adam = optax.scale_by_adam()
    tx = sapp.reset_on(optax.MultiSteps(adam, 2)) if nested == "inside" else optax.MultiSteps(sapp.reset_on(adam), 2)
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.ones(3)}
    state = tx.init(params)
    for phase in (0, 0, 1, 1):
        _, state = tx.update(grads, state, params, phase=jnp.asarray(phase))
    inner = state.inner.inner_opt_state if nested == "inside" else state.inner_opt_state.inner
    assert inner.count == 1


def test_a_discarded_update_does_not_lose_the_reset():
    tx = optax.apply_if_finite(sapp.reset_on(optax.scale_by_adam()), max_consecutive_errors=5)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for phase, value in ((0, 1.0), (0, 1.0), (1, np.nan), (1, 1.0)):
        _, state = tx.update({"w": jnp.full(3, value)}, state, params, phase=jnp.asarray(phase))
    assert state.inner_state.inner.count == 1


def test_forgotten_phase_and_params_raise():
    tx = sapp.reset_on(optax.trace(0.9))
    params = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match="phase"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="reset_on needs the current parameters"):
        tx.update(params, tx.init(params), phase=1)
    tx = sapp.sparsify(optax.sgd(0.1), problems.sparsifier("magnitude"))
    params = problems.network()
    with pytest.raises(ValueError, match="sparsify needs the current parameters"):
        tx.update(params, tx.init(params))


def test_weight_decay_reaches_logits_but_not_masked_weights():
    phases = sapp.phases.custom(4, [("sparsification", 2), ("sparse", 2)])
    sp = sapp.sequential_attention(block=(2, 2), sparsity=0.5, phases=phases)
    trainable, prune = sp.init(problems.network())
    ramp = {path: jnp.linspace(-1, 1, x.size).reshape(x.shape) for path, x in trainable.logits.items()}
    trainable = trainable._replace(logits=ramp)
    update = jax.jit(sp.update)
    for _ in range(2):
        trainable, prune = update(trainable, prune)
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.scale(-1.0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, trainable), tx.init(trainable), trainable)
    after, _ = update(trainable, prune, updates)
    for path, layer in sp.plan(trainable.params).pruned.items():
        name = path.split("/")[0]
        mask = np.asarray(sapp.blocks.expand_blocks(prune.masks[path], layer.shape, layer.block))
        old, new = (np.asarray(t.params[name]["kernel"]) for t in (trainable, after))
        assert 0 < mask.mean() < 1
        np.testing.assert_array_equal(new[~mask], old[~mask])
        np.testing.assert_allclose(new[mask], 0.9 * old[mask], rtol=1e-6)
        np.testing.assert_allclose(after.logits[path], 0.9 * ramp[path], rtol=1e-6)


def test_logits_may_have_an_optimizer_of_their_own():
    params = problems.network()
    seen = []

    def spy(updates, state, params=None):
        seen.append(jax.tree.structure(updates))
        return updates, state

    tx = optax.chain(optax.GradientTransformation(lambda p: optax.EmptyState(), spy), optax.sgd(0.1))
    tx = sapp.sparsify(tx, problems.sparsifier("sequential_attention"), logits_tx=optax.sgd(0.0))
    grads = jax.grad(problems.loss)(params, problems.batch(0))
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert seen == [jax.tree.structure(params)], "the weights' optimizer sees the user's own tree"
    assert all(not np.any(x) for x in state.trainable.logits.values())


# All parametrisations: weights alone, by their norm, with logits, drawn by a key; and none.
one_of_each_kind = pytest.mark.parametrize(
    "name", ["acdc", "powerpropagation", "sequential_attention", "random", "dense"]
)


@functools.cache
def one_line_step(name, tx=None):
    """The jitted step of a loop around `sparsify`, and its transformation."""
    tx = tx or sapp.sparsify(problems.optimizer(), problems.algorithm(name)[0])

    @jax.jit
    def step(params, state, data):
        grads = jax.grad(problems.loss)(params, data)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


@one_of_each_kind
def test_parameters_loaded_after_init_are_what_is_trained(name):
    """As `TrainState` users do: random weights to `tx.init`, then the trained ones into the loop."""
    sp, _ = problems.algorithm(name)
    tx, step = one_line_step(name)
    loaded, run = problems.network(seed=5), problems.start(sp, problems.network(seed=5))
    params, state = loaded, tx.init(problems.network(seed=0))
    if sp.phases.phases[0].kind == "sparse":  # its mask does not depend on weights
        params = sp.finalize(run.trainable, run.prune)
    for i in range(problems.STEPS // 2):
        params, state = step(params, state, problems.batch(i))
        run = problems.algorithm(name)[1](run, problems.batch(i))
    chex.assert_trees_all_equal(state.prune.masks, run.prune.masks)
    chex.assert_trees_all_close(params, sp.apply(run.trainable, run.prune), atol=2e-5)


def test_what_the_loop_does_to_parameters_counts():
    """Clipped by the loop after each update: training goes on from the clipped weights, in float64 by NumPy too."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(20, 20)), jnp.float32)}
    sp = sapp.magnitude(block=2, sparsity=0.5, phases=sapp.phases.custom(6, [("dense", 3), ("sparse", 3)]))
    tx = sapp.sparsify(optax.sgd(0.1), sp)
    state, step = tx.init(params), jax.jit(tx.update)
    w, mask = np.asarray(params["w"], np.float64), np.ones((20, 20))
    for i in range(6):
        updates, state = step({"w": 0.5 * params["w"]}, state, params)  # of the loss w^2 / 4
        params = jax.tree.map(lambda x: jnp.clip(x, -0.4, 0.4), optax.apply_updates(params, updates))
        w = np.where(mask, w - 0.1 * 0.5 * w, w)
        if i + 1 == 3:
            norms = np.sqrt((w.reshape(10, 2, 10, 2) ** 2).sum((1, 3)))
            mask = np.kron(norms > np.sort(norms.ravel())[49], np.ones((2, 2)))
        w = np.where(mask, np.clip(w, -0.4, 0.4), w)
        np.testing.assert_allclose(params["w"], w * mask, atol=1e-6)


@pytest.mark.parametrize("name", problems.NAMES)
def test_adopted_parameters_are_the_effective_ones(name):
    """In every algorithm, with trained logits and masks; what is masked stays zero, and as it was."""
    sp, step = problems.algorithm(name)
    run = problems.start(sp, problems.network())
    for i in range(25):  # into a sparsification, sparse or dense phase
        run = step(run, problems.batch(i))
    effective = sp.apply(*run[:2])
    same = sp.sync_from_params(run.trainable, run.prune, effective)
    chex.assert_trees_all_equal(same, run.trainable)
    wanted = jax.tree.map(lambda x, y: 0.5 * x + y, effective, problems.network(seed=3))
    adopted = jax.jit(sp.sync_from_params)(run.trainable, run.prune, wanted)
    got = sp.apply(adopted, run.prune)
    chex.assert_trees_all_equal(adopted.logits, run.trainable.logits)
    for layer in sp.plan(wanted).leaves:
        name, leaf = layer.path.split("/")
        alive = np.ones(layer.shape, bool)
        if layer.path in run.prune.masks:
            alive = np.asarray(sapp.blocks.expand_blocks(run.prune.masks[layer.path], layer.shape, layer.block))
        np.testing.assert_allclose(got[name][leaf], wanted[name][leaf] * alive, rtol=2e-5, atol=1e-6)
        old, new = (np.asarray(tree.params[name][leaf]) for tree in (run.trainable, adopted))
        np.testing.assert_array_equal(new[~alive], old[~alive])


def test_a_block_whose_scale_is_zero_stays_as_it_was():
    phases = sapp.phases.sequential_attention(problems.STEPS)
    sp = sapp.sequential_attention(block=(2, 2), sparsity=0.8, phases=phases, clip=(0.0, 2.0))
    trainable, prune = sp.init(problems.network())
    logits = {path: x.at[0, 0].set(-1e9) for path, x in trainable.logits.items()}
    trainable = trainable._replace(logits=logits)
    wanted = jax.tree.map(lambda x: x + 1, sp.apply(trainable, prune))
    adopted = sp.sync_from_params(trainable, prune, wanted)
    for name in ("conv", "wide"):
        old, new, want = (np.asarray(t[name]["kernel"]) for t in (trainable.params, adopted.params, wanted))
        old, new, want = (x.reshape(-1, x.shape[-1]) for x in (old, new, want))
        np.testing.assert_array_equal(new[:2, :2], old[:2, :2])
        got = np.asarray(sp.apply(adopted, prune)[name]["kernel"]).reshape(old.shape)
        np.testing.assert_allclose(np.delete(got, [0, 1], 0), np.delete(want, [0, 1], 0), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype", "jit"),
    [
        ("magnitude", "float32", lambda step: step),
        ("magnitude", "bfloat16", jax.jit),
        *((name, "float32", jax.jit) for name in ("magnitude", "powerpropagation", "sequential_attention", "dense")),
    ],
)
def test_small_changes_by_the_loop_count_beside_large_entries(name, dtype, jit):
    """Averages, decay and clipping by hand, of entries from 1e-4 to 100: as in a loop without pruning."""
    size = np.geomspace(1e-4, 100, 400) * np.random.default_rng(0).choice([-1, 1], 400)
    own = {"w": size.reshape(20, 20), "small": size[:40], "mean": np.asarray([0.9, 100.0]), "set": size[::40]}
    own = jax.tree.map(lambda x: jnp.asarray(x, dtype), own)
    sp = problems.sparsifier(name, 600, **({} if name == "dense" else {"where": lambda path: path == "w"}))
    tx = sapp.sparsify(sapp.reset_on(optax.sgd(0.1, 0.9)), sp)
    state, update = tx.init(own), jit(tx.update)
    if name == "sequential_attention":  # trained logits, so that blocks are scaled
        ramp = {path: jnp.linspace(-0.3, 0.3, x.size).reshape(x.shape) for path, x in state.trainable.logits.items()}
        state = state._replace(trainable=state.trainable._replace(logits=ramp))
    decay = 1e-6 if dtype == "float32" else 0.02

    def by_hand(params, i):
        return {
            "w": params["w"] * (1 - decay),
            "small": jnp.clip(params["small"], -3e-4, 2e-4),
            "mean": (0.5 * params["mean"] + jnp.asarray([0.005, 50], dtype)).astype(dtype),
            "set": params["set"].at[i % 10].set(i * 1e-5),
        }

    zeros, params, plain = jax.tree.map(jnp.zeros_like, own), own, own
    for i in range(12):
        updates, state = update(zeros, state, params)
        params = by_hand(optax.apply_updates(params, updates), i)
        plain = by_hand(plain, i)
    chex.assert_trees_all_equal(*({**tree, "w": 0} for tree in (params, plain)))
    np.testing.assert_allclose(np.asarray(params["mean"], np.float32)[0], 0.01, rtol=0.03)
    np.testing.assert_allclose(  # where blocks are scaled, to the rounding of that
        *(np.asarray(tree["w"], np.float64) for tree in (params, plain)),
        rtol=1e-6 if name in ("powerpropagation", "sequential_attention") else 0,
    )
    lost = np.asarray(own["w"], np.float64) / np.asarray(params["w"], np.float64) - 1
    np.testing.assert_allclose(lost, 12 * decay, rtol=0.3)


@one_of_each_kind
def test_an_untouched_loop_trains_what_it_holds(name):
    """Whose entries are those that were handed out, up to the rounding of a step from the old ones."""
    sp, _ = problems.algorithm(name)
    tx, step = one_line_step(name)
    params, state = problems.network(), tx.init(problems.network())
    params = sp.apply(state.trainable, state.prune)
    for i in range(5):
        before, (params, state) = params, step(params, state, problems.batch(i))
        handed = sp.apply(state.trainable, state.prune)
        for p, old, new in zip(*map(jax.tree.leaves, (params, before, handed)), strict=True):
            assert (np.abs(p - new) <= 2e-7 * (np.abs(old) + np.abs(new))).all()
    adopted = sp.sync_from_params(state.trainable, state.prune, params)
    chex.assert_trees_all_close(adopted, state.trainable, rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(sp.apply(adopted, state.prune), params, rtol=3e-7, atol=0)


def test_masked_weights_outlive_parameters_rounded_by_the_loop():
    sp = sapp.acdc(block=2, sparsity=0.5, form="masking", phases=sapp.phases.custom(6, [("dense", 2), ("sparse", 4)]))
    tx, params = sapp.sparsify(optax.sgd(0.1), sp), {"w": jax.random.normal(jax.random.key(0), (20, 20))}
    state, step = tx.init(params), jax.jit(tx.update)
    for i in range(6):
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        updates, state = step(half, state, half)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        masked = ~np.asarray(sapp.blocks.expand_blocks(state.prune.masks["w"], (20, 20), (2, 2)))
        if i == 1:
            kept = np.asarray(state.trainable.params["w"])[masked]
    assert kept.size == 200
    np.testing.assert_array_equal(np.asarray(state.trainable.params["w"])[masked], kept)


def test_gradients_of_other_types_and_integer_leaves():
    params = {"w": jnp.ones((20, 20), jnp.bfloat16), "steps": jnp.asarray(3)}
    sp = sapp.magnitude(block=2, sparsity=0.5, phases=sapp.phases.custom(4, [("dense", 2), ("sparse", 2)]))
    tx = sapp.sparsify(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.25)), sp)
    for steps in (jnp.asarray(0), None, np.zeros((), jax.dtypes.float0)):  # as the frameworks have it
        grads = {"w": jnp.ones((20, 20), jnp.float32), "steps": steps}
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        after = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(np.asarray(after["w"], np.float32), 1 - 0.25 * 1.5)
        assert after["steps"] == state.trainable.params["steps"] == 3  # not decayed


def test_a_gradient_of_none_is_zero():
    tx = sapp.sparsify(optax.sgd(0.1), problems.sparsifier("magnitude", where=lambda path: path == "w"))
    params = {
        "w": jnp.ones((40, 40)),
        "b": jnp.ones(3),
        "count": jnp.arange(3),
        "function": None,
    }  # as Equinox has them
    grads = {"w": jnp.ones((40, 40)), "b": None, "count": None, "function": None}
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)
    for name in ("b", "count"):
        np.testing.assert_array_equal(updates[name], 0)
        assert updates[name].dtype == params[name].dtype


@pytest.mark.parametrize("whole", [False, True])
def test_a_reset_takes_the_whole_model_where_a_part_is_trained(whole):
    """As optax does: `update` may be given what is no array, where `init` was given None."""
    tx = sapp.reset_on(optax.adamw(0.1))
    arrays = {"w": jnp.ones(3), "function": None, "rest": None}
    grads, model = arrays, {"w": jnp.ones(3), "function": jnp.tanh, "rest": jnp.arange(2)}
    state = tx.init(arrays)
    for phase in (0, 0, 1):
        updates, state = tx.update(grads, state, model if whole else arrays, phase=phase)
    assert state.inner[0].count == 1
    np.testing.assert_allclose(updates["w"], -0.1 * (1 + 1e-4), rtol=1e-5)
    assert updates["function"] is updates["rest"] is None


def test_a_layer_frozen_from_outside_is_named():
    sp = sapp.magnitude(block=2, sparsity=0.8, phases=sapp.phases.custom(1, [("sparse", 1)]))
    params, frozen = problems.network(), {"conv": "trained", "wide": "frozen", "head": "trained"}
    around = (
        optax.partition({"trained": sapp.sparsify(optax.sgd(0.1), sp), "frozen": optax.set_to_zero()}, frozen),
        optax.chain(
            sapp.sparsify(optax.sgd(0.1), sp),
            optax.masked(optax.set_to_zero(), {name: label == "frozen" for name, label in frozen.items()}),
        ),
    )
    for tx in around:
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        after = optax.apply_updates(params, updates)
        with pytest.raises(ValueError, match=r"1 of 2 layers .* freezes the layer, such as optax.masked") as error:
            sapp.check_pruned(after, sp.plan(params))
        assert re.findall(r"^  (.*?):", str(error.value), flags=re.M) == ["wide/kernel"]


def test_trees_that_do_not_fit_are_refused_by_name():
    params = problems.network()
    tx = sapp.sparsify(optax.sgd(0.1), problems.sparsifier("magnitude"))
    state, part = tx.init(params), {name: params[name] for name in ("conv", "wide")}
    with pytest.raises(ValueError, match="the parameters are not the same tree as the parameters that `init` was"):
        tx.update(params, state, part)
    with pytest.raises(ValueError, match="the gradients are not the same tree"):
        tx.update(part, state, params)
    short = {**params, "head": {**params["head"], "bias": jnp.zeros(5)}}
    with pytest.raises(ValueError, match=r"parameters hold head/bias with the shape \(5,\), .* the shape \(8,\)"):
        tx.update(params, state, short)
    with pytest.raises(ValueError, match=r"gradients hold head/bias with the shape \(5,\)"):
        tx.update(short, state, params)
    for leaf in (jnp.tanh, "text", np.asarray(["text"])):
        for init in (tx.init, problems.sparsifier("acdc").init, problems.sparsifier("dense").init):
            with pytest.raises(TypeError, match=r"head/extra is not an array of numbers but .*eqx\.filter"):
                init({**params, "head": {**params["head"], "extra": leaf}})


def test_a_whole_chain_inside_is_the_explicit_loop():
    """Clipping and weight decay inside see the trained weights' gradients, as in the explicit loop; in front not."""
    sp, _ = problems.algorithm("sequential_attention")
    parts = (optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.01), sapp.reset_on(optax.sgd(0.1, 0.9)))
    tx = optax.chain(*parts)
    inside, step = one_line_step("inside", sapp.sparsify(tx, sp))
    front, step_in_front = one_line_step("front", optax.chain(*parts[:2], sapp.sparsify(parts[2], sp)))

    @jax.jit
    def explicit(trainable, prune, state, data):
        grads = jax.grad(lambda t: problems.loss(sp.apply(t, prune), data))(trainable)
        updates, state = tx.update(grads, state, trainable, phase=prune.phase)
        return *sp.update(trainable, prune, updates), state

    params = other = problems.network()
    state, other_state = inside.init(params), front.init(params)
    trainable, prune = sp.init(params)
    opt_state = tx.init(trainable)
    for i in range(problems.STEPS):
        trainable, prune, opt_state = explicit(trainable, prune, opt_state, problems.batch(i))
        params, state = step(params, state, problems.batch(i))
        other, other_state = step_in_front(other, other_state, problems.batch(i))
    chex.assert_trees_all_close(params, sp.finalize(trainable, prune), atol=1e-5)
    assert np.abs(other["wide"]["kernel"] - params["wide"]["kernel"]).max() > 1e-2


def test_averages_inside_end_pruned_and_outside_do_not():
    sp, _ = problems.algorithm("acdc")
    free = sapp.reset_on(optax.contrib.schedule_free_adamw(0.03))
    tx, step = one_line_step("schedule-free", sapp.sparsify(free, sp))
    params = problems.network()
    state = tx.init(params)
    for i in range(problems.STEPS):
        params, state = step(params, state, problems.batch(i))
    averaged = optax.contrib.schedule_free_eval_params(state.inner.inner, state.trainable)
    averaged = sp.finalize(averaged, state.prune)
    sapp.check_pruned(averaged, sp.plan(params))
    assert problems.loss(averaged, problems.batch(0)) < 0.9 * problems.loss(problems.network(), problems.batch(0))

    average = optax.chain(one_line_step("acdc")[0], optax.ema(0.9, debias=False))
    tx, step = one_line_step("ema", average)
    params = problems.network()
    state = tx.init(params)
    for i in range(problems.STEPS):
        params, state = step(params, state, problems.batch(i))
    with pytest.raises(ValueError, match=r"wide/kernel: \d+ of 160 blocks are not zero, 32 planned"):
        sapp.check_pruned(params, sp.plan(params))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_weights_are_refused_before_training(bad):
    params = problems.network()
    params["wide"]["kernel"] = params["wide"]["kernel"].at[3, 5].set(bad)
    with pytest.raises(ValueError, match=r"wide/kernel holds 1 NaN or infinite weights of 624"):
        problems.sparsifier("magnitude").init(params)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("acdc", {"form": "pruned"}, "form must be .* got 'pruned'"),
        ("acdc", {"scope": "block"}, "scope must be .* got 'block'"),
        ("acdc", {"sparsity": 1.0}, r"sparsity .* \[0, 1\), got 1.0"),
        ("acdc", {"block": (4, 0)}, r"block must be .* got \(4, 0\)"),
        ("powerpropagation", {"alpha": 0.5}, "alpha must be at least 1, got 0.5"),
        ("sequential_attention", {"clip": (2.0, 3.0)}, r"clip must be .* got \(2.0, 3.0\)"),
        ("sequential_attention", {"clip": "dense"}, "clip must be .* got 'dense'"),
        ("sequential_attention", {"logit_lr": 0}, "logit_lr must be positive, got 0"),
        ("sequential_attention", {"mask_every": 0}, "mask_every must be at least 1 step, got 0"),
        ("sequential_attention", {"mask_every": 2.5}, "mask_every must be a whole number of steps, got 2.5"),
        ("sequential_attention", {"clip": 2.0}, r"clip must be .* got 2.0"),
        ("sequential_attention", {"reset_logits_at": "dense"}, "a list of dense, .* got 'dense'"),
        ("sequential_attention", {"reset_logits_at": ("dnse",)}, "dnse"),
    ],
)
def test_options_out_of_range_are_refused_at_once(name, options, message):
    with pytest.raises(ValueError, match=message):
        problems.sparsifier(name, **options)


def test_what_is_no_schedule_is_refused():
    for make in (sapp.dense, lambda phases: sapp.magnitude(block=2, sparsity=0.5, phases=phases)):
        with pytest.raises(TypeError, match=r"phases must be a schedule .* got \[\('dense', 10\)\]"):
            make(phases=[("dense", 10)])


@pytest.mark.parametrize("name", problems.NAMES)
def test_a_number_of_steps_gets_the_schedule_of_the_algorithm_suggested(name):
    options = {} if name == "dense" else {"block": 2, "sparsity": 0.5}
    with pytest.raises(TypeError) as error:
        getattr(sapp, name)(phases=100, **options)
    suggested = re.fullmatch(r"phases must be a schedule such as `(.*)`, got 100", str(error.value))[1]
    assert suggested == f"phases.{name}(100)"
    phases = eval(suggested, {"phases": sapp.phases})
    assert phases == getattr(sapp.phases, name)(100)
    getattr(sapp, name)(phases=phases, **options)
    with pytest.raises(TypeError, match=rf"such as `phases\.{name}\(total_steps\)`, got <function"):
        getattr(sapp, name)(phases=getattr(sapp.phases, name), **options)


def test_schedules_that_do_not_fit_the_algorithm_are_refused():
    ends_dense = sapp.phases.custom(10, [("sparse", 5), ("dense", 5)])
    with pytest.raises(ValueError, match=r"dense \[5, 10\).*end sparse"):
        sapp.magnitude(block=2, sparsity=0.5, phases=ends_dense)
    with pytest.raises(ValueError, match=r"sparse \[0, 5\)"):
        sapp.dense(phases=ends_dense)


def test_random_masks_follow_the_seed_even_when_traced():
    def mask(seed):
        return problems.sparsifier("random", seed=seed).init(problems.network())[1].masks["wide/kernel"]

    masks = jax.vmap(mask)(jnp.arange(3))
    np.testing.assert_array_equal(masks[2], mask(2))
    assert not np.array_equal(masks[0], masks[1])
    assert masks.sum((1, 2)).tolist() == [32] * 3  # of 160 blocks at 80%


def test_global_scope_keeps_the_sum_of_the_layers():
    sp = problems.sparsifier("magnitude", scope="global")
    params = problems.network()
    params["conv"]["kernel"] *= 100
    trainable, prune = sp.init(params)
    update = jax.jit(sp.update)
    for _ in range(problems.STEPS):
        trainable, prune = update(trainable, prune)
    kept = {path: int(mask.sum()) for path, mask in prune.masks.items()}
    assert sum(kept.values()) == sum(layer.kept for layer in sp.plan(params).pruned.values())
    assert kept == {"conv/kernel": 60, "wide/kernel": 0}
    sapp.check_pruned(sp.finalize(trainable, prune), sp.plan(params))  # conv keeps more than its own share
    with pytest.raises(ValueError, match="wide/kernel"):
        sapp.check_pruned(params, sp.plan(params))


def test_swapped_arguments_are_refused():
    sp, _ = problems.algorithm("acdc")
    with pytest.raises(TypeError, match="optimizer first and an algorithm, a Sparsifier, second"):
        sapp.sparsify(sp, optax.sgd(0.1))


def test_what_is_no_optimizer_is_refused():
    sp, _ = problems.algorithm("acdc")
    with pytest.raises(TypeError, match=r"sparsify takes an optax transformation .* call it, adam\(\.\.\.\)"):
        sapp.sparsify(optax.adam, sp)
    with pytest.raises(TypeError, match=r"reset_on takes an optax transformation .* got 0\.1"):
        sapp.reset_on(0.1)
    masked = sapp.sparsify(optax.masked(optax.sgd(0.1), {"conv": True, "wide": False, "head": True}), sp)
    with pytest.raises(ValueError, match=r"must be functions of the tree rather than trees .* logits_tx"):
        masked.init(problems.network())


def whole_run(name, tx):
    tx, step = one_line_step(name, tx)
    params, state = problems.network(), tx.init(problems.network())
    for i in range(problems.STEPS):
        params, state = step(params, state, problems.batch(i))
    return params, state


@pytest.mark.parametrize("name", ["sequential_attention", "acdc"])
def test_a_bare_optimizer_is_that_whose_momentum_is_reset_by_hand(name):
    """The explicit loop of `problems` wraps its momentum, and nothing else, in `reset_on`."""
    sp, step = problems.algorithm(name)
    rate = optax.cosine_decay_schedule(0.1, problems.STEPS, alpha=0.2)
    bare = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(rate, momentum=0.9))
    params, state = whole_run(f"bare {name}", sapp.sparsify(bare, sp))
    run = problems.start(sp, problems.network())
    for i in range(problems.STEPS):
        run = step(run, problems.batch(i))
    chex.assert_trees_all_close(params, sp.apply(*run[:2]), atol=1e-5)
    chex.assert_trees_all_equal(state.prune, run.prune)
    if name == "acdc":
        never, _ = whole_run("never", sapp.sparsify(bare, sp, reset=False))
        assert not np.allclose(never["wide"]["bias"], params["wide"]["bias"], atol=1e-3)


def test_the_one_line_is_what_the_documentation_recommends():
    options = {"block": 2, "sparsity": 0.8, "where": lambda path: path == "wide/kernel"}
    tx = sapp.sparsify(optax.adamw(0.01), steps=problems.STEPS, **options)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params, _ = whole_run("recommended", tx)
    phases = sapp.phases.finetune(problems.STEPS)
    sp = sapp.sequential_attention(score="effective", phases=phases, **options)
    by_hand, _ = whole_run("by hand", sapp.sparsify(sapp.reset_on(optax.adamw(0.01)), sp))
    chex.assert_trees_all_equal(params, by_hand)
    assert tx.plan(params) == sp.plan(params)
    assert tx.sparsifier.phases == phases
    sapp.check_pruned(params, tx.plan(params))
    assert list(tx.plan(params).pruned) == ["wide/kernel"]


def test_a_reset_on_inside_decides_alone():
    """Momentum outside it goes on."""
    tx = optax.chain(optax.trace(0.9), sapp.reset_on(optax.scale_by_adam()), optax.scale(-0.1))
    tx = sapp.sparsify(tx, problems.sparsifier("magnitude", 10))
    params, update = problems.network(), jax.jit(tx.update)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    traces = []
    for i in range(10):
        _, state = update(jax.tree.map(jnp.ones_like, params) if i == 0 else zeros, state, params)
        traces.append(float(state.inner[0].trace.params["head"]["bias"][0]))
    np.testing.assert_allclose(traces, 0.9 ** np.arange(10), rtol=1e-5)
    assert state.inner[1].inner.count == 2  # its last phase has two steps


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, TypeError, "sparsify needs block, sparsity, steps: write sparsify"),
        ((), {"block": 4, "sparsity": 0.9}, TypeError, "sparsify needs steps: .* number of updates"),
        (("sp",), {"block": 16}, TypeError, "both an algorithm and block=16: give"),
        (("sp",), {"steps": 9, "min_blocks": 1}, TypeError, "both an algorithm and steps=9, min_blocks=1"),
        ((0.9,), {}, TypeError, "a Sparsifier, second; got float. Or write sparsify"),
        ((), {"block": 4, "sparsity": 0.9, "steps": 1}, ValueError, "steps=1 is too short"),
        ((), {"block": 4, "sparsity": 0.9, "steps": 9.5}, ValueError, "whole number of steps, an integer, got 9.5"),
        ((), {"block": 4, "sparsity": 90, "steps": 9}, ValueError, r"must be in \[0, 1\), got 90"),
        ((), {"block": 4, "sparsity": 0.9, "steps": 9, "sparsty": 1}, TypeError, "'sparsty'; did you mean 'sparsity'"),
        ((), {"block": 4, "sparsity": 0.9, "steps": 9, "phases": 1}, TypeError, "'phases'.* give the algorithm"),
    ],
)
def test_the_one_line_says_what_is_missing_or_contradicts(arguments, options, error, message):
    sp, _ = problems.algorithm("acdc")
    with pytest.raises(error, match=message):
        sapp.sparsify(optax.adam(0.1), *(sp if each == "sp" else each for each in arguments), **options)


def test_multi_steps_may_stand_inside_or_outside():
    sp, _ = problems.algorithm("acdc")
    params = problems.network()
    tx = sapp.sparsify(optax.MultiSteps(sapp.reset_on(optax.sgd(0.1, 0.9)), 2), sp)
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
    assert not np.any(updates["wide"]["kernel"])
    updates, state = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["wide"]["kernel"], -0.1, rtol=1e-5)


def test_finalizing_early_is_warned_of():
    sp, step = problems.algorithm("sequential_attention")
    run = problems.start(sp, problems.network())
    with pytest.warns(
        UserWarning, match=r"after step 0 of 60, in a dense phase, 0.0% of the blocks are masked.*80\.3%"
    ):
        sp.finalize(run.trainable, run.prune)
    for i in range(problems.STEPS):
        run = step(run, problems.batch(i))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sp.finalize(run.trainable, run.prune)
        jax.jit(sp.finalize)(*problems.start(sp, problems.network())[:2])  # has no values to look at


def test_attention_has_nothing_to_choose_by_at_the_start():
    sparse_first = sapp.phases.custom(10, [("sparse", 5), ("dense", 2), ("sparse", 3)])
    with pytest.raises(ValueError, match=r"sparse \[0, 5\), but before training all attention weights are equal"):
        sapp.sequential_attention(block=2, sparsity=0.5, phases=sparse_first)


def test_kernels_of_zeros_are_refused_where_they_could_not_grow():
    params = problems.network()
    params["wide"]["kernel"] = jnp.zeros_like(params["wide"]["kernel"])
    for sp in (
        problems.sparsifier("powerpropagation"),
        sapp.magnitude(block=2, sparsity=0.5, phases=sapp.phases.custom(4, [("sparse", 4)])),
    ):
        with pytest.raises(ValueError, match="all 624 weights of wide/kernel are zero"):
            sp.init(params)
    problems.sparsifier("acdc").init(params)  # begins dense


@pytest.mark.parametrize("bad", [60.0, "60", True, 0])
def test_lengths_that_are_no_whole_numbers_are_refused(bad):
    with pytest.raises(ValueError, match=f"total_steps must be .*, got {bad!r}"):
        sapp.phases.sequential_attention(bad)


@one_of_each_kind
def test_meshes_with_explicit_axes(name):
    """What `jax.make_mesh` makes by default, kernels split over it: the same masks and weights as on one device."""
    sp = problems.sparsifier(name, steps=9 if name == "powerpropagation" else problems.STEPS)
    tx = sapp.sparsify(sapp.reset_on(optax.sgd(0.05, 0.9)), sp)
    mesh = jax.make_mesh((8,), ("model",))
    assert set(mesh.axis_types) == {AxisType.Explicit}

    def split(x):
        axis = next((i for i, n in enumerate(x.shape) if n % 8 == 0 and x.ndim > 1), None)
        spec = PartitionSpec(*["model" if i == axis else None for i in range(x.ndim)])
        return jax.device_put(x, NamedSharding(mesh, spec))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    def trained(params):
        state = jax.jit(tx.init)(params)
        for _ in range(8):  # dense, then the first masks
            params, state = step(params, state)
        return params, state.prune

    one, one_prune = trained(problems.network())
    with jax.set_mesh(mesh):
        start = jax.tree.map(split, problems.network())
        many, many_prune = trained(start)
    specs = [jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree) for tree in (start, many)]
    chex.assert_trees_all_equal(*specs)
    assert name == "dense" or not all(mask.all() for mask in one_prune.masks.values())
    chex.assert_trees_all_equal(jax.device_get(many_prune), jax.device_get(one_prune))
    chex.assert_trees_all_close(jax.device_get(many), jax.device_get(one), atol=1e-5)


def test_algorithms_are_entered_by_name_once_and_take_keywords():
    with pytest.raises(ValueError, match="there is an algorithm 'random' already"):

        @sapp.algorithm(sapp.phases.acdc)
        def random(*, phases):
            """Not the library's."""

    with pytest.raises(TypeError, match=r"must take keywords alone, def mine\(\*, block"):

        @sapp.algorithm(sapp.phases.acdc)
        def mine(block, phases):
            """Takes its arguments by position."""

    with pytest.raises(TypeError, match=r"write @algorithm\(schedule\)"):

        @sapp.algorithm
        def bare(*, phases):
            """Has no schedule."""


def test_keys_of_any_kind_draw_masks():
    sp, params = problems.sparsifier("random"), problems.network()
    masks = [sp.init(params, jax.random.key(7, impl=impl))[1].masks["wide/kernel"] for impl in ("threefry2x32", "rbg")]
    assert [int(mask.sum()) for mask in masks] == [32, 32]
    assert not np.array_equal(*masks)
