"""Storage of pruned kernels, and computation with them, by their kept blocks only."""

from sa_plus_plus.sparse.array import BlockSparse, Layout
from sa_plus_plus.sparse.comparison import Comparison
from sa_plus_plus.sparse.compiler.planned import Choice
from sa_plus_plus.sparse.files.export import to_bsr, to_onnx
from sa_plus_plus.sparse.files.serialization import Saved, export, load, save, todense
from sa_plus_plus.sparse.network import Network
from sa_plus_plus.sparse.ops import native
from sa_plus_plus.sparse.ops.convolution import block_sparse_conv
from sa_plus_plus.sparse.ops.matmul import block_sparse_matmul
from sa_plus_plus.sparse.specialize import specialize
from sa_plus_plus.sparse.summaries import LeafSummary, Summary, summary

__all__ = [
    "BlockSparse",
    "Choice",
    "Comparison",
    "Layout",
    "LeafSummary",
    "Network",
    "Saved",
    "Summary",
    "block_sparse_conv",
    "block_sparse_matmul",
    "export",
    "load",
    "native",
    "save",
    "specialize",
    "summary",
    "to_bsr",
    "to_onnx",
    "todense",
]
