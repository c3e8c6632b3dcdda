"""`reset_on` and `sparsify`: what they reset, what they refuse, where weight decay goes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import sa_plus_plus as sapp

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_reset_on_resets_what_it_wraps_and_nothing_else():
    schedule = optax.exponential_decay(1.0, 1, 0.5)
    tx = optax.chain(sapp.reset_on(optax.scale_by_adam()), optax.scale_by_learning_rate(schedule))
    params = {"w": jnp.arange(3.0)}
    grads = {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(grads, state, params, boundary=jnp.asarray(False))
    assert state[0].count == 4
    updates, state = tx.update(grads, state, params, boundary=jnp.asarray(True))
    fresh, _ = optax.scale_by_adam().update(grads, optax.scale_by_adam().init(params))
    assert state[0].count == 1, "Adam starts afresh, its bias correction too"
    assert state[1].count == 5, "the schedule goes on"
    chex.assert_trees_all_close(updates, jax.tree.map(lambda u: -(0.5**4) * u, fresh))


def test_forgotten_boundary_and_params_raise():
    tx = sapp.reset_on(optax.trace(0.9))
    params = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match="boundary"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="reset_on needs the current parameters"):
        tx.update(params, tx.init(params), boundary=True)
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
        mask = np.asarray(sapp.blocks.spread(prune.masks[path], layer.shape, layer.block))
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


def test_updates_land_on_the_effective_weights_whatever_the_params_were():
    sp = problems.sparsifier("sequential_attention")
    tx = sapp.sparsify(problems.optimizer(), sp)
    params = problems.network()
    state = tx.init(params)
    drifted = jax.tree.map(lambda x: x + 0.01, params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, drifted)
    expected = sp.finalize(state.trainable, state.prune)
    chex.assert_trees_all_close(optax.apply_updates(drifted, updates), expected, atol=1e-6)


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


def test_swapped_arguments_are_refused():
    sp, _ = problems.algorithm("acdc")
    with pytest.raises(TypeError, match="optimizer first and a Sparsifier second"):
        sapp.sparsify(sp, optax.sgd(0.1))
