"""Choosing which blocks to keep: exact top-k with a traced k.

The k-th largest score is found digit by digit on the bits of the floats: one counting pass per digit, no sort, and
`k` may change from step to step without recompiling. Counts are integers, so the choice does not depend on how the
scores are sharded over devices.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import lax


def kept_blocks(blocks: int, sparsity: float) -> int:
    """`floor((1 - sparsity) * blocks)` in exact arithmetic on the decimal value of `sparsity`.

    Binary floats would give 35 for 360 blocks at 0.9, since `1 - 0.9` is just below 0.1.

    Args:
      blocks: number of blocks `N`.
      sparsity: share removed, in [0, 1).

    >>> kept_blocks(360, 0.9)
    36
    """
    exact = Fraction(str(sparsity)).limit_denominator(10**9)  # the shortest text for this float, of any width
    return math.floor((1 - exact) * blocks)


def _ordered_bits(scores: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats: -inf < ... < -0 = 0 < ... < inf, NaN below all, never 0."""
    if scores.dtype.itemsize < 4:
        scores = scores.astype(jnp.float32)
    unsigned = jnp.uint32 if scores.dtype.itemsize == 4 else jnp.uint64
    bits = lax.bitcast_convert_type(scores, unsigned)
    top = jnp.asarray(1 << (jnp.iinfo(unsigned).bits - 1), unsigned)
    ordered = jnp.where(bits > top, ~bits, bits | top)  # -0 is `top` itself, and so equals +0
    return jnp.where(jnp.isnan(scores), 1, ordered)


def _kth_largest(keys: jax.Array, k: jax.Array, digit: int = 1) -> jax.Array:
    """The largest threshold that at least k keys reach, built from the top bits down, `digit` bits per pass.

    Each pass counts the keys that reach each of the `2**digit - 1` thresholds with a larger digit.
    """
    bits = jnp.iinfo(keys.dtype).bits
    digits = jnp.arange(1, 1 << digit, dtype=keys.dtype)

    def one_pass(i: jax.Array, threshold: jax.Array) -> jax.Array:
        shift = (bits - digit * (1 + i)).astype(keys.dtype)
        reached = jnp.sum(keys[:, None] >= (threshold | (digits << shift))[None], axis=0, dtype=jnp.int32)
        return threshold | (jnp.sum(reached >= k, dtype=keys.dtype) << shift)

    return lax.fori_loop(0, bits // digit, one_pass, jnp.asarray(0, keys.dtype), unroll=digit > 1)


def _few_passes(keys: jax.Array, k: jax.Array) -> jax.Array:
    """For GPUs, where launching a pass takes longer than comparing with many thresholds in it."""
    return _kth_largest(keys, k, digit=8 if keys.size < 1 << 20 else 4)


@jax.jit  # traced once for all layers of a shape
def top_k(scores: jax.Array, k: jax.Array | int, among: jax.Array | None = None) -> jax.Array:
    """Mask of the k largest scores; among equal scores the lower (row-major) index wins.

    Args:
      scores: any shape, floating point. NaN counts as the lowest score.
      k: number of entries to keep, may be traced; limited to the number of candidates.
      among: optional mask of the shape of `scores`: only these entries may be kept (backward selection).

    Returns:
      Boolean array of the shape of `scores`, with exactly `min(k, number of candidates)` entries true.
    """
    k = jnp.asarray(k, jnp.int32)
    keys = _ordered_bits(scores.ravel())
    if among is not None:
        keys = jnp.where(among.ravel(), keys, 0)  # below every score, so never reached while candidates last
    threshold = lax.platform_dependent(keys, k, cuda=_few_passes, rocm=_few_passes, default=_kth_largest)
    above, tied = keys > threshold, keys == threshold
    room = k - jnp.sum(above, dtype=jnp.int32)
    mask = above | (tied & (jnp.cumsum(tied, dtype=jnp.int32) <= room))
    if among is not None:
        mask = mask & among.ravel()
    return mask.reshape(scores.shape)


def top_k_per_layer(
    scores: Mapping[str, jax.Array], k: Mapping[str, jax.Array | int], among: Mapping[str, jax.Array] | None = None
) -> dict[str, jax.Array]:
    """`top_k` of every matrix on its own.

    Args:
      scores: `(*stack, grid_r, grid_c)` by path: of one matrix, or of a stack of them.
      k: how many blocks of each matrix, by path.
      among: as in `top_k`, by path.
    """

    def chosen(path: str) -> jax.Array:
        score, candidates = scores[path], None if among is None else among[path]
        if score.ndim <= 2:
            return top_k(score, k[path], candidates)
        flat = [None if a is None else a.reshape(-1, *a.shape[-2:]) for a in (score, candidates)]
        return jax.vmap(lambda s, a: top_k(s, k[path], a))(*flat).reshape(score.shape)

    return {path: chosen(path) for path in scores}


def top_k_global(
    scores: Mapping[str, jax.Array], k: Mapping[str, jax.Array | int], among: Mapping[str, jax.Array] | None = None
) -> dict[str, jax.Array]:
    """`top_k` over all matrices together, with as many blocks as `top_k_per_layer`; ties go to the earlier layer.

    A layer may lose all its blocks: the paper (C.1) argues for `top_k_per_layer`.

    Args:
      scores: `(*stack, grid_r, grid_c)` by path, comparable between layers.
      k: how many blocks of each matrix, by path; their sum is kept.
      among: as in `top_k`, by path.
    """
    paths = list(scores)
    flat = jnp.concatenate([scores[p].ravel() for p in paths])
    flat_among = None if among is None else jnp.concatenate([among[p].ravel() for p in paths])
    total = sum(math.prod(scores[p].shape[:-2]) * jnp.asarray(k[p], jnp.int32) for p in paths)
    mask = top_k(flat, total, flat_among)
    masks, start = {}, 0
    for p in paths:
        masks[p] = mask[start : start + scores[p].size].reshape(scores[p].shape)
        start += scores[p].size
    return masks


Choose = Callable[..., dict[str, jax.Array]]  # `top_k_per_layer` or `top_k_global`


def keeping(choose: Choose, min_kept: Mapping[str, int | str]) -> Choose:
    """`choose` with a number of blocks that every matrix keeps, or one in each column of its grid.

    These are its best ones. The function takes one more argument, `kept`: blocks that stay anyway, by path.

    Args:
      choose: `top_k_per_layer` or `top_k_global`.
      min_kept: by path, the number, or `"outputs"` for one in each column. Where `k` is less, as many of them as that.
    """

    def chosen(
        scores: Mapping[str, jax.Array],
        k: Mapping[str, jax.Array | int],
        among: Mapping[str, jax.Array] | None = None,
        kept: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        raised = dict(scores)
        for path in scores:
            if not min_kept.get(path):
                continue
            score, stays = scores[path], jnp.zeros(scores[path].shape, bool) if kept is None else kept[path]
            candidates = ~stays if among is None else among[path] & ~stays
            wanted = _wanted(score, min_kept[path], candidates, stays)
            first = top_k_per_layer({"": score}, {"": k[path]}, {"": wanted})[""]
            raised[path] = jnp.where(first, jnp.inf, score)
        return choose(raised, k, among)

    return chosen


def _wanted(score: jax.Array, least: int | str, candidates: jax.Array, stays: jax.Array) -> jax.Array:
    """The best candidates that are needed besides the blocks that stay."""
    if not isinstance(least, str):
        best = top_k_per_layer({"": score}, {"": least}, {"": candidates})[""]
        return best & (jnp.sum(stays, (-2, -1), keepdims=True) < least)
    keys = jnp.where(candidates & ~jnp.any(stays, -2, keepdims=True), _ordered_bits(score), 0)
    rows = jnp.arange(score.shape[-2])[:, None]
    return (keys > 0) & (rows == jnp.argmax(keys, -2, keepdims=True))
