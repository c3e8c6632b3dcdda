"""Cost of a network with many layers before its first step: planning, initialising and tracing.

    python -m benchmarks.many_layers [--layers=1000]

Each layer has a kernel, a bias and the scale of a normalisation; half of the layers are convolutions. For
comparison, JAX traces the bare optax step.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import sa_plus_plus as sapp
from benchmarks import timing
from experiments.outputs import progress

LAYERS = flags.DEFINE_integer("layers", 1000, "Layers.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds, of which the median is reported.")


def network(layers: int) -> dict[str, Any]:
    """Parameters of this many layers."""
    shapes = [(64, 64), (3, 3, 16, 64)]
    return {
        f"layer{i}": {"kernel": jnp.ones(shapes[i % 2]), "bias": jnp.zeros(64), "norm": {"scale": jnp.ones(64)}}
        for i in range(layers)
    }


def main(argv: list[str]) -> None:
    del argv
    params = network(LAYERS.value)
    sp = sapp.sequential_attention(block=4, sparsity=0.9, phases=sapp.phases.sequential_attention(1000))
    tx = optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale(-0.1))

    def loss(params: Any) -> jax.Array:
        return sum((jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(params)), jnp.zeros(()))

    def bare(params: Any, state: Any) -> Any:
        updates, state = optax.trace(0.9).update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    def pruned(trainable: Any, prune: Any, state: Any) -> Any:
        grads = jax.grad(lambda t: loss(sp.apply(t, prune)))(trainable)
        updates, state = tx.update(grads, state, trainable, phase=prune.phase)
        return *sp.update(trainable, prune, updates), state

    trainable, prune = sp.init(params)
    calls: dict[str, Callable[[], Any]] = {
        "plan": lambda: sp.plan(params),
        "init": lambda: jax.block_until_ready(sp.init(params)),
        "trace of the bare step": lambda: jax.jit(bare).trace(params, optax.trace(0.9).init(params)),
        "trace of the pruned step": lambda: jax.jit(pruned).trace(trainable, prune, tx.init(trainable)),
    }
    rows = []
    for name, call in calls.items():
        seconds = []
        for _ in range(ROUNDS.value):
            jax.clear_caches()
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        rows.append({"what": name, "seconds": round(sorted(seconds)[len(seconds) // 2], 3)})
    console = progress.console()
    console.print(progress.table(f"{LAYERS.value} layers", [{k: str(v) for k, v in row.items()} for row in rows]))
    console.print(str(timing.save("many_layers", {"layers": LAYERS.value, "rows": rows})))


if __name__ == "__main__":
    app.run(main)
