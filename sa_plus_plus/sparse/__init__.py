"""Pruned kernels stored and computed with by their kept blocks alone."""

from sa_plus_plus.sparse.convolution import block_sparse_conv
from sa_plus_plus.sparse.formats import to_bsr, to_onnx
from sa_plus_plus.sparse.kernel import BlockSparse, Layout, densify, to_block_sparse
from sa_plus_plus.sparse.matmul import block_sparse_matmul
from sa_plus_plus.sparse.network import Choice, Network, specialize
from sa_plus_plus.sparse.storage import Saved, densify_tree, export, load, save

__all__ = [
    "BlockSparse",
    "Choice",
    "Layout",
    "Network",
    "Saved",
    "block_sparse_conv",
    "block_sparse_matmul",
    "densify",
    "densify_tree",
    "export",
    "load",
    "save",
    "specialize",
    "to_block_sparse",
    "to_bsr",
    "to_onnx",
]
