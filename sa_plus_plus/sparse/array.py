"""A kernel stored as its nonzero blocks."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from sa_plus_plus import blocks as blk
from sa_plus_plus.views import View, Viewable, as_view, default


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The positions of a kernel's kept blocks: its grid in compressed column format.

    The blocks of grid column `j` are numbers `indptr[j]` to `indptr[j + 1]`, from top to bottom, and `indices` has the
    grid row of each. A layout is validated when it is created and is immutable, so code that uses it need not check
    again. It is hashable and compared by value: a program compiled for one layout serves all equal ones.

    Attributes:
      shape: the kernel's shape.
      block: `(b_r, b_c)` over the kernel's matrix.
      indices: int32 `(nse,)`.
      indptr: int32 `(grid_c + 1,)`.
      view: how the kernel is read as matrices; None for one, with all axes but the last as rows. Several matrices are
        placed side by side in the grid, each with its own columns of blocks.

    Raises:
      ValueError: if an index is out of range, out of order or duplicated.
    """

    shape: tuple[int, ...]
    block: blk.Block
    indices: np.ndarray
    indptr: np.ndarray
    view: View | None = None

    def __post_init__(self) -> None:
        set_field = functools.partial(object.__setattr__, self)  # the class is frozen for all others
        set_field("shape", tuple(int(n) for n in self.shape))
        set_field("block", blk.as_block(self.block))
        if min(self.shape) < 1:
            raise ValueError(f"a kernel has no side of length 0, got shape {self.shape}")
        set_field("indices", _checked_ints(self.indices, "indices"))
        set_field("indptr", _checked_ints(self.indptr, "indptr"))
        grid_r, grid_c = self.grid
        if len(self.indptr) != grid_c + 1 or self.indptr[0] != 0 or self.indptr[-1] != len(self.indices):
            ends = f"{self.indptr[0]} to {self.indptr[-1]}" if len(self.indptr) else "nothing"
            raise ValueError(
                f"indptr must be {grid_c + 1} numbers from 0 to {len(self.indices)}, the number of blocks; "
                f"got {len(self.indptr)}, {ends}"
            )
        if (decreases := np.diff(self.indptr) < 0).any():
            raise ValueError(f"indptr must be non-decreasing, but decreases after column {int(decreases.argmax())}")
        outside = (self.indices < 0) | (self.indices >= grid_r)
        if outside.any():
            at = int(outside.argmax())
            raise ValueError(f"block {at} is in grid row {self.indices[at]}, outside 0 to {grid_r - 1}")
        unordered = (np.diff(self.indices) <= 0) & (np.diff(self.columns) == 0)
        if unordered.any():
            at = int(unordered.argmax())
            raise ValueError(
                f"indices must increase within a column of the grid, but block {at + 1} is in row "
                f"{self.indices[at + 1]} after row {self.indices[at]}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks down and across, with several matrices side by side."""
        grid_r, grid_c = blk.grid_shape(self.shape, self.block, self.view)
        return grid_r, grid_c * self.matrices

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of each matrix."""
        return blk.matrix_shape(self.shape, self.view)

    @property
    def matrices(self) -> int:
        """How many there are."""
        return math.prod(self.view.stack(self.shape)) if self.view else 1

    @property
    def nse(self) -> int:
        """Number of blocks kept ("specified elements", as in `jax.experimental.sparse`)."""
        return len(self.indices)

    @property
    def density(self) -> float:
        """Share of the blocks kept."""
        grid_r, grid_c = self.grid
        return self.nse / (grid_r * grid_c)

    @functools.cached_property
    def columns(self) -> np.ndarray:
        """Grid column of each block, int32 `(nse,)`."""
        return np.repeat(np.arange(self.grid[1], dtype=np.int32), np.diff(self.indptr))

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """True where a block is kept, `(grid_r, grid_c)`."""
        mask = np.zeros(self.grid, bool)
        mask[self.indices, self.columns] = True
        return mask

    @functools.cached_property
    def real(self) -> np.ndarray:
        """True where an entry of a kept block is a weight, not padding beyond an edge, `(nse, b_r, b_c)`."""
        (height, width), (b_r, b_c) = self.matrix, self.block
        columns = self.columns % (self.grid[1] // self.matrices)
        down = self.indices[:, None] * b_r + np.arange(b_r) < height
        across = columns[:, None] * b_c + np.arange(b_c) < width
        return down[:, :, None] & across[:, None, :]

    @functools.cached_property
    def transposed(self) -> tuple["Layout", np.ndarray]:
        """The layout of the transposed matrix, and the permutation of this layout's blocks in it."""
        order = np.lexsort((self.columns, self.indices))
        indptr = np.concatenate([[0], np.cumsum(np.bincount(self.indices, minlength=self.grid[0]))])
        if self.matrices > 1:
            raise ValueError(f"a stack of {self.matrices} matrices has no transpose")
        return Layout(self.matrix[::-1], self.block[::-1], self.columns[order], indptr), order

    @functools.cached_property
    def _key(self) -> tuple[object, ...]:
        return self.shape, self.block, self.view, self.indices.tobytes(), self.indptr.tobytes()

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self._key == other._key)

    def kernel(self, tiles: Any) -> Any:
        """The kernel of this layout from all its blocks, `(grid_r, grid_c, b_r, b_c)`."""
        (grid_r, grid_c), stack = self.grid, self.view.stack(self.shape) if self.view else ()
        apart = tiles.reshape(grid_r, self.matrices, grid_c // self.matrices, *self.block)
        blocks = apart.transpose(1, 0, 3, 2, 4)  # (matrices, grid_r, b_r, grid_c, b_c)
        return blk.from_blocks(blocks.reshape(*stack, *blocks.shape[1:]), self.shape, self.view)

    def __repr__(self) -> str:
        (grid_r, grid_c), (b_r, b_c) = self.grid, self.block
        by = "×".join(map(str, self.shape))
        return f"Layout({by} in {b_r}×{b_c}: {self.nse:,} of {grid_r * grid_c:,} blocks, {self.density:.1%})"


def _side_by_side(blocks: np.ndarray, axes: int = 2) -> np.ndarray:
    """`(*stack, grid_r, grid_c, ...)` as `(grid_r, matrices * grid_c, ...)`; `axes` from `grid_r` on."""
    apart = blocks.reshape(-1, *blocks.shape[blocks.ndim - axes :]).swapaxes(0, 1)
    return apart.reshape(apart.shape[0], -1, *apart.shape[3:])


def _checked_ints(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a list of integers, got {values.dtype} of shape {values.shape}")
    if values.size and not -(2**31) <= values.min() <= values.max() < 2**31:
        raise ValueError(f"{name} must fit 32 bits, got values from {values.min()} to {values.max()}")
    values = values.astype(np.int32)  # a copy that nothing else references
    values.flags.writeable = False
    return values


@functools.partial(jax.tree_util.register_dataclass, data_fields=["blocks"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class BlockSparse:
    """A kernel stored by its kept blocks; a pytree whose only leaf is `blocks`.

    Names follow `jax.experimental.sparse`, whose `BCSR` is ordered by rows. This is ordered by columns: a group of
    outputs needs a column of blocks.

    Attributes:
      blocks: `(nse, b_r, b_c)` in the layout's order, zero beyond the kernel's edge.
      layout: their positions; static under `jit`.
    """

    blocks: jax.Array
    layout: Layout

    @classmethod
    def fromdense(
        cls,
        kernel: jax.Array | np.ndarray,
        block: int | Sequence[int | None],
        mask: np.ndarray | None = None,
        view: Viewable | None = None,
    ) -> "BlockSparse":
        """Keep the blocks of a kernel that are not entirely zero.

        Args:
          kernel: any dtype; concrete values, not a tracer.
          block: `(b_r, b_c)` over the kernel's matrix, or one integer for a square.
          mask: boolean `(*stack, grid_r, grid_c)`: which blocks to keep instead.
          view: how it is read as matrices, such as `"d (h k)"`; by default as one, with all axes but the last as rows.

        Raises:
          TypeError: under `jax.jit`, where no values are available.
          ValueError: if the kernel is empty, or the mask does not have the shape of its grid.
        """
        if isinstance(kernel, jax.core.Tracer):
            raise TypeError("BlockSparse.fromdense looks at the weights, so call it outside jit, vmap and grad")
        if 0 in kernel.shape:
            raise ValueError(f"a kernel has no side of length 0, got shape {kernel.shape}")
        read = None if view is None else as_view(view, kernel.ndim)
        sides = blk.as_block(block, blk.matrix_shape(kernel.shape, read))
        tiles = blk.to_blocks(np.asarray(kernel), sides, read).swapaxes(-3, -2)  # (*stack, grid_r, grid_c, b_r, b_c)
        keep = (tiles != 0).any((-2, -1)) if mask is None else np.asarray(mask, bool)
        if keep.shape != tiles.shape[:-2]:
            raise ValueError(f"mask must have the shape {tiles.shape[:-2]} of the kernel's grid, got {keep.shape}")
        keep, tiles = _side_by_side(keep), _side_by_side(tiles, 4)
        columns, indices = np.nonzero(keep.T)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=keep.shape[1]))])
        view = None if read == default(kernel.ndim) else read
        return cls(jax.device_put(tiles[indices, columns]), Layout(kernel.shape, sides, indices, indptr, view))

    def todense(self) -> jax.Array:
        """The kernel in full, exactly, zeros where no block is kept; differentiable and jittable."""
        (grid_r, grid_c), (b_r, b_c) = self.layout.grid, self.layout.block
        tiles = jnp.zeros((grid_r, grid_c, b_r, b_c), self.dtype)
        tiles = tiles.at[self.layout.indices, self.layout.columns].set(self.blocks)
        return self.layout.kernel(tiles)

    @property
    def indices(self) -> np.ndarray:
        """Grid row of each block, int32 `(nse,)`."""
        return self.layout.indices

    @property
    def indptr(self) -> np.ndarray:
        """Index of the first block of each grid column, int32 `(grid_c + 1,)`."""
        return self.layout.indptr

    @property
    def nse(self) -> int:
        """Number of blocks kept."""
        return self.layout.nse

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return self.layout.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.blocks.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of blocks and indices in memory."""
        return self.blocks.nbytes + self.layout.indices.nbytes + self.layout.indptr.nbytes

    def __repr__(self) -> str:
        return f"BlockSparse({self.layout!r}, {getattr(self.blocks, 'dtype', self.blocks)})"


def _layout_bytes(meta: tuple[Layout]) -> bytes:
    (layout,) = meta
    arrays = layout.indices.tolist(), layout.indptr.tolist()
    return json.dumps([layout.shape, layout.block, *arrays, layout.view], separators=(",", ":")).encode()


def _layout_of(text: bytes | bytearray) -> tuple[Layout]:
    shape, block, indices, indptr, *rest = json.loads(bytes(text))
    view = View(*map(tuple, rest[0])) if rest and rest[0] else None
    return (Layout(tuple(shape), tuple(block), np.array(indices, np.int32), np.array(indptr, np.int32), view),)


# So that functions of kernels can be exported and saved.
export.register_pytree_node_serialization(
    BlockSparse,
    serialized_name="sa_plus_plus.BlockSparse",
    serialize_auxdata=_layout_bytes,
    deserialize_auxdata=_layout_of,
)
