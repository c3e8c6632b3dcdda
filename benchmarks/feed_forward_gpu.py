"""The feed-forward blocks of a Llama-3.1-8B on a GPU: pruned by blocks against dense.

    python -m benchmarks.feed_forward_gpu

`x + W_down (silu(W_gate n) * (W_up n))` with `n = x / rms(x)`, 4096 features and 14336 hidden ones, bfloat16, random
weights and random positions of blocks. One program runs several layers in sequence, so that their weights come from
memory, as in a network, and not from the cache. The result is compared with the dense one before it is timed.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import timing
from benchmarks.random_kernel import random_kernel
from experiments.outputs import progress
from sa_plus_plus.sparse import BlockSparse, block_sparse_matmul
from sa_plus_plus.sparse.ops.matmul import Implementation

TOKENS = flags.DEFINE_list("tokens", ["1", "16", "128", "2048", "8192"], "Rows of x.")
BLOCK = flags.DEFINE_integer("block", 64, "Side of a block.")
SPARSITY = flags.DEFINE_float("sparsity", 0.9, "Share of the blocks that are zero.")
FEATURES = flags.DEFINE_integer("features", 4096, "Width of the residual stream.")
HIDDEN = flags.DEFINE_integer("hidden", 14336, "Width of the hidden layer.")
LAYERS = flags.DEFINE_integer("layers", 4, "Feed-forward blocks in one program.")
IMPLEMENTATION = flags.DEFINE_enum("implementation", "pallas", ["pallas", "xla"], "Of the block-sparse matmul.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds of alternating measurement.")
NAME = flags.DEFINE_string("name", "feed_forward_gpu", "Name of the result file; empty for none.")

QUEUED = 10  # programs


def layer(key: jax.Array, seed: int) -> dict[str, BlockSparse]:
    shapes = {"gate": (FEATURES.value, HIDDEN.value), "up": (FEATURES.value, HIDDEN.value)}
    shapes |= {"down": (HIDDEN.value, FEATURES.value)}
    keys = jax.random.split(key, 3)
    return {
        name: random_kernel(shape, BLOCK.value, SPARSITY.value, keys[i], seed=3 * seed + i)
        for i, (name, shape) in enumerate(shapes.items())
    }


def product(x: jax.Array, w: Any) -> jax.Array:
    if isinstance(w, BlockSparse):
        return block_sparse_matmul(x, w, implementation=cast(Implementation, IMPLEMENTATION.value))
    return x @ w


@jax.jit
def network(x: jax.Array, layers: list[dict[str, Any]]) -> jax.Array:
    for weights in layers:
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + 1e-5)
        normed = (x * scale).astype(x.dtype)
        hidden = jax.nn.silu(product(normed, weights["gate"])) * product(normed, weights["up"])
        x = x + product(hidden, weights["down"])
    return x


def queued(run: Any, x: jax.Array, layers: Any) -> jax.Array:
    """Queue several calls before waiting for results, since a launch takes longer than the work of a few tokens."""
    for _ in range(QUEUED):
        y = run(x, layers)
    return jax.block_until_ready(y)


def main(argv: list[str]) -> None:
    del argv
    if jax.default_backend() not in ("gpu", "cuda", "rocm"):
        print("This compares kernels on a GPU, and JAX sees none; on a CPU run benchmarks.block_sparse_matmul.")
        return
    keys = jax.random.split(jax.random.key(0), LAYERS.value + 1)
    sparse = [layer(key, seed) for seed, key in enumerate(keys[1:])]
    dense = [{name: jax.jit(BlockSparse.todense)(w) for name, w in weights.items()} for weights in sparse]
    contenders: dict[str, Any] = {"dense": dense, "pruned": sparse}
    rows = []
    for tokens in map(int, TOKENS.value):
        x = jax.random.normal(keys[0], (tokens, FEATURES.value), jnp.bfloat16)
        programs = {name: network.lower(x, layers).compile() for name, layers in contenders.items()}
        calls = {name: functools.partial(queued, run, x, contenders[name]) for name, run in programs.items()}
        got, wanted = (np.asarray(calls[name](), np.float32) for name in ("pruned", "dense"))
        error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        if not error < 1e-2:
            raise AssertionError(f"{tokens} tokens: the pruned network's result is {error:.1e} off")
        seconds = timing.alternate(calls, ROUNDS.value, at_least=0.05)
        row: dict[str, Any] = {"tokens": tokens, "error": error}
        row |= {
            f"{name}_us": round(1e6 * float(np.median(s)) / LAYERS.value / QUEUED, 1) for name, s in seconds.items()
        }
        row["times_as_fast"] = timing.spread(seconds["dense"] / seconds["pruned"])
        rows.append(row)
        print(row, flush=True)
    shape: dict[str, Any] = {
        "features": FEATURES.value,
        "hidden": HIDDEN.value,
        "layers": LAYERS.value,
        "block": BLOCK.value,
    }
    shape |= {"sparsity": SPARSITY.value, "implementation": IMPLEMENTATION.value, "dtype": "bfloat16"}
    progress.console().print(progress.table("Feed-forward block, microseconds", rows))
    if NAME.value:
        print(timing.save(NAME.value, {**shape, "rows": rows}))


if __name__ == "__main__":
    app.run(main)
