"""Selections against a stable sort in NumPy, numbers of kept blocks against exact fractions."""

import math
from fractions import Fraction

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sa_plus_plus import select

top_k = jax.jit(select.top_k)
top_k_of_each = jax.jit(jax.vmap(select.top_k))
top_k_per_layer = jax.jit(select.top_k_per_layer)
ordered_bits = jax.jit(select._ordered_bits)
kth_largest = jax.jit(select._kth_largest, static_argnums=2)

# Few shapes, so that each test compiles few programs.
SHAPES = [(1, 1), (3, 5), (40, 33)]
INF, NAN, TINY = float("inf"), float("nan"), float(np.finfo(np.float32).smallest_subnormal)


def oracle(scores, k, among=None):
    """The k largest by a stable sort, NaN below all else; -0.0 and 0.0 are equal to NumPy, too."""
    flat = np.asarray(scores, np.float64).ravel()
    order = np.lexsort((-flat, np.isnan(flat)))  # the last key counts first; stable
    if among is not None:
        order = order[np.asarray(among).ravel()[order]]
    mask = np.zeros(flat.shape, bool)
    mask[order[: max(k, 0)]] = True
    return mask.reshape(np.shape(scores))


def ties(shape):
    """Integer values, most of them many times over."""
    return hnp.arrays(np.float32, shape, elements=st.integers(-3, 3))


def floats(shape):
    """Any float32 at all, the odd ones often: denormals, signed zeros, infinities, NaN."""
    odd = st.sampled_from([0.0, -0.0, TINY, -TINY, INF, -INF, NAN])
    return hnp.arrays(np.float32, shape, elements=odd | st.floats(width=32))


@st.composite
def selections(draw, elements=ties):
    """Scores, how many to keep (0 to more than there are), and which may be kept."""
    shape = draw(st.sampled_from(SHAPES))
    scores = draw(elements(shape))
    k = draw(st.integers(0, scores.size + 2))
    return scores, k, draw(hnp.arrays(bool, shape))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@hypothesis.given(selection=selections())
def test_of_equal_scores_the_first_win(dtype, selection):
    scores, k, _ = selection
    mask = top_k(jnp.asarray(scores, dtype), k)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, oracle(scores, k))


@hypothesis.given(selection=selections(floats))
def test_any_floats(selection):
    scores, k, among = selection
    np.testing.assert_array_equal(top_k(jnp.asarray(scores), k), oracle(scores, k))
    np.testing.assert_array_equal(top_k(jnp.asarray(scores), k, jnp.asarray(among)), oracle(scores, k, among))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_order_of_special_values(dtype):
    """Each k in turn: infinities outermost, zeros of either sign equal, denormals on their own side of zero."""
    tiny, small = jnp.finfo(dtype).smallest_subnormal, jnp.finfo(dtype).tiny
    values = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, tiny, -tiny, small, -small, small / 2, 0.0, -0.0, INF, NAN, -INF]
    scores = np.asarray(values, dtype)
    for k in range(len(values) + 2):
        np.testing.assert_array_equal(top_k(scores, k), oracle(scores, k), err_msg=f"k = {k}")


def test_nan_counts_as_the_lowest_score():
    scores = jnp.asarray([NAN, -3e38, NAN, -INF, 0.0])
    np.testing.assert_array_equal(top_k(scores, 2), [False, True, False, False, True])
    np.testing.assert_array_equal(top_k(scores, 3), [False, True, False, True, True])
    np.testing.assert_array_equal(top_k(scores, 4), [True, True, False, True, True])
    np.testing.assert_array_equal(top_k(jnp.full(3, NAN), 2), [True, True, False])


def test_neighbouring_floats_are_told_apart():
    scores = np.float32(1) + np.arange(7, dtype=np.float32) * np.finfo(np.float32).eps
    for k in range(8):
        np.testing.assert_array_equal(top_k(jnp.asarray(scores), k), oracle(scores, k))


def test_float64_is_compared_in_full():
    scores = 1 + np.random.default_rng(0).permutation(50) * 1e-15
    with jax.enable_x64(True):
        assert jnp.asarray(scores).dtype == jnp.float64
        for k in (0, 1, 17, 50, 51):
            np.testing.assert_array_equal(top_k(jnp.asarray(scores), k), oracle(scores, k))
        special = jnp.asarray([0.0, -0.0, 5e-324, -5e-324, INF, -INF, NAN, 1e308])
        for k in range(9):
            np.testing.assert_array_equal(top_k(special, k), oracle(special, k))


def test_none_all_and_more_than_all():
    scores = jnp.asarray([[2.0, 1.0], [3.0, 1.0]])
    assert not select.top_k(scores, 0).any()
    assert select.top_k(scores, 4).all()
    assert select.top_k(scores, 1000).all()
    np.testing.assert_array_equal(select.top_k(scores, 3), [[True, True], [True, False]])


def test_k_may_change_without_compiling_again():
    chex.clear_trace_counter()
    chosen = jax.jit(chex.assert_max_traces(select.top_k.__wrapped__, n=1))
    scores = np.random.default_rng(1).integers(0, 9, (6, 7)).astype(np.float32)
    for k in range(44):
        np.testing.assert_array_equal(chosen(scores, jnp.asarray(k)), oracle(scores, k))


def test_vmap_over_scores_and_k():
    rng = np.random.default_rng(2)
    scores, k = rng.integers(0, 5, (11, 4, 6)).astype(np.float32), np.arange(0, 33, 3, dtype=np.int32)
    among = rng.random(scores.shape) < 0.6
    np.testing.assert_array_equal(
        top_k_of_each(scores, k, among), [oracle(*case) for case in zip(scores, k, among, strict=True)]
    )


@hypothesis.given(selection=selections())
def test_backward_selection_keeps_the_best_of_the_candidates(selection):
    scores, k, among = selection
    mask = np.asarray(top_k(jnp.asarray(scores), k, jnp.asarray(among)))
    assert not (mask & ~among).any()
    assert mask.sum() == min(k, among.sum())
    np.testing.assert_array_equal(mask, oracle(scores, k, among))


@hypothesis.given(
    scores=st.lists(ties((3, 5)), min_size=4, max_size=4),
    k=st.lists(st.integers(0, 15), min_size=4, max_size=4).map(lambda k: sorted(k, reverse=True)),
)
def test_repeated_backward_selection_only_ever_drops(scores, k):
    """Even where the scores change in between, and with exactly k left each time, as k falls."""
    mask = np.ones((3, 5), bool)
    for s, kept in zip(scores, k, strict=True):
        after = np.asarray(top_k(jnp.asarray(s), kept, jnp.asarray(mask)))
        assert not (after & ~mask).any()
        assert after.sum() == kept
        mask = after


LAYERS = {"second/kernel": (3, 5), "first/kernel": (4, 2), "a/kernel": (1, 6)}  # not in alphabetical order


@st.composite
def networks(draw):
    scores = {path: draw(ties(shape)) for path, shape in LAYERS.items()}
    k = {path: draw(st.integers(0, s.size)) for path, s in scores.items()}
    return scores, k, {path: draw(hnp.arrays(bool, shape)) for path, shape in LAYERS.items()}


@hypothesis.given(network=networks(), restricted=st.booleans())
def test_top_k_per_layer(network, restricted):
    scores, k, among = network
    masks = top_k_per_layer(scores, k, among if restricted else None)
    assert {path: mask.shape for path, mask in masks.items()} == LAYERS
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, oracle(scores[path], k[path], among[path] if restricted else None))


@hypothesis.given(network=networks(), restricted=st.booleans())
def test_top_k_global(network, restricted):
    """As one selection of `sum(k)` from all layers laid end to end, so that ties go to the earlier layer."""
    scores, k, among = network
    masks = select.top_k_global(as_arrays(scores), k, as_arrays(among) if restricted else None)
    assert {path: mask.shape for path, mask in masks.items()} == LAYERS
    ends = [np.concatenate([tree[path].ravel() for path in LAYERS]) for tree in (scores, among)]
    want = oracle(ends[0], sum(k.values()), ends[1] if restricted else None)
    np.testing.assert_array_equal(np.concatenate([np.ravel(masks[path]) for path in LAYERS]), want)


def as_arrays(tree):
    return {path: jnp.asarray(leaf) for path, leaf in tree.items()}


def test_global_ties_go_to_the_earlier_layer_and_a_layer_may_lose_all():
    scores = {"z": jnp.ones((2, 2)), "a": jnp.ones((1, 3)), "m": jnp.full((1, 2), 2.0)}
    masks = select.top_k_global(scores, {"z": 1, "a": jnp.asarray(2, jnp.int32), "m": 1})
    np.testing.assert_array_equal(masks["z"], [[True, True], [False, False]])
    assert not masks["a"].any()
    assert masks["m"].all()


@problems.examples(300)
@hypothesis.given(digits=st.integers(1, 9), data=st.data(), blocks=st.integers(1, 10**7))
def test_kept_blocks_is_exact_for_decimal_sparsities(digits, data, blocks):
    """The float nearest to a decimal number of up to 9 digits is read as that number."""
    text = f"0.{data.draw(st.integers(0, 10**digits - 1)):0{digits}}"
    assert select.kept_blocks(blocks, float(text)) == math.floor((1 - Fraction(text)) * blocks)


def test_kept_blocks_for_all_round_sparsities():
    for hundredths in range(100):
        for blocks in [*range(1, 401, 3), 360, 500, 1000, 12000, 31250]:
            want = blocks * (100 - hundredths) // 100
            assert select.kept_blocks(blocks, float(f"0.{hundredths:02}")) == want, (blocks, hundredths)


@pytest.mark.parametrize(
    ("blocks", "sparsity", "want"),
    [(360, 0.9, 36), (360, 0.8, 72), (100, 0.9, 10), (100, 0.8, 20), (400, 0.9, 40), (12000, 0.8, 2400)],
)
def test_kept_blocks_where_binary_floats_go_wrong(blocks, sparsity, want):
    assert math.floor((1 - sparsity) * blocks) == want - 1
    assert select.kept_blocks(blocks, sparsity) == want


def test_kept_blocks_of_repeating_fractions():
    assert select.kept_blocks(300, 1 / 3) == 200
    assert select.kept_blocks(7, 6 / 7) == 1
    assert select.kept_blocks(7, 0.0) == 7


@pytest.mark.parametrize("digit", [1, 4, 8])
@hypothesis.given(scores=floats((40, 33)), k=st.integers(1, 1320))
def test_thresholds_by_digits_of_any_width(digit, scores, k):
    keys = np.asarray(ordered_bits(scores)).ravel()
    assert kth_largest(keys, k, digit) == np.sort(keys)[-k]


@jax.jit
def keeping_outputs(scores, k, among, kept):
    chosen = select.keeping(select.top_k_per_layer, {"w": "outputs"})
    return chosen({"w": scores}, {"w": k}, {"w": among}, {"w": kept})["w"]


@hypothesis.given(selection=selections(), seed=st.integers(0, 9))
def test_each_column_keeps_its_best_block_first(selection, seed):
    """Of columns without one that stays anyway; then the best of all others, as many as without this."""
    scores, k, among = selection
    kept = np.random.default_rng(seed).random(scores.shape) < 0.1
    best = np.zeros(scores.shape, bool)
    for j in np.flatnonzero(~kept.any(0) & (among & ~kept).any(0)):
        rows = np.flatnonzero(among[:, j] & ~kept[:, j])
        best[rows[np.argmax(scores[rows, j])], j] = True
    first = oracle(scores, k, best)
    want = first | oracle(scores, k - first.sum(), among & ~first)
    np.testing.assert_array_equal(keeping_outputs(scores, k, among, kept), want)


def test_layers_keep_their_number_of_blocks_in_a_global_choice():
    rng = np.random.default_rng(0)
    scores = {"small": jnp.asarray(rng.random((2, 4, 3)) * 1e-3), "large": jnp.asarray(rng.random((6, 5)))}
    chosen = select.keeping(select.top_k_global, {"small": 2})(scores, {"small": 3, "large": 6})
    assert jnp.sum(chosen["small"], (1, 2)).tolist() == [2, 2]
    assert int(jnp.sum(chosen["large"])) == 2 * 3 + 6 - 4
    for matrix, mask in zip(scores["small"], chosen["small"], strict=True):
        np.testing.assert_array_equal(mask, oracle(matrix, 2))
