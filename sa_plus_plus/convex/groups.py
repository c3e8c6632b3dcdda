"""Groups: a partition of the coordinates of an array, and computations by group."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks
from sa_plus_plus.convex.scaling import unit_of

Kind = Literal["equal", "blocks", "partition"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """A partition of the coordinates of an array of `shape` into `count` groups.

    Make one with `equal`, `of_blocks` or `partition`. It is a pytree, so it passes through `jit` and `vmap`.

    Attributes:
      ids: for `partition`, the group of each coordinate, of `shape`, int32; else None.
      shape: of the coefficients.
      count: number of groups.
      kind: the layout: runs of equal length, blocks of a matrix, or arbitrary.
      block: for `of_blocks`.
    """

    ids: jax.Array | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    kind: Kind = dataclasses.field(metadata={"static": True})
    block: tuple[int, int] = dataclasses.field(default=(1, 1), metadata={"static": True})


def equal(shape: int | Sequence[int], size: int) -> Groups:
    """Runs of `size` rows: group `i` holds coordinates `i*size` to `(i+1)*size - 1` of the first axis.

    With coefficients of two axes (features x responses) a group has `size` whole rows.

    Args:
      shape: of the coefficients.
      size: rows per group.

    Raises:
      ValueError: if the first axis does not divide into runs of that length.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
    if size < 1 or not shape or shape[0] % size or not shape[0]:
        raise ValueError(
            f"coefficients of shape {shape} do not divide into groups of {size} rows: the first axis must be a "
            "multiple of the size; use groups.partition for groups of unequal size"
        )
    return Groups(None, shape, shape[0] // size, "equal")


def of_blocks(shape: Sequence[int], block: int | Sequence[int]) -> Groups:
    """Blocks of a matrix as `sa_plus_plus.blocks` cuts it, in row-major order; blocks on the far edges may be smaller.

    Args:
      shape: of the matrix, as classes x features in the paper's example.
      block: `(b_r, b_c)`, or one integer for both.
    """
    shape, pair = tuple(int(n) for n in shape), blocks.as_block(block)
    g_r, g_c = blocks.grid_shape(shape, pair)
    return Groups(None, shape, g_r * g_c, "blocks", pair)


def partition(shape: int | Sequence[int], members: Sequence[Sequence[int]]) -> Groups:
    """Any partition, given as the (flat, row-major) coordinates of each group.

    Args:
      shape: of the coefficients.
      members: coordinates of each group.

    Raises:
      ValueError: if groups overlap, are empty, leave the array, or miss a coordinate.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
    size = int(np.prod(shape))
    ids = np.full(size, -1, np.int32)
    for group, coordinates in enumerate(members):
        index = np.asarray(coordinates)
        if index.ndim != 1 or not index.size or not np.issubdtype(index.dtype, np.integer):
            raise ValueError(f"group {group} must be a non-empty list of integers, got {coordinates!r}")
        if index.min() < 0 or index.max() >= size:
            wrong = int(index.min() if index.min() < 0 else index.max())
            raise ValueError(f"group {group} has coordinate {wrong}, outside of 0 to {size - 1} (shape {shape})")
        assigned = index[ids[index] >= 0]
        if assigned.size or np.unique(index).size < index.size:
            twice = assigned[0] if assigned.size else np.sort(index)[:-1][np.diff(np.sort(index)) == 0][0]
            other = f"in group {ids[twice]} too" if assigned.size else "there twice"
            raise ValueError(f"groups overlap: coordinate {int(twice)} of group {group} is {other}")
        ids[index] = group
    if (ids < 0).any():
        missed = np.flatnonzero(ids < 0)
        raise ValueError(
            f"groups miss {missed.size} of {size} coordinates, the first is {int(missed[0])}: add them to a group, or "
            "each as a group of its own"
        )
    return Groups(jnp.asarray(ids.reshape(shape)), shape, len(members), "partition")


def sum_per_group(groups: Groups, x: jax.Array) -> jax.Array:
    """Sum of `x` (of the groups' shape) over each group, `(count,)`.

    Args:
      groups: how the coefficients are grouped.
      x: of the groups' shape.
    """
    _check(groups, x.shape)
    if groups.kind == "equal":
        return jnp.sum(x.reshape(groups.count, -1), axis=1)
    if groups.kind == "blocks":
        return jnp.sum(blocks.to_blocks(x, groups.block), axis=(1, 3)).ravel()
    assert groups.ids is not None
    return jax.ops.segment_sum(x.ravel(), groups.ids.ravel(), groups.count)


def spread(groups: Groups, s: jax.Array) -> jax.Array:
    """The array of the groups' shape that is `s[i]` on group `i`; `s` has shape `(count,)`.

    Args:
      groups: how the coefficients are grouped.
      s: `(count,)`.
    """
    if s.shape != (groups.count,):
        raise ValueError(f"expected one value for each of {groups.count} groups, got shape {s.shape}")
    if groups.kind == "equal":
        per = int(np.prod(groups.shape)) // groups.count
        return jnp.broadcast_to(s[:, None], (groups.count, per)).reshape(groups.shape)
    if groups.kind == "blocks":
        return blocks.expand_blocks(
            s.reshape(blocks.grid_shape(groups.shape, groups.block)), groups.shape, groups.block
        )
    assert groups.ids is not None
    return s[groups.ids]


def norms(groups: Groups, x: jax.Array) -> jax.Array:
    """2-norm of each group, `(count,)`, with gradient 0 (not NaN) at a group of zeros.

    Args:
      groups: how the coefficients are grouped.
      x: of the groups' shape.
    """
    unit = unit_of(x)
    squares = sum_per_group(groups, jnp.square(x / unit))
    zero = squares == 0
    return unit * jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def scale(groups: Groups, s: jax.Array, x: jax.Array) -> jax.Array:
    """`x` with group `i` multiplied by `s[i]`.

    Args:
      groups: how the coefficients are grouped.
      s: `(count,)`.
      x: of the groups' shape.
    """
    return spread(groups, s.astype(x.dtype)) * x


def sizes(groups: Groups) -> np.ndarray:
    """Coordinates in each group, `(count,)`.

    Args:
      groups: how the coefficients are grouped.
    """
    if groups.kind == "equal":
        return np.full(groups.count, int(np.prod(groups.shape)) // groups.count)
    if groups.kind == "blocks":
        return blocks.block_sizes(groups.shape, groups.block).ravel()
    return np.bincount(np.asarray(groups.ids).ravel(), minlength=groups.count)


def members(groups: Groups) -> list[np.ndarray]:
    """Flat coordinates of each group, in increasing order.

    Args:
      groups: how the coefficients are grouped.
    """
    ids = np.asarray(spread(groups, jnp.arange(groups.count))).ravel()
    order = np.argsort(ids, kind="stable")
    return np.split(order, np.cumsum(sizes(groups))[:-1])


def _check(groups: Groups, shape: tuple[int, ...]) -> None:
    if shape != groups.shape:
        raise ValueError(f"the groups are of coefficients of shape {groups.shape}, got an array of shape {shape}")
