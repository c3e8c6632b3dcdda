"""The baselines' own steps, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_plus_plus as sapp
from sa_plus_plus.masking import scale_blocks

GRID, BLOCK, SPARSITY, KEPT = (12, 10), 2, 0.75, 30
PATH = "a/kernel"


def drawn(seed, grid=False):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(GRID if grid else (GRID[0] * BLOCK, GRID[1] * BLOCK)).astype(np.float32)


def params(seed=0):
    return {"a": {"kernel": jnp.asarray(drawn(seed))}}


def norms(kernel):
    blocks = np.asarray(kernel, np.float64).reshape(GRID[0], BLOCK, GRID[1], BLOCK)
    return np.sqrt(np.einsum("iajb,iajb->ij", blocks, blocks))


def spread(mask):
    return np.kron(mask, np.ones((BLOCK, BLOCK))).astype(mask.dtype)


def largest(scores, k, among):
    """Mask of the k largest of those in `among`."""
    order = np.argsort(-np.where(among, scores, -np.inf).ravel(), kind="stable")[:k]
    mask = np.zeros(scores.size, bool)
    mask[order] = True
    return mask.reshape(scores.shape)


def dynamic(name, steps=100, **options):
    schedule = getattr(sapp.phases, name)(steps)
    return getattr(sapp, name)(block=BLOCK, sparsity=SPARSITY, phases=schedule, **{"mask_every": 10, **options})


def linear(sp, prune, weights):
    """Gradient of `sum(weights * effective)`: what the loss's gradient in the effective kernel is."""
    return lambda trainable: jnp.sum(weights * sp.apply(trainable, prune)["a"]["kernel"])


@pytest.mark.parametrize("step", [20, 40])
def test_rigl_drops_by_norm_and_grows_by_the_gradient(step):
    sp = dynamic("rigl")
    trainable, prune = sp.init(params())
    mask, gradient = np.asarray(prune.masks[PATH]), drawn(5)
    assert mask.sum() == KEPT
    prune = prune._replace(step=jnp.asarray(step - 1))
    grads = jax.grad(linear(sp, prune, gradient))(trainable)
    np.testing.assert_array_equal(grads.params["a"]["kernel"], gradient)  # masked blocks have theirs too
    updates = jax.tree.map(lambda g: -0.1 * g, grads)
    after, state = sp.update(trainable, prune, updates, grads)
    moved = np.where(spread(mask), drawn(0) - np.float32(0.1) * gradient, 0)
    np.testing.assert_allclose(after.params["a"]["kernel"], moved, rtol=1e-6)
    n = int(0.3 / 2 * (1 + np.cos(np.pi * step / 75)) * KEPT)
    stay = largest(norms(moved), KEPT - n, mask)
    joined = largest(norms(gradient), n, ~stay)
    np.testing.assert_array_equal(state.masks[PATH], stay | joined)
    assert (joined & ~mask).any()
    assert not np.asarray(sp.apply(after, state)["a"]["kernel"])[spread(joined & ~mask)].any()  # they start at zero


@pytest.mark.parametrize("step", [21, 80])
def test_rigl_leaves_masks_and_gradients_alone_at_other_steps(step):
    sp = dynamic("rigl")
    trainable, prune = sp.init(params())
    prune, gradient = prune._replace(step=jnp.asarray(step - 1)), drawn(5)
    grads = jax.grad(linear(sp, prune, gradient))(trainable)
    np.testing.assert_array_equal(grads.params["a"]["kernel"], gradient * spread(np.asarray(prune.masks[PATH])))
    _, state = sp.update(trainable, prune, jax.tree.map(jnp.zeros_like, grads), grads)
    np.testing.assert_array_equal(state.masks[PATH], prune.masks[PATH])


def test_rigl_finds_the_blocks_that_matter():
    """A linear model of which only 30 of 120 blocks are not zero, from a mask that has few of them."""
    wanted = largest(drawn(3, grid=True), KEPT, np.ones(GRID, bool))
    target = drawn(4) * spread(wanted)

    def found(name):
        sp = dynamic(name, mask_every=4)
        trainable, prune = sp.init(params())

        def loss(trainable, prune):
            return jnp.sum((sp.apply(trainable, prune)["a"]["kernel"] - target) ** 2) / 2

        @jax.jit
        def step(trainable, prune):
            grads = jax.grad(loss)(trainable, prune)
            return sp.update(trainable, prune, jax.tree.map(lambda g: -0.3 * g, grads), grads)

        first = (np.asarray(prune.masks[PATH]) & wanted).sum()
        for _ in range(100):
            trainable, prune = step(trainable, prune)
        return first, (np.asarray(prune.masks[PATH]) & wanted).sum()

    first, last = found("rigl")
    assert first < 15
    assert last == KEPT
    assert found("sparse_evolutionary")[1] < last  # at random, it takes longer


def test_sequential_attention_exchanges_blocks_in_its_sparse_phase():
    """Dropped by the norm of their weights, grown by that of the gradient; the logits stay where they are."""
    phases = sapp.phases.finetune(100)
    options = {"block": BLOCK, "sparsity": SPARSITY, "phases": phases, "score": "effective"}
    sp = sapp.sequential_attention(**options, regrow=0.5, regrow_every=10, regrow_until=0.9)
    trainable, prune = sp.init(params())
    trainable = trainable._replace(logits={PATH: jnp.asarray(drawn(7, grid=True))})
    mask, gradient = largest(drawn(6, grid=True), KEPT, np.ones(GRID, bool)), drawn(5)
    prune = prune._replace(step=jnp.asarray(59), phase=jnp.asarray(1), masks={PATH: jnp.asarray(mask)})
    grads = jax.grad(linear(sp, prune, gradient))(trainable)
    opened = np.asarray(grads.params["a"]["kernel"])[~spread(mask)]
    np.testing.assert_array_equal(opened, gradient[~spread(mask)])
    zero = jax.tree.map(jnp.zeros_like, grads)
    after, state = sp.update(trainable, prune, zero, grads)
    weights = np.where(spread(mask), drawn(0), 0)
    np.testing.assert_array_equal(after.params["a"]["kernel"], weights)
    n = int(0.5 / 2 * (1 + np.cos(np.pi * 60 / 90)) * KEPT)
    stay = largest(norms(weights), KEPT - n, mask)
    joined = largest(norms(gradient), n, ~stay)
    np.testing.assert_array_equal(state.masks[PATH], stay | joined)
    assert (joined & ~mask).any()
    np.testing.assert_array_equal(after.logits[PATH], trainable.logits[PATH])
    _, same = sp.update(trainable, prune._replace(step=jnp.asarray(60)), zero, grads)
    np.testing.assert_array_equal(same.masks[PATH], mask)  # not due
    with pytest.raises(ValueError, match=r"call update\(trainable, prune, updates, grads\)"):
        sp.update(trainable, prune, zero)
    for wrong, message in (
        ({"regrow": 1.5}, r"regrow must be a share in \(0, 1\], got 1.5"),
        ({"regrow_every": 0}, "regrow_every must be a whole number of steps from 1, got 0"),
        ({"regrow": 0.3, "phases": sapp.phases.sequential_attention(100)}, "needs one rise of the sparsity"),
        ({"regrow": 0.3, "monotone": False}, "regrow needs monotone=True"),
        (
            {"regrow": 0.3, "regrow_every": 30, "regrow_until": 0.6},
            "no step of the phase .* of regrow_every=30",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sapp.sequential_attention(**options | wrong)


def test_sparse_evolutionary_keeps_the_largest_and_draws_the_others_anew_each_time():
    sp = dynamic("sparse_evolutionary")
    trainable, prune = sp.init(params())
    mask, joined = np.asarray(prune.masks[PATH]), []
    for step in (10, 20):
        n = int(0.3 / 2 * (1 + np.cos(np.pi * step / 75)) * KEPT)
        after = np.asarray(sp.update(trainable, prune._replace(step=jnp.asarray(step - 1)))[1].masks[PATH])
        stay = largest(norms(np.where(spread(mask), drawn(0), 0)), KEPT - n, mask)
        assert (after & stay).sum() == KEPT - n
        assert after.sum() == KEPT
        joined.append(after & ~stay)
    assert (joined[0] != joined[1]).any()


def test_dynamic_options_out_of_range():
    for options, message in (
        ({"fraction": 0}, r"fraction must be a share in \(0, 1\], got 0"),
        ({"until": 1.5}, r"until must be a share in \(0, 1\], got 1.5"),
        ({"mask_every": 0}, "mask_every must be a whole number of steps from 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dynamic("rigl", **options)
    sp = dynamic("rigl")
    trainable, prune = sp.init(params())
    with pytest.raises(ValueError, match=r"call update\(trainable, prune, updates, grads\)"):
        sp.update(trainable, prune, trainable)


def test_a_movement_score_is_the_sum_of_gradient_times_weight_masked_or_not():
    schedule = sapp.phases.custom(12, [("dense", 2), ("sparsification", 6), ("sparse", 4)])
    sp = sapp.movement(block=BLOCK, sparsity=SPARSITY, phases=schedule)
    trainable, prune = sp.init(params())
    kernel, scores, rate = drawn(0).astype(np.float64), np.zeros(GRID), 0.05
    returned = 0
    for i in range(12):
        gradient, mask = drawn(10 + i), np.asarray(prune.masks[PATH])
        effective = np.asarray(sp.apply(trainable, prune)["a"]["kernel"])
        np.testing.assert_allclose(effective, kernel * spread(mask), rtol=1e-5, atol=1e-6)
        grads = jax.grad(linear(sp, prune, gradient))(trainable)
        trainable, prune = sp.update(trainable, prune, jax.tree.map(lambda g: -rate * g, grads))
        products = (gradient * kernel).reshape(GRID[0], BLOCK, GRID[1], BLOCK).sum((1, 3))
        scores -= rate * products
        kernel -= rate * gradient * spread(mask)
        np.testing.assert_allclose(trainable.logits[PATH], scores, rtol=1e-4, atol=1e-5)
        after = np.asarray(prune.masks[PATH])
        returned += (after & ~mask).sum()
        if i + 1 < 9:  # until the sparse phase begins, and where it does
            np.testing.assert_array_equal(after, largest(scores, after.sum(), np.ones(GRID, bool)))
    assert returned  # blocks that were masked
    assert after.sum() == KEPT


@pytest.mark.parametrize("strength", [1.0, 5.0])
def test_group_lasso_takes_the_proximal_step_in_dense_phases_alone(strength):
    sp = sapp.group_lasso(
        block=BLOCK,
        sparsity=SPARSITY,
        phases=sapp.phases.custom(10, [("dense", 1), ("sparse", 9)]),
        strength=strength,
    )
    trainable, prune = sp.init(params())
    gradient = drawn(7)
    updates = trainable._replace(params={"a": {"kernel": jnp.asarray(-0.1 * gradient)}})
    trainable, prune = sp.update(trainable, prune, updates)
    moved = drawn(0).astype(np.float64) - 0.1 * gradient
    size = norms(moved)
    tau = strength / 10 * np.sort(size.ravel())[-KEPT]
    want = moved * np.kron(np.maximum(0, 1 - tau / size), np.ones((BLOCK, BLOCK)))
    np.testing.assert_allclose(trainable.params["a"]["kernel"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(prune.masks[PATH], largest(size, KEPT, np.ones(GRID, bool)))
    after, _ = sp.update(trainable, prune, updates)
    np.testing.assert_allclose(
        after.params["a"]["kernel"], want - 0.1 * gradient * spread(np.asarray(prune.masks[PATH])), rtol=1e-5, atol=1e-6
    )


def test_group_lasso_solves_its_problem():
    """`||W - T||^2 / 2` plus the penalty has the closed solution `soft_threshold(T)`: what repeated steps come to."""
    tau, rate = 1.5, 0.2
    layer = sapp.plan(params(), block=BLOCK, sparsity=SPARSITY).pruned[PATH]
    weights, target = jnp.asarray(drawn(0)), drawn(1)
    for _ in range(150):
        weights = weights - rate * (weights - target)
        size = sapp.blocks.frobenius(weights, layer.block)
        weights = scale_blocks(weights, sapp.blocks.soft_threshold(size, jnp.asarray(rate * tau)), layer)
    want = target * np.kron(np.maximum(0, 1 - tau / norms(target)), np.ones((BLOCK, BLOCK)))
    np.testing.assert_allclose(weights, want, atol=1e-5)
    assert 0.1 < (want == 0).mean() < 0.9


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_d_gating_is_the_product_of_its_factors_each_with_its_own_gradient(depth):
    schedule = sapp.phases.custom(8, [("dense", 4), ("sparse", 4)])
    sp = sapp.d_gating(block=BLOCK, sparsity=SPARSITY, phases=schedule, depth=depth, strength=0.5)
    trainable, prune = sp.init(params())
    kernel, gates, rate = drawn(0).astype(np.float64), np.ones((depth - 1, *GRID)), 0.05
    for i in range(5):
        gradient, mask, dense = drawn(20 + i), np.asarray(prune.masks[PATH]), i < 4
        product = np.prod(gates, 0)
        effective = np.asarray(sp.apply(trainable, prune)["a"]["kernel"])
        np.testing.assert_allclose(effective, kernel * spread(product * mask), rtol=1e-4, atol=1e-5)
        grads = jax.grad(linear(sp, prune, gradient))(trainable)
        trainable, prune = sp.update(trainable, prune, jax.tree.map(lambda g: -rate * g, grads))
        sums = mask * (gradient * kernel).reshape(GRID[0], BLOCK, GRID[1], BLOCK).sum((1, 3))
        kernel = kernel - rate * gradient * spread(product * mask)
        others = [np.prod(np.delete(gates, d, 0), 0) for d in range(depth - 1)]
        gates = gates - rate * sums * np.array(others)
        if dense:
            kernel, gates = kernel * (1 - 0.5 / 8), gates * (1 - 0.5 / 8)
        np.testing.assert_allclose(trainable.params["a"]["kernel"], kernel, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(1 + np.asarray(trainable.logits[PATH]), gates[0], rtol=1e-4, atol=1e-5)
        if i == 3:
            wanted = largest(norms(kernel) * np.abs(np.prod(gates, 0)), KEPT, np.ones(GRID, bool))
            np.testing.assert_array_equal(prune.masks[PATH], wanted)


def test_scores_and_strengths_that_make_no_sense_are_refused():
    schedule = sapp.phases.random(100)
    with pytest.raises(ValueError, match=r"first phase is sparse \[0, 100\).*all scores are equal"):
        sapp.movement(block=BLOCK, sparsity=SPARSITY, phases=schedule)
    with pytest.raises(ValueError, match="strength must be between 0 and 100, the number of steps; got 0"):
        sapp.group_lasso(block=BLOCK, sparsity=SPARSITY, phases=schedule, strength=0)
    with pytest.raises(ValueError, match="depth must be a number of factors, an integer from 2; got 1"):
        sapp.d_gating(block=BLOCK, sparsity=SPARSITY, phases=schedule, depth=1)
