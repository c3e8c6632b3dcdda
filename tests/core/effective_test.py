"""SequentialAttention++ that chooses blocks by the norm of the effective block, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

import sa_plus_plus as sapp

ROWS, COLUMNS, BLOCK = 24, 20, 2
SPARSITY = 0.75


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    logits = (2 * rng.standard_normal((ROWS // BLOCK, COLUMNS // BLOCK))).astype(np.float32)
    return kernel, logits


def sparsifier(phases, **options):
    return sapp.sequential_attention(block=BLOCK, sparsity=SPARSITY, phases=phases, **options)


def norms(kernel):
    blocks = kernel.reshape(ROWS // BLOCK, BLOCK, COLUMNS // BLOCK, BLOCK)
    return np.sqrt(np.einsum("iajb,iajb->ij", blocks, blocks))


def largest(scores, k):
    return scores >= np.sort(scores.ravel())[-k]


def masks(kernel, logits, **options):
    """Chosen on entering the sparse phase, with weights and logits as given."""
    sp = sparsifier(sapp.phases.custom(2, [("dense", 1), ("sparse", 1)]), **options)
    trainable, prune = sp.init({"a": {"kernel": jnp.asarray(kernel)}})
    trainable = trainable._replace(params={"a": {"kernel": jnp.asarray(kernel)}}, logits={"a/kernel": logits})
    return np.asarray(sp.update(trainable, prune)[1].masks["a/kernel"])


@pytest.mark.parametrize(("clip", "low", "high"), [("density", 0.25, 4), (None, 0, np.inf), ((0.5, 1.5), 0.5, 1.5)])
def test_blocks_are_chosen_by_clipped_attention_times_norm(clip, low, high):
    kernel, logits = drawn()
    attention = logits.size * np.exp(logits) / np.exp(logits).sum()
    wanted = largest(np.clip(attention, low, high) * norms(kernel), round((1 - SPARSITY) * logits.size))
    np.testing.assert_array_equal(masks(kernel, logits, clip=clip, score="effective"), wanted)
    assert (masks(kernel, logits, clip=clip) != wanted).any()  # attention alone chooses others


def test_equal_logits_rank_by_norm_so_that_it_may_begin_sparse():
    kernel, _ = drawn()
    phases = sapp.phases.custom(2, [("sparse", 2)])
    _, prune = sparsifier(phases, score="effective").init({"a": {"kernel": jnp.asarray(kernel)}})
    np.testing.assert_array_equal(prune.masks["a/kernel"], largest(norms(kernel), 30))
    with pytest.raises(ValueError, match=r'first phase is sparse.*or choose by score="effective"'):
        sparsifier(phases)


def test_unknown_scores_are_refused():
    with pytest.raises(ValueError, match='score must be "attention" or "effective", got \'norm\''):
        sparsifier(sapp.phases.sequential_attention(100), score="norm")
