"""Pruned kernels stored and computed with by their kept blocks alone."""

from sa_plus_plus.sparse.kernel import BlockSparse, Layout, densify, to_block_sparse

__all__ = ["BlockSparse", "Layout", "densify", "to_block_sparse"]
