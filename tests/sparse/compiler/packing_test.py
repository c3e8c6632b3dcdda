"""The blocks in which the compiled kernel gets a pruned float32 kernel: none is lost, and none costs less."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import sa_plus_plus as sapp
from sa_plus_plus.sparse.compiler.lowering import cost_of, pack_float32, pack_interleaved
from sa_plus_plus.sparse.ops import native

compiled = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


def pruned(rows, columns, block, density, seed=0):
    """Random weights, of which random blocks are zero."""
    rng = np.random.default_rng(seed)
    keep = rng.random((-(-rows // block[0]), -(-columns // block[1]))) < density
    return rng.normal(size=(rows, columns)).astype(np.float32) * np.kron(keep, np.ones(block))[:rows, :columns]


@compiled
@hypothesis.given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    window=st.sampled_from([(1, 1), (3, 1), (2, 3)]),
)
@problems.examples(30)
def test_nothing_is_lost(size, block, density, window):
    channels, outputs = size
    kernel = pruned(window[0] * window[1] * channels, outputs, block, density).reshape(*window, channels, outputs)
    packed = pack_float32(kernel, block)
    np.testing.assert_array_equal(packed.todense(), kernel)
    if window[0] > 1:  # a block lies in one line of the window
        assert window[1] * channels % packed.layout.block[0] == 0


@compiled
@pytest.mark.parametrize(
    ("block", "density", "wanted"),
    [
        ((16, 16), 0.5, (16, 16)),
        ((4, 16), 0.3, (4, 16)),
        ((4, 32), 0.8, (4, 32)),
        ((32, 1), 0.5, None),  # of 16 neighbours hardly ever all are zero
        ((32, 1), 0.8, None),
        ((4, 4), 0.1, (4, 8)),
        ((8, 8), 0.1, (8, 8)),
        ((1, 1), 0.05, (1, 8)),
        ((16, 16), 0.99, None),
    ],
)
def test_blocks(block, density, wanted):
    """None: in full, in the same blocks as a kernel that is not pruned."""
    kernel = pruned(384, 384, block, density)[None, None]
    got = pack_float32(kernel, block).layout
    full = pack_float32(kernel, None).layout
    assert got.block == (wanted or full.block)
    assert full.block == (128, native.target(np.float32).columns)
    assert got.nse * cost_of(got.block) <= full.nse * cost_of(full.block)


@compiled
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
def test_columns_of_a_block_in_low_precision(dtype):
    """An unpruned kernel has blocks as wide as a tile; a pruned one has narrower ones, or zeros would be multiplied."""
    entries = np.int8 if dtype == jnp.uint8 else jnp.bfloat16
    for density, columns in ((1.0, native.target(dtype).columns), (0.5, native.WIDE)):
        kernel = (10 * pruned(64, 192, (16, 16), density)).astype(entries)[None, None]
        packed = pack_interleaved(kernel, kernel.dtype)
        assert packed.layout.block[1] == columns
        np.testing.assert_array_equal(np.asarray(packed.todense(), np.float32), kernel.astype(np.float32))


@compiled
@pytest.mark.parametrize(("density", "runs"), [(0.5, "dense"), (0.02, "sparse")])
def test_columns_that_cost_more_than_all_weights_run_in_full(density, runs):
    kernel, x = (
        pruned(64, 96, (32, 1), density),
        jnp.asarray(np.random.default_rng(1).normal(size=(5, 64)), jnp.float32),
    )
    fast = sapp.specialize(lambda x: x @ kernel, x, mode="always")
    assert [choice.runs for choice in fast.choices] == [runs]
    np.testing.assert_allclose(fast(x), x @ kernel, rtol=1e-5, atol=1e-5)
