"""The list of planned steps: each step of a network, how it will run, and its report."""

from typing import NamedTuple

import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.compiler.conv_geometry import Window
from sa_plus_plus.sparse.compiler.depthwise import DepthwiseKernel
from sa_plus_plus.sparse.compiler.ir import Step


class Choice(NamedTuple):
    """The outcome for one product or convolution with a constant kernel, or for one attention.

    Attributes:
      layer: its description.
      kernel: the kernel's shape; for a product `(contracted, outputs)`. Of attention, which has none: the number of
        heads in the batch, of queries and of keys, and the depth.
      rows: number of rows of its input matrix; 0 if it is not a layer.
      block: the blocks in which it is pruned; None if it is not.
      density: share of those blocks that are not zero; NaN for a kernel that was not examined.
      traced_seconds: time as traced, with its bias, residual and activation, that it adds to a network: many runs are
        one program, so the call of a program is not in it. NaN if it was not measured.
      compiled_seconds: likewise, time in the compiled kernel, or by its blocks in another implementation.
      runs: how the network runs it: `"sparse"`, by its blocks; `"dense"`, in full in the compiled kernel; `"fused"`,
        attention in the compiled kernel; `"traced"`.
      precision: in which it computes.
      error: root mean square error of its result in low precision on the calibration data, including the effect of all
        previous layers, relative to that of the result; NaN without calibration data.
      note: why it runs as traced, if there was no alternative, or in another precision than was requested.
    """

    layer: str
    kernel: tuple[int, ...]
    rows: int
    block: blk.Block | None
    density: float
    traced_seconds: float = float("nan")
    compiled_seconds: float = float("nan")
    runs: str = "traced"
    precision: str = ""
    error: float = float("nan")
    note: str = ""

    @property
    def sparse(self) -> bool:
        """Whether it is multiplied by its blocks."""
        return self.runs == "sparse"


class PackedKernel(NamedTuple):
    """A layer's kernel as the compiled kernel takes it.

    Attributes:
      window: the layer's shapes.
      dtype: in which it takes `x`.
      w: `(k_h, k_w, channels, outputs)` in blocks of float32, bfloat16 or int8.
      scales: `(outputs,)` float32, the factors of an int8 kernel's columns; otherwise None.
    """

    window: Window
    dtype: np.dtype
    w: BlockSparse
    scales: np.ndarray | None


class PlannedStep(NamedTuple):
    """A step of a network and how it will run.

    Attributes:
      step: an operation, a layer or attention.
      kernel: of a layer: for the compiled kernel, or by its blocks in another implementation. None: as traced.
      choices: its report.
    """

    step: Step
    kernel: PackedKernel | DepthwiseKernel | BlockSparse | None = None
    choices: tuple[Choice, ...] = ()

    @property
    def x_type(self) -> np.dtype | None:
        """The type in which a layer in the compiled kernel takes its input; None for any other step."""
        return self.kernel.dtype if isinstance(self.kernel, PackedKernel | DepthwiseKernel) else None
