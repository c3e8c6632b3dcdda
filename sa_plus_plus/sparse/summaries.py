"""What a tree of parameters holds, without a plan: zeros, blocks and bytes of each array."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.checks import occupied
from sa_plus_plus.plan_options import Views
from sa_plus_plus.planning import LeafPlan, readings
from sa_plus_plus.plans import by, read_as
from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.compiler.infer_blocks import pruned_in
from sa_plus_plus.sparse.files.serialization import todense
from sa_plus_plus.text import table

_INDEX_BYTES = 4  # a block's place takes so many in a file


class LeafSummary(NamedTuple):
    """One leaf of a tree.

    Attributes:
      layer: its path and shape, and how it is read as matrices; its `block`, `grid` and `kept` are those found, one
        block for all of the leaf where no block is zero.
      dtype: its type; empty if it is no array.
      zeros: how many of its weights are zero; None if it is a shape alone, without values.
      bytes: in full.
      stored_bytes: by its kept blocks, as `sapp.save` stores what `sapp.export` returns; in full if no block is zero.
    """

    layer: LeafPlan
    dtype: str
    zeros: int | None
    bytes: int
    stored_bytes: int

    @property
    def path(self) -> str:
        return self.layer.path

    @property
    def has_blocks(self) -> bool:
        """Whether some of its blocks are zero."""
        return self.layer.kept < self.layer.blocks


class Summary(NamedTuple):
    """What a tree holds; `print` shows it.

    Attributes:
      leaves: one for each leaf, in the order of the tree.
    """

    leaves: tuple[LeafSummary, ...]

    @property
    def kernels(self) -> tuple[LeafSummary, ...]:
        """The leaves that are kernels."""
        return tuple(leaf for leaf in self.leaves if leaf.layer.is_kernel)

    @property
    def sparsity(self) -> float:
        """Share of the kernels' weights that are zero; NaN without kernels that have values."""
        known = [leaf for leaf in self.kernels if leaf.zeros is not None]
        weights = sum(leaf.layer.weights for leaf in known)
        return sum(leaf.zeros or 0 for leaf in known) / weights if weights else float("nan")

    @property
    def bytes(self) -> int:
        """The size of all leaves in full."""
        return sum(leaf.bytes for leaf in self.leaves)

    @property
    def stored_bytes(self) -> int:
        """The size of all leaves, kernels stored by their kept blocks."""
        return sum(leaf.stored_bytes for leaf in self.leaves)

    def table(self, *, all: bool = False) -> str:
        """The tree in one line, and a table of its leaves.

        Args:
          all: whether scalars, vectors and leaves that are no arrays are in the table too.
        """
        shown = [leaf for leaf in self.leaves if all or not leaf.layer.is_vector]
        head = ("path", "shape", "read as", "dtype", "zeros", "block", "blocks", "kept", "bytes", "by blocks")
        viewed = any(leaf.layer.view or leaf.layer.assumed for leaf in shown)
        hidden = len(self.leaves) - len(shown)
        note = f" ({hidden} scalars and vectors not shown)" if hidden else ""
        found = sum(leaf.has_blocks for leaf in self.kernels)
        zeros = "" if np.isnan(self.sparsity) else f"; {self.sparsity:.2%} of {self._weights:,} kernel weights are zero"
        size = f"{bytes_text(self.bytes)}, by blocks {bytes_text(self.stored_bytes)}"
        line = f"{found} of {len(self.kernels)} kernels have blocks of zeros{zeros}; {size}{note}"
        return f"{line}\n\n{table(head, [_row(leaf) for leaf in shown], omit=() if viewed else ('read as',))}"

    @property
    def _weights(self) -> int:
        return sum(leaf.layer.weights for leaf in self.kernels)

    def __str__(self) -> str:
        return self.table()


def summary(params: Any, *, block: int | Sequence[int | None] | None = None, views: Views | None = None) -> Summary:
    """The sparsity, blocks and bytes of any tree of parameters, without a plan.

    Args:
      params: tree of arrays, of `BlockSparse` such as `sapp.export` and `sapp.load` return, or of shapes and dtypes.
      block: to count blocks of; by default each kernel's, inferred from the positions of its zeros.
      views: by path or pattern, how leaves are read as matrices, as `plan` takes them.

    Raises:
      ValueError: if the tree has no leaves, a block is out of range, or a view does not fit.
      TypeError: under `jax.jit`, where weights have no values to look at.
    """
    sides = None if block is None else blk.as_sides(block)
    read = readings(jax.tree.map(_shape_of, params, is_leaf=_is_sparse), views)
    leaves = jax.tree.leaves(params, is_leaf=_is_sparse)
    return Summary(tuple(_leaf(layer, leaf, sides) for layer, leaf in zip(read, leaves, strict=True)))


def stored_bytes(layer: LeafPlan, mask: np.ndarray, itemsize: int) -> int:
    """Bytes of a kernel's kept blocks and of their places, as `sapp.save` stores them.

    Args:
      layer: of the kernel.
      mask: true where a block is kept, `(*stack, grid_r, grid_c)`.
      itemsize: bytes of a weight.
    """
    sizes = blk.block_sizes(layer.shape, layer.block, layer.view)
    return int((mask * sizes).sum()) * itemsize + int(mask.sum()) * _INDEX_BYTES


def bytes_text(count: int) -> str:
    """A number of bytes in words: `1.5 MB`.

    Args:
      count: of bytes.

    >>> bytes_text(1_500_000), bytes_text(999)
    ('1.5 MB', '999 B')
    """
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _leaf(layer: LeafPlan, leaf: Any, sides: tuple[int | None, int | None] | None) -> LeafSummary:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError("a summary needs the weights' values: call it outside jit, vmap and grad")
    if isinstance(leaf, BlockSparse):
        block, view = leaf.layout.block, leaf.layout.view
        grid = blk.grid_shape(leaf.shape, block, view)
        layer = LeafPlan(layer.path, leaf.shape, block, grid, 0, 0.0, "", view)
        sides, leaf = block, todense(leaf)
    dtype = getattr(leaf, "dtype", None)
    count = 0 if dtype is None else layer.weights * dtype.itemsize
    if dtype is None or isinstance(leaf, jax.ShapeDtypeStruct) or jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return LeafSummary(_one_block(layer), "" if dtype is None else str(dtype), None, count, count)
    values = np.asarray(leaf)
    zeros = int(values.size - np.count_nonzero(values))
    if not layer.is_kernel:
        return LeafSummary(layer, str(dtype), zeros, count, count)
    found = blk.as_block(sides, blk.matrix_shape(layer.shape, layer.view)) if sides else _inferred(values, layer)
    if found is None:
        return LeafSummary(_one_block(layer), str(dtype), zeros, count, count)
    mask = occupied(values, found, layer.view)
    layer = layer._replace(block=found, grid=mask.shape[-2:], kept=int(mask.sum()))
    stored = stored_bytes(layer, mask, dtype.itemsize) if not mask.all() else count
    return LeafSummary(layer, str(dtype), zeros, count, stored)


def _one_block(layer: LeafPlan) -> LeafPlan:
    """A kernel in which no block is zero."""
    if not layer.is_kernel:
        return layer
    block = blk.matrix_shape(layer.shape, layer.view)
    return layer._replace(block=block, grid=(1, 1), kept=int(np.prod(layer.stack)))


def _inferred(kernel: np.ndarray, layer: LeafPlan) -> blk.Block | None:
    """The block that the zeros of most of a kernel's matrices suggest."""
    found = [pruned_in(matrix)[0] for matrix in blk.matrices(kernel, layer.view).reshape(-1, *_matrix(layer))]
    blocks = [block for block in found if block]
    return max(sorted(set(blocks)), key=blocks.count) if blocks else None


def _matrix(layer: LeafPlan) -> tuple[int, int]:
    return blk.matrix_shape(layer.shape, layer.view)


def _row(leaf: LeafSummary) -> tuple[str, ...]:
    layer, zeros = leaf.layer, "-"
    if leaf.zeros is not None and layer.weights:
        zeros = f"{leaf.zeros / layer.weights:.1%}"
    head = (layer.path, by(layer.shape), read_as(layer) if layer.is_kernel else "-", leaf.dtype or "-", zeros)
    blocks = (by(layer.block), f"{layer.blocks:,}", f"{layer.kept:,}") if leaf.has_blocks else ("-", "-", "-")
    return (*head, *blocks, bytes_text(leaf.bytes), bytes_text(leaf.stored_bytes))


def _is_sparse(x: Any) -> bool:
    return isinstance(x, BlockSparse)


def _shape_of(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_sparse(leaf) else leaf
