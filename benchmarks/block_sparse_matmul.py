"""Block-sparse matmul: this library against dense matmuls and the block-sparse ones of PyTorch and SciPy.

    python -m benchmarks.block_sparse_matmul

Random positions of blocks, float32, all cores. Contenders whose packages are not installed are skipped. Each result is
compared with a double-precision product before anything is timed.
"""

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from benchmarks import timing
from sa_plus_plus.sparse import BlockSparse, block_sparse_matmul
from sa_plus_plus.sparse.ops import native

SHAPES = flags.DEFINE_list("shapes", ["2048x2048", "4096x4096", "4608x512"], "Rows by columns of the kernel.")
BATCHES = flags.DEFINE_list("batches", ["1", "32", "256"], "Rows of x.")
SPARSITIES = flags.DEFINE_list("sparsities", ["0.8", "0.9", "0.95"], "Shares of the blocks that are zero.")
BLOCKS = flags.DEFINE_list("blocks", ["8", "16", "32", "64"], "Sides of a block.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds of alternating measurement.")
SECONDS = flags.DEFINE_float("seconds", 0.02, "Minimum time for which each contender is called in a round.")
NAME = flags.DEFINE_string("name", "block_sparse_matmul", "Name of the result files; empty for none.")

DENSE, OURS = {"jax_dense", "torch_dense"}, ("xla", "native")


def kernel(
    rows: int, cols: int, block: int, sparsity: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with a random share of its blocks zero, and the mask of the others."""
    grid = (-(-rows // block), -(-cols // block))
    mask = rng.random(grid) >= sparsity
    matrix = rng.standard_normal((rows, cols), np.float32)
    return matrix * np.kron(mask, np.ones((block, block), np.float32))[:rows, :cols], mask


def of_jax(x: np.ndarray, matrix: np.ndarray, mask: np.ndarray, block: int) -> dict[str, Callable[[], Any]]:
    w, here, full = BlockSparse.fromdense(matrix, block, mask), jnp.asarray(x), jnp.asarray(matrix)
    dense = jax.jit(jnp.matmul)
    calls: dict[str, Callable[[], Any]] = {"jax_dense": lambda: dense(here, full).block_until_ready()}
    for implementation in OURS:
        if implementation == "xla" or native.unavailable_reason() is None:
            product = jax.jit(
                lambda x, w, implementation=implementation: block_sparse_matmul(x, w, implementation=implementation)
            )
            calls[implementation] = functools.partial(lambda product: product(here, w).block_until_ready(), product)
    return calls


def of_torch(x: np.ndarray, matrix: np.ndarray, mask: np.ndarray, block: int) -> dict[str, Callable[[], Any]]:
    import torch  # noqa: PLC0415

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    here, dense = torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray(matrix.T))
    sparse, linear = dense.to_sparse_bsr((block, block)), torch.nn.functional.linear
    return {"torch_dense": lambda: linear(here, dense), "torch_bsr": lambda: linear(here, sparse)}


def of_scipy(x: np.ndarray, matrix: np.ndarray, mask: np.ndarray, block: int) -> dict[str, Callable[[], Any]]:
    import scipy.sparse  # noqa: PLC0415

    transposed, x = scipy.sparse.bsr_array(matrix.T, blocksize=(block, block)), np.ascontiguousarray(x.T)
    return {"scipy_bsr": lambda: (transposed @ x).T}


def cells_of(
    shape: tuple[int, int], batch: int, block: int, sparsities: list[float], makers: list[Callable]
) -> list[dict[str, Any]]:
    """A cell for each sparsity. All of them take turns with each other, so that they can be compared."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, shape[0]), np.float32)
    calls: dict[tuple[float, str], Callable[[], Any]] = {}
    for sparsity in sparsities:
        matrix, mask = kernel(*shape, block, sparsity, rng)
        wanted = x.astype(np.float64) @ matrix
        for maker in makers:
            for name, call in maker(x, matrix, mask, block).items():
                np.testing.assert_allclose(np.asarray(call()), wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=name)
                if name not in DENSE or sparsity == sparsities[0]:  # dense products do not depend on it
                    calls[sparsity, name] = call
    seconds = timing.alternate(calls, ROUNDS.value, SECONDS.value, warmup=1)
    dense = {name: s for (_, name), s in seconds.items() if name in DENSE}
    return [
        result(shape, batch, block, sparsity, dense | {name: s for (at, name), s in seconds.items() if at == sparsity})
        for sparsity in sparsities
    ]


def result(
    shape: tuple[int, int], batch: int, block: int, sparsity: float, seconds: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The recorded part of a cell's measurement."""
    ours = [name for name in OURS if name in seconds]
    return {
        **{"rows": shape[0], "cols": shape[1], "batch": batch, "sparsity": sparsity, "block": block},
        "milliseconds": {name: round(1e3 * float(np.median(s)), 4) for name, s in seconds.items()},
        "faster_dense": min(DENSE & seconds.keys(), key=lambda name: np.median(seconds[name])),
        "times_as_fast_as": {
            own: {rival: timing.spread(s / seconds[own]) for rival, s in seconds.items() if rival not in OURS}
            for own in ours
        },
    }


def plot(cells: list[dict[str, Any]], path: Any) -> None:
    """Plot speed-up against sparsity: one panel per shape and batch, one line per block size.

    The speed-up is over the faster of the dense products of jax and PyTorch.
    """
    shapes = list(dict.fromkeys((c["rows"], c["cols"]) for c in cells))
    batches = list(dict.fromkeys(c["batch"] for c in cells))
    ours = "native" if "native" in cells[0]["milliseconds"] else "xla"
    figure, axes = plt.subplots(
        len(shapes), len(batches), figsize=(3.4 * len(batches), 2.8 * len(shapes)), squeeze=False, layout="constrained"
    )
    for (row, shape), (column, batch) in itertools.product(enumerate(shapes), enumerate(batches)):
        panel = axes[row, column]
        for block in dict.fromkeys(c["block"] for c in cells):
            line = [c for c in cells if ((c["rows"], c["cols"]), c["batch"], c["block"]) == (shape, batch, block)]
            speed = [c["times_as_fast_as"][ours][c["faster_dense"]]["median"] for c in line]
            panel.plot([c["sparsity"] for c in line], speed, marker="o", label=f"{block} × {block}")
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=f"{shape[0]} × {shape[1]}, batch {batch}", yscale="log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), title="block", loc="outside upper center", ncols=4)
    figure.supxlabel("share of blocks that are zero")
    figure.supylabel(f"times as fast as the faster dense product ({ours})")
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    del argv
    makers = [of_jax]
    for package, maker in (("torch", of_torch), ("scipy", of_scipy)):
        if importlib.util.find_spec(package):
            makers.append(maker)
        else:
            print(f"{package} is not installed and left out")
    if why := native.unavailable_reason():
        print(f"native is left out: {why}")
    shapes = [(int(rows), int(cols)) for rows, cols in (shape.split("x") for shape in SHAPES.value)]
    cells = []
    for shape, batch, block in itertools.product(shapes, map(int, BATCHES.value), map(int, BLOCKS.value)):
        cells += (found := cells_of(shape, batch, block, [float(s) for s in SPARSITIES.value], makers))
        for each in found:
            text = "  ".join(f"{name} {ms}" for name, ms in each["milliseconds"].items())
            print(
                f"{shape[0]}x{shape[1]} batch {batch} block {block} sparsity {each['sparsity']}: ms: {text}", flush=True
            )
    if NAME.value:
        path = timing.save(NAME.value, {"dtype": "float32", "cores": len(os.sched_getaffinity(0)), "cells": cells})
        plot(cells, path.with_suffix(".png"))
        print(path)


if __name__ == "__main__":
    app.run(main)
