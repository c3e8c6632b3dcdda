"""Pruned kernels stored and computed with by their kept blocks alone."""

from sa_plus_plus.sparse.kernel import BlockSparse, Layout, densify, to_block_sparse
from sa_plus_plus.sparse.matmul import block_sparse_matmul

__all__ = ["BlockSparse", "Layout", "block_sparse_matmul", "densify", "to_block_sparse"]
