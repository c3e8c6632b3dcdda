"""Block-sparse matmul on a GPU: the Pallas kernel and plain JAX against the dense matmul of cuBLAS.

    python -m benchmarks.block_sparse_matmul_gpu

Random positions of blocks, bfloat16. Each contender's result is compared with the dense product in float32 before it is
timed. One program computes several products, each with its own x, and several programs are queued before
waiting for their results, because a small product takes less time than launching a program.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import timing
from benchmarks.random_kernel import random_kernel
from experiments.outputs import progress
from sa_plus_plus.sparse import BlockSparse, block_sparse_matmul

SIDES = flags.DEFINE_list("sides", ["4096"], "Rows and columns of the kernel.")
BATCHES = flags.DEFINE_list("batches", ["256", "2048", "8192"], "Rows of x.")
SPARSITIES = flags.DEFINE_list("sparsities", ["0.8", "0.9", "0.95"], "Shares of the blocks that are zero.")
BLOCKS = flags.DEFINE_list("blocks", ["16", "32", "64", "128"], "Sides of a block.")
IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["pallas", "xla"], "Implementations of block_sparse_matmul.")
CHAIN = flags.DEFINE_integer("chain", 8, "Products in one program.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds of alternating measurement.")
NAME = flags.DEFINE_string("name", "block_sparse_matmul_gpu", "Name of the result file; empty for none.")

QUEUED = 5  # programs


def chained(product: Callable[..., jax.Array], xs: list[jax.Array], w: Any) -> Callable[[], Any]:
    program = jax.jit(lambda xs, w: [product(x, w) for x in xs]).lower(xs, w).compile()

    def call() -> None:
        for _ in range(QUEUED):
            y = program(xs, w)
        jax.block_until_ready(y)

    return call


def cell(side: int, batch: int, block: int, sparsity: float) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0))
    xs = list(jax.random.normal(keys[0], (CHAIN.value, batch, side), jnp.bfloat16))
    w = random_kernel((side, side), block, sparsity, keys[1])
    matrix = jax.jit(BlockSparse.todense)(w)
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(xs[0].astype(jnp.float32) @ matrix.astype(jnp.float32))
    row: dict[str, Any] = {"side": side, "batch": batch, "block": block, "sparsity": sparsity}
    calls = {"dense": chained(jnp.matmul, xs, matrix)}
    for implementation in IMPLEMENTATIONS.value:
        product = jax.jit(
            lambda x, w, implementation=implementation: block_sparse_matmul(x, w, implementation=implementation)
        )
        try:
            got = np.asarray(product(xs[0], w), np.float32)
        except Exception as error:  # a failed compilation, or too little memory: report it and continue
            print(f"{implementation} failed: {row}: {type(error).__name__}: {str(error)[:500]}")
            row |= {f"{implementation}_us": None, f"{implementation}_times_as_fast": None}
            continue
        np.testing.assert_allclose(got, wanted, rtol=1e-2, atol=1e-2 * np.abs(wanted).max(), err_msg=implementation)
        calls[implementation] = chained(product, xs, w)
    seconds = {
        name: s / CHAIN.value / QUEUED for name, s in timing.alternate(calls, ROUNDS.value, at_least=0.05).items()
    }
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
