"""Storage of pruned kernels, and computation with them, by their kept blocks only."""

from sa_plus_plus.sparse.array import BlockSparse, Layout
from sa_plus_plus.sparse.convolution import block_sparse_conv
from sa_plus_plus.sparse.interop import to_bsr, to_onnx
from sa_plus_plus.sparse.matmul import block_sparse_matmul
from sa_plus_plus.sparse.network import Choice, Network, specialize
from sa_plus_plus.sparse.serialization import Saved, export, load, save, todense

__all__ = [
    "BlockSparse",
    "Choice",
    "Layout",
    "Network",
    "Saved",
    "block_sparse_conv",
    "block_sparse_matmul",
    "export",
    "load",
    "save",
    "specialize",
    "to_bsr",
    "to_onnx",
    "todense",
]
