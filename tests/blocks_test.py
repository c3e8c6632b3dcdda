"""Blocks against plain loops over the kernel's matrix in NumPy."""

import itertools
import math
import re

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from hypothesis import strategies as st

from sa_plus_plus import blocks as blk

to_blocks = jax.jit(blk.to_blocks, static_argnums=1)
from_blocks = jax.jit(blk.from_blocks, static_argnums=1)
spread = jax.jit(blk.expand_blocks, static_argnums=(1, 2))
frobenius = jax.jit(blk.frobenius, static_argnums=1)
gradient_of_norms = jax.jit(jax.grad(lambda kernel, block: jnp.sum(blk.frobenius(kernel, block))), static_argnums=1)

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


def over_cases(test):
    """Run a test of `(case, dtype)` on drawn cases and on the listed ones."""
    for example in CASES:
        test = hypothesis.example(case=example, dtype=jnp.float32)(test)
    return hypothesis.given(case=cases(), dtype=st.sampled_from([jnp.float32, jnp.bfloat16]))(test)


@over_cases
def test_from_blocks_inverts_to_blocks(case, dtype):
    shape, block = case
    kernel = random_kernel(shape, 0, dtype)
    back = from_blocks(to_blocks(kernel, block), shape)
    assert back.dtype == dtype
    np.testing.assert_array_equal(np.asarray(back, np.float32), np.asarray(kernel, np.float32))


@over_cases
def test_to_blocks_holds_each_tile_and_zeros_beyond_the_edge(case, dtype):
    shape, block = case
    kernel = random_kernel(shape, 1, dtype)
    blocks = to_blocks(kernel, block)
    g_r, g_c = blk.grid_shape(shape, block)
    chex.assert_shape(blocks, (g_r, block[0], g_c, block[1]))
    blocks = np.asarray(blocks, np.float64)
    seen = 0
    for (i, j), tile in tiles(as_matrix(kernel), block):
        padded = np.zeros(block)
        padded[: tile.shape[0], : tile.shape[1]] = tile
        np.testing.assert_array_equal(blocks[i, :, j, :], padded)
        seen += 1
    assert seen == g_r * g_c


@over_cases
def test_spread_is_constant_on_each_block(case, dtype):
    shape, block = case
    grid = random_kernel(blk.grid_shape(shape, block), 2, dtype)
    out = spread(grid, shape, block)
    chex.assert_shape(out, shape)
    assert out.dtype == dtype
    host, want = np.asarray(grid, np.float64), np.zeros((math.prod(shape[:-1]), shape[-1]))
    for r, c in np.ndindex(*want.shape):
        want[r, c] = host[r // block[0], c // block[1]]
    np.testing.assert_array_equal(as_matrix(out), want)


@over_cases
def test_frobenius_is_the_norm_of_each_block(case, dtype):
    shape, block = case
    kernel = random_kernel(shape, 3, dtype)
    norms = frobenius(kernel, block)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, loop_over_blocks(np.linalg.norm, kernel, block), rtol=1e-5)


@over_cases
def test_block_sizes_count_the_real_weights(case, dtype):
    shape, block = case
    sizes = blk.block_sizes(shape, block)
    assert sizes.sum() == math.prod(shape)
    np.testing.assert_array_equal(sizes, loop_over_blocks(np.size, np.zeros(shape), block))


@over_cases
def test_norm_of_a_spread_grid(case, dtype):
    """A block filled with g has norm |g| times the root of its size, ragged edges included."""
    shape, block = case
    grid = random_kernel(blk.grid_shape(shape, block), 4, dtype)
    norms = frobenius(spread(grid, shape, block), block)
    want = np.abs(np.asarray(grid, np.float64)) * np.sqrt(blk.block_sizes(shape, block))
    np.testing.assert_allclose(norms, want, rtol=1e-5)


@problems.examples(15)
@over_cases
def test_gradient_of_the_norm_is_the_unit_block_and_zero_at_a_block_of_zeros(case, dtype):
    shape, block = case
    keep = np.random.default_rng(5).random(blk.grid_shape(shape, block)) < 0.5
    kernel = random_kernel(shape, 6) * spread(jnp.asarray(keep, jnp.float32), shape, block)
    kernel = kernel.astype(dtype)
    gradient = gradient_of_norms(kernel, block)
    chex.assert_tree_all_finite(gradient)
    matrix, norms = as_matrix(kernel), loop_over_blocks(np.linalg.norm, kernel, block)
    for (i, j), tile in tiles(as_matrix(gradient), block):
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
    want = jnp.stack([frobenius(kernel, (3, 4)) for kernel in kernels])
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
