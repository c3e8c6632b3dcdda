"""One array pruned by blocks, against NumPy's loops over blocks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_plus_plus as sapp


def by_loops(w, block, sparsity):
    """The blocks of the largest norms, found one by one."""
    matrix = np.array(w, np.float64).reshape(-1, w.shape[-1])
    corners = [*itertools.product(*(range(0, n, b) for n, b in zip(matrix.shape, block, strict=True)))]
    where = [(slice(r, r + block[0]), slice(c, c + block[1])) for r, c in corners]
    order = sorted(range(len(where)), key=lambda i: (-np.linalg.norm(matrix[where[i]]), i))
    result = np.zeros_like(matrix)
    for i in order[: int((1 - sparsity) * len(where) + 1e-9)]:
        result[where[i]] = matrix[where[i]]
    return result.reshape(w.shape)


@pytest.mark.parametrize(
    ("shape", "block"), [((12, 20), (4, 4)), ((13, 7), (4, 3)), ((3, 3, 5, 6), (4, 4)), ((2, 1, 3, 2, 9), (5, 2))]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_blocks_stay(shape, block, dtype):
    w = np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))
    got = sapp.prune(jnp.asarray(w), block=block, sparsity=0.6)
    assert isinstance(got, jax.Array)
    assert got.dtype == w.dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), by_loops(w, block, 0.6))
    in_numpy = sapp.prune(w, block=block, sparsity=0.6)
    assert (type(in_numpy), in_numpy.dtype) == (np.ndarray, w.dtype)
    np.testing.assert_array_equal(in_numpy, np.asarray(got))


def test_views_whole_sides_and_jit():
    w = np.random.default_rng(1).normal(size=(8, 12))
    turned = sapp.prune(w, block=(3, 2), sparsity=0.5, view="o i -> i o")
    np.testing.assert_array_equal(turned, by_loops(w.T, (3, 2), 0.5).T)
    assert turned.dtype == np.float64  # which JAX would narrow
    stacked = sapp.prune(np.stack([w, 100 * w]), block=2, sparsity=0.5, view="[l] i o")
    np.testing.assert_array_equal(stacked, np.stack([by_loops(x, (2, 2), 0.5) for x in (w, 100 * w)]))
    rows = jax.jit(lambda w: sapp.prune(w, block=(1, None), sparsity=0.75))(w.astype(np.float32))
    np.testing.assert_array_equal(rows, by_loops(w.astype(np.float32), (1, 12), 0.75))


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        ([[1.0]], {}, r"takes one array, got list"),
        (np.ones((4, 4), int), {}, r"floating-point arrays can be pruned, got int64"),
        (np.ones(4), {}, r"2 to 5 dimensions, got shape \(4,\)"),
        (np.ones((4, 0)), {}, r"no weights: its shape is \(4, 0\)"),
        (np.array([[1.0, np.nan]]), {}, r"NaN or infinite"),
        (np.ones((4, 4)), {"sparsity": 1.0}, r"in \[0, 1\), got 1.0"),
        (np.ones((4, 4)), {"sparsity": 0.9}, r"sparsity 0.9 leaves no block of the 4 in \(4, 4\)"),
        (np.ones((4, 4)), {"block": 0}, r"block"),
        (np.ones((4, 4)), {"view": "a b c"}, r"three|names 3 axes|rows and columns"),
    ],
)
def test_what_cannot_be_pruned(w, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sapp.prune(w, **({"block": 2, "sparsity": 0.5} | options))
