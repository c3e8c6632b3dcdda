"""Products with a block-sparse kernel on a GPU: the Pallas kernel and plain JAX against the dense product of cuBLAS.

    python -m benchmarks.block_sparse_matmul_gpu

Random positions of blocks, bfloat16. Each contender's result is compared with the dense product in float32 before it is
timed. Calls are timed in chains, as their launch alone takes longer than a small product.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import timing
from experiments.outputs import progress
from sa_plus_plus.sparse import BlockSparse, Layout, block_sparse_matmul

SIDES = flags.DEFINE_list("sides", ["4096", "8192"], "Rows and columns of the kernel.")
BATCHES = flags.DEFINE_list("batches", ["256", "1024", "8192"], "Rows of x.")
SPARSITIES = flags.DEFINE_list("sparsities", ["0.8", "0.9", "0.95"], "Shares of the blocks that are zero.")
BLOCKS = flags.DEFINE_list("blocks", ["32", "64", "128", "8", "16"], "Sides of a block.")
IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["pallas", "xla"], "Of block_sparse_matmul.")
CHAIN = flags.DEFINE_integer("chain", 20, "Calls queued before their results are waited for.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds of alternating measurement.")
NAME = flags.DEFINE_string("name", "block_sparse_matmul_gpu", "Of the file in benchmarks/results; empty for none.")


def random_kernel(side: int, block: int, sparsity: float, key: jax.Array) -> BlockSparse:
    mask = np.random.default_rng(0).random((-(-side // block),) * 2) >= sparsity
    columns, rows = np.nonzero(mask.T)
    starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=len(mask)))])
    layout = Layout((side, side), (block, block), rows, starts)
    blocks = jax.random.normal(key, (layout.nse, block, block), jnp.bfloat16) / side**0.5
    return BlockSparse(blocks * layout.real.astype(blocks.dtype), layout)


def chained(product: Callable[..., jax.Array], *args: Any) -> Callable[[], Any]:
    def call() -> None:
        for _ in range(CHAIN.value):
            y = product(*args)
        y.block_until_ready()

    return call


def cell(side: int, batch: int, block: int, sparsity: float) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0))
    x, w = jax.random.normal(keys[0], (batch, side), jnp.bfloat16), random_kernel(side, block, sparsity, keys[1])
    matrix = jax.jit(BlockSparse.todense)(w)
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(x.astype(jnp.float32) @ matrix.astype(jnp.float32))
    row: dict[str, Any] = {"side": side, "batch": batch, "block": block, "sparsity": sparsity}
    calls = {"dense": chained(jax.jit(jnp.matmul), x, matrix)}
    for implementation in IMPLEMENTATIONS.value:
        product = jax.jit(
            lambda x, w, implementation=implementation: block_sparse_matmul(x, w, implementation=implementation)
        )
        try:
            got = np.asarray(product(x, w), np.float32)
        except Exception as error:  # a compiler that cannot, or memory that is not enough: say so and go on
            print(f"{implementation} failed: {row}: {type(error).__name__}: {str(error)[:500]}")
            row |= {f"{implementation}_us": None, f"{implementation}_times_as_fast": None}
            continue
        np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=1e-2 * np.abs(wanted).max(), err_msg=implementation)
        calls[implementation] = chained(product, x, w)
    seconds = {name: s / CHAIN.value for name, s in timing.alternate(calls, ROUNDS.value, at_least=0.05).items()}
    for name, s in seconds.items():
        row[f"{name}_us"] = round(1e6 * float(np.median(s)), 1)
        if name != "dense":
            row[f"{name}_times_as_fast"] = timing.spread(seconds["dense"] / s)["median"]
    return row


def main(argv: list[str]) -> None:
    del argv
    if jax.default_backend() not in ("gpu", "cuda", "rocm"):
        print("This compares kernels on a GPU, and JAX sees none; on a CPU run benchmarks.block_sparse_matmul.")
        return
    sides, batches, blocks = ([int(n) for n in flag.value] for flag in (SIDES, BATCHES, BLOCKS))
    rows = []
    for side, batch, block, sparsity in itertools.product(sides, batches, blocks, map(float, SPARSITIES.value)):
        rows.append(cell(side, batch, block, sparsity))
        print(rows[-1], flush=True)
    progress.console().print(progress.table("bfloat16, against dense", rows))
    if NAME.value:
        print(timing.save(NAME.value, {"dtype": "bfloat16", "cells": rows}))


if __name__ == "__main__":
    app.run(main)
