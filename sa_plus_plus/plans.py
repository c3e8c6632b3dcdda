"""A plan: for each leaf of a parameter tree its blocks and how many of them stay; printed as a table."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sa_plus_plus import blocks as blk
from sa_plus_plus import select
from sa_plus_plus.layouts import PERHAPS_DEPTHWISE
from sa_plus_plus.names import BIASES_AND_SCALES
from sa_plus_plus.text import table
from sa_plus_plus.views import View

OUTPUTS = "outputs"  # as a number of blocks to keep: one for each column of the grid
SHOWN = 4  # lines on layers of too few blocks
OPEN = (
    "\n\nassumed, perhaps: guessed by names and shapes; views=sapp.views_of(fn, params, x) reads it off fn(params, x)"
)
VECTORS = "not a kernel (one weight for each channel)"  # why a leaf of a vector for each of several layers stays dense


class LeafPlan(NamedTuple):
    """The plan for one leaf of the parameter tree.

    Attributes:
      path: keys from the root, joined by `/`.
      shape: shape of the leaf.
      block: `(b_r, b_c)`.
      grid: blocks down and across each matrix; `(0, 0)` if the leaf is not a kernel.
      kept: number of blocks that stay, the same in each matrix; all of them if the layer is not pruned.
      sparsity: target share of the blocks removed, in [0, 1).
      skip_reason: empty for a pruned layer, else the reason why it stays dense.
      view: how the leaf is read as matrices; None for all axes but the last as rows.
      assumed: whether the view is a guess because the leaf is ambiguous.
      min_kept: number of blocks of each matrix that stay whatever the sparsity and the other layers are; `"outputs"`
        for one in each column of the grid.
    """

    path: str
    shape: tuple[int, ...]
    block: blk.Block
    grid: tuple[int, int]
    kept: int
    sparsity: float
    skip_reason: str
    view: View | None = None
    assumed: bool = False
    min_kept: int | str = 0

    @property
    def stack(self) -> tuple[int, ...]:
        """Sides of the batch axes: how many matrices the leaf holds; empty for one."""
        return self.view.stack(self.shape) if self.view else ()

    @property
    def full_grid(self) -> tuple[int, ...]:
        """`(*stack, grid_r, grid_c)`: the shape of masks, logits and scores."""
        return *self.stack, *self.grid

    @property
    def kept_each(self) -> int:
        """Number of blocks that stay in each matrix."""
        return self.kept // math.prod(self.stack)

    @property
    def blocks(self) -> int:
        """Number of blocks in all matrices."""
        return math.prod(self.full_grid)

    def kept_each_at(self, sparsity: float) -> int:
        """Number of blocks that stay in each matrix at a sparsity: `floor((1 - sparsity) N)`, and `min_kept` at least.

        Args:
          sparsity: share of the blocks removed, in [0, 1).
        """
        each = math.prod(self.grid)
        least = self.grid[1] if self.min_kept == OUTPUTS else int(self.min_kept)
        return min(each, max(least, select.kept_blocks(each, sparsity)))

    @property
    def cut_off(self) -> tuple[int, int]:
        """How many inputs and outputs of each matrix, at least, have no weight that stays.

        Those of whole rows and columns of blocks, for there are more of these than blocks that stay. None where a block
        is the whole of the other side: there to remove a block is to remove inputs or outputs.
        """
        sides = blk.matrix_shape(self.shape, self.view)
        lines = zip(sides, self.block, reversed(self.grid), strict=True)
        rows, cols = (n - min(n, self.kept_each * b) if others > 1 else 0 for n, b, others in lines)
        return rows, cols

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_kernel(self) -> bool:
        return self.blocks > 0

    @property
    def is_open(self) -> bool:
        """Whether names and shapes leave open how it is read."""
        return self.assumed or self.skip_reason == PERHAPS_DEPTHWISE

    @property
    def is_vector(self) -> bool:
        """Whether it is a scalar, a vector, a vector for each of several layers, or no array at all."""
        told = self.skip_reason == VECTORS or self.skip_reason in BIASES_AND_SCALES
        return not self.is_kernel and (len(self.shape) < 2 or told)


class Plan(NamedTuple):
    """The plan for every leaf of a parameter tree; `print(plan)` shows it.

    Attributes:
      leaves: one `LeafPlan` per leaf, in the order of the tree.
      scope: `"layer"` if each layer keeps its planned number of blocks, `"global"` if all layers together keep the sum
        of these.
    """

    leaves: tuple[LeafPlan, ...]
    scope: str = "layer"

    @property
    def pruned(self) -> dict[str, LeafPlan]:
        """The layers that are pruned, by path."""
        return {layer.path: layer for layer in self.leaves if not layer.skip_reason}

    @property
    def kernel_weights(self) -> int:
        """Number of weights in all kernels, pruned or not."""
        return sum(layer.weights for layer in self.leaves if layer.is_kernel)

    @property
    def sparsity(self) -> float:
        """Share of all kernel weights that will be zero, with edge blocks counted like full ones of their layer."""
        zero = sum(la.weights * (1 - la.kept / la.blocks) for la in self.pruned.values())
        return zero / max(self.kernel_weights, 1)

    def table(self, *, all: bool = False) -> str:
        """What is pruned, in one line, and a table of the leaves.

        Args:
          all: whether scalars, vectors and leaves that are no arrays are in the table too.
        """
        shown = [layer for layer in self.leaves if all or not layer.is_vector]
        head = ("path", "shape", "read as", "block", "grid", "blocks", "kept", "pruned")
        viewed = any(layer.view or layer.assumed for layer in shown)
        rows = table(head, [_row(layer) for layer in shown], omit=() if viewed else ("read as",))
        kernels = sum(layer.is_kernel for layer in self.leaves)
        removed = f"{self.sparsity:.2%} of {self.kernel_weights:,} kernel weights removed"
        hidden = len(self.leaves) - len(shown)
        note = f" ({hidden} scalars and vectors not shown)" if hidden else ""
        return f"{len(self.pruned)} of {kernels} kernels pruned; {removed}{note}\n\n{rows}" + self._cut_off()

    def _cut_off(self) -> str:
        """The layers of too few blocks for their columns, then for their rows."""
        lines = [
            f"{layer.path} keeps {kept(layer)}: no weight for at least {layer.cut_off[side]:,} of "
            f"{blk.matrix_shape(layer.shape, layer.view)[side]:,} {what}"
            for side, what in ((1, "outputs"), (0, "rows"))
            for layer in self.pruned.values()
            if layer.cut_off[side]
        ]
        more = [f"and {len(lines) - SHOWN} more"] if lines[SHOWN:] else []
        return "".join(f"\n{line}" for line in ["", *lines[:SHOWN], *more]) if lines else ""

    def __str__(self) -> str:
        return self.table() + (OPEN if any(leaf.is_open for leaf in self.leaves) else "")


def _row(layer: LeafPlan) -> tuple[str, ...]:
    if not layer.is_kernel:
        return (layer.path, by(layer.shape), "-", "-", "-", "-", "-", f"no: {layer.skip_reason}")
    fate = f"no: {layer.skip_reason}" if layer.skip_reason else f"{1 - layer.kept / layer.blocks:.1%}"
    read = read_as(layer)
    grid = " × ".join([*map(str, layer.stack), by(layer.grid)])
    return (layer.path, by(layer.shape), read, by(layer.block), grid, f"{layer.blocks:,}", f"{layer.kept:,}", fate)


def read_as(layer: LeafPlan) -> str:
    """The matrices that a kernel is read as, `6 × (8·64)×512`; if sides do not tell, whether they are transposed.

    Args:
      layer: of a kernel; where the reading is an assumption, the text says so.
    """
    read = blk.view_of(layer.shape, layer.view)
    square = len(read.rows) == len(read.cols) == 1 and len(set(read.matrix(layer.shape))) == 1
    transposed = " transposed" if square and not read.in_order else ""
    return read.describe(layer.shape) + transposed + (", assumed" if layer.assumed else "")


def kept(layer: LeafPlan) -> str:
    """How many blocks of each matrix stay, and in what grid, `1 block of 64×2`.

    Args:
      layer: of a kernel.
    """
    return f"{layer.kept_each:,} block{'s' if layer.kept_each > 1 else ''} of {by(layer.grid)}"


def by(sides: Sequence[int]) -> str:
    """Sides as text, `64×96`.

    Args:
      sides: of an array, a block or a grid.
    """
    return "×".join(map(str, sides)) or "scalar"
