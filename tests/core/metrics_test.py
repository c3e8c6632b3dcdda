"""Metrics against brute force, and SciPy's entropy."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sa_plus_plus as sapp
from sa_plus_plus import metrics

# Ragged in both directions, in one, in none; of 4, 2 and 3 dimensions; and a kernel that is too small to be pruned.
SHAPES = {"conv": (3, 3, 2, 5), "dense": (13, 8), "even": (2, 4, 6), "small": (2, 2), "bias": (5,)}
BLOCK = (4, 3)
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
PLAN = sapp.plan(PARAMS, block=BLOCK, sparsity=0.5, min_blocks=4)
GRIDS = {"conv": (5, 2), "dense": (4, 3), "even": (2, 2)}

layer_sparsity = jax.jit(lambda masks: metrics.layer_sparsity(masks, PLAN))
kernel_sparsity = jax.jit(lambda masks: metrics.kernel_sparsity(masks, PLAN))
churn = jax.jit(metrics.churn)
attention = jax.jit(lambda logits: metrics.attention(sapp.Trainable({}, logits)))

masks_of_all = st.fixed_dictionaries({name: hnp.arrays(bool, grid) for name, grid in GRIDS.items()})


def zeros(name, mask):
    """Number of weights whose block is masked, weight by weight."""
    *rows, cols = SHAPES[name]
    return sum(not mask[r // BLOCK[0], c // BLOCK[1]] for r in range(np.prod(rows)) for c in range(cols))


def test_the_plan_is_as_meant():
    assert {name: layer.grid for name, layer in PLAN.pruned.items()} == GRIDS


@hypothesis.given(masks=masks_of_all)
def test_layer_sparsity_counts_real_weights(masks):
    shares = layer_sparsity(masks)
    assert set(shares) == set(GRIDS)
    for name, share in shares.items():
        np.testing.assert_allclose(share, zeros(name, masks[name]) / np.prod(SHAPES[name]), rtol=1e-6)


@hypothesis.given(masks=masks_of_all)
def test_kernel_sparsity_is_of_all_kernels_pruned_or_not(masks):
    share = kernel_sparsity(masks)
    assert share.dtype == jnp.float32
    kernels = 3 * 3 * 2 * 5 + 13 * 8 + 2 * 4 * 6 + 2 * 2
    np.testing.assert_allclose(share, sum(zeros(name, mask) for name, mask in masks.items()) / kernels, rtol=1e-6)


def test_sparsity_of_none_and_all():
    for masked, want in ((False, 0.0), (True, 1.0)):
        masks = {name: jnp.full(grid, not masked) for name, grid in GRIDS.items()}
        assert all(share == want for share in metrics.layer_sparsity(masks, PLAN).values())
    np.testing.assert_allclose(metrics.kernel_sparsity(masks, PLAN), (90 + 104 + 48) / (90 + 104 + 48 + 4), rtol=1e-6)


def test_networks_of_more_weights_than_32_bits_count():
    plan = sapp.plan({"kernel": jax.ShapeDtypeStruct((65_536, 65_536), jnp.float32)}, block=4096, sparsity=0.5)
    mask = jnp.arange(256).reshape(16, 16) < 64
    np.testing.assert_allclose(jax.jit(lambda m: metrics.kernel_sparsity(m, plan))({"kernel": mask}), 0.75)
    np.testing.assert_allclose(metrics.layer_sparsity({"kernel": mask}, plan)["kernel"], 0.75)


@hypothesis.given(before=masks_of_all, after=masks_of_all)
def test_churn_is_the_jaccard_distance(before, after):
    distances = churn(before, after)
    assert set(distances) == set(GRIDS)
    for name, distance in distances.items():
        a, b = ({*zip(*np.nonzero(masks[name]), strict=True)} for masks in (before, after))
        np.testing.assert_allclose(distance, 1 - len(a & b) / len(a | b) if a | b else 0, atol=1e-6)


def test_churn_between_extremes():
    left, right, none = jnp.asarray([[True, False]]), jnp.asarray([[False, True]]), jnp.asarray([[False, False]])
    assert metrics.churn({"a": left}, {"a": left})["a"] == 0
    assert metrics.churn({"a": left}, {"a": right})["a"] == 1
    assert metrics.churn({"a": left}, {"a": none})["a"] == 1
    assert metrics.churn({"a": left}, {"a": left | right})["a"] == 0.5
    assert metrics.churn({"a": none}, {"a": none})["a"] == 0  # the same blocks


logits_of_all = st.fixed_dictionaries(
    {name: hnp.arrays(np.float32, grid, elements=st.floats(-40, 40, width=32)) for name, grid in GRIDS.items()}
)


@hypothesis.given(logits=logits_of_all)
def test_attention_against_scipy(logits):
    report = attention(logits)
    assert set(report) == set(GRIDS)
    for name, values in report.items():
        shares = scipy.special.softmax(logits[name].astype(np.float64))
        entropy = scipy.stats.entropy(shares.ravel()) / np.log(shares.size)
        np.testing.assert_allclose(values["entropy"], entropy, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(values["min"], shares.size * shares.min(), rtol=1e-4)
        np.testing.assert_allclose(values["max"], shares.size * shares.max(), rtol=1e-4)


@pytest.mark.parametrize(("n", "spike", "entropy", "low", "high"), [(12, 0, 1, 1, 1), (12, 500, 0, 0, 12)])
def test_attention_of_extremes(n, spike, entropy, low, high):
    logits = jnp.zeros((n // 3, 3)).at[1, 2].set(spike)
    values = metrics.attention(sapp.Trainable({}, {"a": logits}))["a"]
    np.testing.assert_allclose([values["entropy"], values["min"], values["max"]], [entropy, low, high], atol=1e-6)


def test_a_single_block_has_no_entropy_to_lose():
    values = metrics.attention(sapp.Trainable({}, {"a": jnp.full((1, 1), 3.0)}))["a"]
    assert values["entropy"] == 0
    assert values["min"] == values["max"] == 1


def test_without_logits_there_is_nothing_to_report():
    assert metrics.attention(sapp.Trainable({"kernel": jnp.ones((2, 2))}, {})) == {}


def test_metrics_of_a_running_algorithm_under_jit():
    """Through the library's own state: exactly half of the 12 blocks of one layer, real weights counted."""
    params = {"dense": jax.random.normal(jax.random.key(0), (13, 8))}
    sp = sapp.magnitude(block=BLOCK, sparsity=0.5, min_blocks=4, phases=sapp.phases.magnitude(20))
    plan = sp.plan(params)

    @jax.jit
    def step(trainable, prune):
        trainable, after = sp.update(trainable, prune)
        return trainable, after, metrics.churn(prune.masks, after.masks), metrics.kernel_sparsity(after.masks, plan)

    trainable, prune = sp.init(params)
    for i in range(1, 20):
        trainable, prune, changed, sparsity = step(trainable, prune)
        assert changed["dense"] == (0.5 if i == 17 else 0)
        zero = np.count_nonzero(np.asarray(sp.apply(trainable, prune)["dense"]) == 0)
        np.testing.assert_allclose(sparsity, zero / 104, rtol=1e-6)
    assert sparsity > 0
