"""Blocks against plain loops over the kernel's matrix in NumPy."""

import functools
import itertools
import math
import re

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sa_plus_plus import blocks as blk

# Shape and block: even and ragged splits, single entries, blocks larger than the kernel, the paper's layers.
CASES = [
    ((1, 1), (1, 1)),
    ((1, 1), (4, 3)),
    ((1, 1, 1, 1, 1), (2, 1)),
    ((8, 12), (4, 4)),
    ((7, 5), (2, 3)),
    ((5, 7), (8, 16)),
    ((2, 3, 5), (4, 2)),
    ((3, 3, 16, 20), (16, 8)),
    ((2, 3, 2, 4, 6), (5, 4)),
    ((390, 400), (20, 20)),
    ((7, 7, 3, 64), (8, 8)),
    ((3, 3, 64, 130), (64, 32)),
]


@st.composite
def cases(draw):
    """A kernel's shape of 2 to 5 dimensions and a block, now and then larger than the kernel."""
    ndim = draw(st.integers(2, 5))
    side = {2: 24, 3: 6, 4: 4, 5: 3}[ndim]
    shape = tuple(draw(st.lists(st.integers(1, side), min_size=ndim - 1, max_size=ndim - 1)))
    return (*shape, draw(st.integers(1, 20))), (draw(st.integers(1, 30)), draw(st.integers(1, 24)))


def random_kernel(shape, seed, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def as_matrix(kernel):
    """The kernel's matrix in float64, row by row."""
    kernel = np.asarray(kernel, np.float64)
    return np.stack([kernel[index] for index in np.ndindex(kernel.shape[:-1])])


def tiles(matrix, block):
    """`((i, j), block (i, j))`, the edge's as small as they are."""
    rows, cols = matrix.shape
    for (i, r), (j, c) in itertools.product(enumerate(range(0, rows, block[0])), enumerate(range(0, cols, block[1]))):
        yield (i, j), matrix[r : r + block[0], c : c + block[1]]


def loop_over_blocks(fn, kernel, block):
    """`fn` of every block, as an array of the shape of the grid."""
    values = {index: fn(tile) for index, tile in tiles(as_matrix(kernel), block)}
    grid = np.zeros(np.max(list(values), axis=0) + 1)
    for index, value in values.items():
        grid[index] = value
    return grid


@functools.partial(jax.jit, static_argnums=2)
def computed(kernel, grid, block):
    """What `blocks` makes of a kernel and of a grid, in one program."""
    tiled, expanded = blk.to_blocks(kernel, block), blk.expand_blocks(grid, kernel.shape, block)
    return {
        "blocks": tiled,
        "kernel again": blk.from_blocks(tiled, kernel.shape),
        "norms": blk.frobenius(kernel, block),
        "expanded": expanded,
        "norms of expanded": blk.frobenius(expanded, block),
        "gradient": jax.grad(lambda kernel: jnp.sum(blk.frobenius(kernel, block)))(kernel),
    }


def with_listed_cases(test):
    for example in CASES:
        test = hypothesis.example(case=example, dtype=jnp.float32)(test)
    return test


@with_listed_cases
@hypothesis.given(case=cases(), dtype=st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_blocks_against_loops(case, dtype):
    shape, block = case
    rows, cols = math.prod(shape[:-1]), shape[-1]
    g_r, g_c = blk.grid_shape(shape, block)
    sizes = blk.block_sizes(shape, block)
    assert sizes.sum() == math.prod(shape)
    np.testing.assert_array_equal(sizes, loop_over_blocks(np.size, np.zeros(shape), block))

    # About half of the kernel's blocks are zero.
    keep = np.random.default_rng(5).random((g_r, g_c)) < 0.5
    kept = keep.repeat(block[0], 0).repeat(block[1], 1)[:rows, :cols].reshape(shape)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=shape) * kept, dtype)
    grid = random_kernel((g_r, g_c), 2, dtype)
    out = computed(kernel, grid, block)

    # Each tile, and zeros beyond the edge; and back.
    chex.assert_shape(out["blocks"], (g_r, block[0], g_c, block[1]))
    blocks = np.asarray(out["blocks"], np.float64)
    seen = 0
    for (i, j), tile in tiles(as_matrix(kernel), block):
        padded = np.zeros(block)
        padded[: tile.shape[0], : tile.shape[1]] = tile
        np.testing.assert_array_equal(blocks[i, :, j, :], padded)
        seen += 1
    assert seen == g_r * g_c
    assert out["kernel again"].dtype == dtype
    np.testing.assert_array_equal(np.asarray(out["kernel again"], np.float32), np.asarray(kernel, np.float32))

    # A grid's entry at each weight of its block, whose norm is |entry| times the root of its size, edges included.
    chex.assert_shape(out["expanded"], shape)
    assert out["expanded"].dtype == dtype
    host, want = np.asarray(grid, np.float64), np.zeros((rows, cols))
    for r, c in np.ndindex(rows, cols):
        want[r, c] = host[r // block[0], c // block[1]]
    np.testing.assert_array_equal(as_matrix(out["expanded"]), want)
    np.testing.assert_allclose(out["norms of expanded"], np.abs(host) * np.sqrt(sizes), rtol=1e-5)

    # The norm of each block; its gradient is the block over its norm, and zero where all is zero.
    norms = loop_over_blocks(np.linalg.norm, kernel, block)
    assert out["norms"].dtype == jnp.float32
    np.testing.assert_allclose(out["norms"], norms, rtol=1e-5)
    chex.assert_tree_all_finite(out["gradient"])
    matrix = as_matrix(kernel)
    for (i, j), tile in tiles(as_matrix(out["gradient"]), block):
        own = matrix[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        if keep[i, j]:
            np.testing.assert_allclose(tile, own / norms[i, j], rtol=1e-2 if dtype == jnp.bfloat16 else 1e-4, atol=1e-6)
        else:
            np.testing.assert_array_equal(tile, 0)


def test_spread_takes_any_dtype():
    for grid in (jnp.asarray([[True, False]]), jnp.asarray([[3, 4]])):
        out = blk.expand_blocks(grid, (2, 3), (2, 2))
        assert out.dtype == grid.dtype
        np.testing.assert_array_equal(out, np.asarray(grid)[:, [0, 0, 1]].repeat(2, axis=0))


def test_bfloat16_norms_are_accumulated_in_float32():
    """In bfloat16 a running sum of ones would stop at 256."""
    np.testing.assert_allclose(blk.frobenius(jnp.ones((64, 64), jnp.bfloat16), (64, 64)), [[64.0]])


def test_eager_and_vmapped_agree_with_jit():
    kernels = random_kernel((3, 7, 10), 7)
    frobenius = jax.jit(lambda kernel: blk.frobenius(kernel, (3, 4)))
    want = jnp.stack([frobenius(kernel) for kernel in kernels])
    chex.assert_trees_all_close(jax.vmap(lambda w: blk.frobenius(w, (3, 4)))(kernels), want, rtol=1e-6)
    chex.assert_trees_all_close(blk.frobenius(kernels[0], (3, 4)), want[0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (5,), (2, 2, 2, 2, 2, 2)])
def test_kernels_of_other_dimensions_are_refused(shape):
    message = f"2 to 5 dimensions, got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        blk.matrix_shape(shape)
    with pytest.raises(ValueError, match=message):
        blk.grid_shape(shape, (2, 2))
    with pytest.raises(ValueError, match=message):
        blk.to_blocks(jnp.ones(shape), (2, 2))
    with pytest.raises(ValueError, match=message):
        blk.frobenius(jnp.ones(shape), (2, 2))


@pytest.mark.parametrize(
    "block", [0, -8, (8,), (8, 8, 8), (0, 4), (4, -2), (4, 2.5), ("8", 8), "ab", (), 2.0, None], ids=repr
)
def test_bad_blocks_are_refused(block):
    with pytest.raises(ValueError, match=f"positive integer or a pair of them, got {re.escape(repr(block))}"):
        blk.as_block(block)


@pytest.mark.parametrize(
    ("block", "want"),
    [(8, (8, 8)), ((4, 2), (4, 2)), ([4, 2], (4, 2)), (np.array([4, 2]), (4, 2)), (np.int64(8), (8, 8))],
    ids=repr,
)
def test_blocks_are_pairs_of_integers(block, want):
    pair = blk.as_block(block)
    assert pair == want
    assert all(type(side) is int for side in pair)


def test_blocks_that_do_not_tile_the_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 4\).*\(8, 8\).*expected a grid of \(2, 2\), got \(2, 3\)"):
        blk.from_blocks(jnp.ones((2, 4, 3, 4)), (8, 8))


def test_soft_threshold_is_the_proximal_map_of_the_norm():
    norms, threshold = np.array([0.0, 0.5, 1.0, 3.0]), 1.0
    lengths = np.linspace(0, 4, 40_001)
    cost = (lengths - norms[:, None]) ** 2 / 2 + threshold * lengths
    factors = np.asarray(blk.soft_threshold(jnp.asarray(norms), threshold))
    np.testing.assert_allclose(factors * norms, lengths[cost.argmin(1)], atol=1e-4)
    gradient = jax.grad(lambda n: jnp.sum(blk.soft_threshold(n, threshold)))(jnp.asarray(norms))
    assert np.isfinite(gradient).all()  # also at a norm of zero
