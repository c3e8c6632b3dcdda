"""Kernels with random weights at random positions, for benchmarks on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse import BlockSparse, Layout


def random_kernel(shape: tuple[int, int], block: int, sparsity: float, key: jax.Array, seed: int = 0) -> BlockSparse:
    mask = np.random.default_rng(seed).random([-(-n // block) for n in shape]) >= sparsity
    columns, rows = np.nonzero(mask.T)
    starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=mask.shape[1]))])
    layout = Layout(shape, (block, block), rows, starts)
    blocks = jax.random.normal(key, (layout.nse, block, block), jnp.bfloat16) / shape[0] ** 0.5
    return BlockSparse(blocks * layout.real.astype(blocks.dtype), layout)
