"""Time and memory of a training step under each algorithm, against the bare optax step without this library.

    python -m benchmarks.train_step [--rounds=15] [--workloads=mlp_256,mlp_8192,cnn_32]
    python -m benchmarks.train_step --workloads=gpt,gpt_scanned --algorithms=sequential_attention --name=train_step_gpt

Each algorithm runs in a dense phase, where the whole network is trained, and, if it has one, in a sparsification phase
with a new selection at every step (its most expensive case). SequentialAttention++ also runs as one line, `sparsify`,
in the bare loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import sa_plus_plus as sapp
from benchmarks import timing
from experiments.outputs import progress
from sa_plus_plus.contrib.transformers.transformer import Decoder

_ROUNDS = flags.DEFINE_integer("rounds", 15, "Rounds of alternating measurements.")
_WORKLOADS = flags.DEFINE_list("workloads", ["mlp_256", "mlp_8192", "cnn_32"], "Which networks.")
_ALGORITHMS = flags.DEFINE_list("algorithms", [], "Which of them, besides dense; all by default.")
_NAME = flags.DEFINE_string("name", "train_step", "Name of the result file; empty for none.")

BLOCK, SPARSITY, LONG = (8, 8), 0.9, 10**6
RISING = ("sequential_attention", "gradual_magnitude", "movement")
NEVER_DENSE = ("random", "rigl", "sparse_evolutionary")


class MLP(nn.Module):
    """784-1024-1024-10."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (1024, 1024):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class ResNetLike(nn.Module):
    """A stem and six residual pairs of 3 x 3 convolutions, 64 and 128 channels, on 32 x 32 images."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(64, (3, 3))(x)
        for width, strides in ((64, 1), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1)):
            y = nn.Conv(width, (3, 3), strides, use_bias=False)(nn.relu(nn.GroupNorm(8)(x)))
            y = nn.Conv(width, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(8)(y)))
            x = y + (x if x.shape == y.shape else nn.Conv(width, (1, 1), strides, use_bias=False)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class ByteGPT(Decoder):
    """The network of configs/bytes_gpt.py."""

    vocabulary: int = 256
    context: int = 256
    layers: int = 4
    width: int = 256
    hidden: int = 1024
    heads: int = 4


WORKLOADS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {  # and the shape of a batch
    "mlp_256": (MLP(), (256, 784)),
    "mlp_8192": (MLP(), (8192, 784)),
    "cnn_32": (ResNetLike(), (32, 32, 32, 3)),
    "gpt": (ByteGPT(), (32, 256)),
    "gpt_scanned": (ByteGPT(scan=True), (32, 256)),
}


def drawn(model: nn.Module, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """A batch: inputs and a class per example, or bytes and the next byte of each."""
    keys = jax.random.split(jax.random.key(0))
    if isinstance(model, Decoder):
        return jax.random.randint(keys[0], shape, 0, 256), jax.random.randint(keys[1], shape, 0, 256)
    return jax.random.normal(keys[0], shape), jax.random.randint(keys[1], shape[:1], 0, 10)


def optimizer() -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.add_decayed_weights(1e-4), sapp.reset_on(optax.trace(0.9)), optax.scale(-1e-3))


def bare_step(loss: Callable, params: Any) -> tuple[Callable, Any]:
    """The step of a loop without pruning."""
    return plain_step(loss, params, optax.chain(optax.add_decayed_weights(1e-4), optax.trace(0.9), optax.scale(-1e-3)))


def one_line_step(loss: Callable, params: Any, sp: sapp.Sparsifier) -> tuple[Callable, Any]:
    """The bare step with `sparsify` around its optimizer: it holds the effective weights beside the trained ones."""
    return plain_step(loss, params, sapp.sparsify(optimizer(), sp))


def plain_step(loss: Callable, params: Any, tx: optax.GradientTransformation) -> tuple[Callable, Any]:
    """The step of an optax loop."""

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return step, (params, tx.init(params))


def pruned_step(loss: Callable, params: Any, sp: sapp.Sparsifier) -> tuple[Callable, Any]:
    """The explicit step of this library."""
    tx = optimizer()

    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        trainable, prune, opt_state = state
        value, grads = jax.value_and_grad(lambda t: loss(sp.apply(t, prune), batch))(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable, phase=prune.phase)
        return (*sp.update(trainable, prune, updates, grads), opt_state), value

    trainable, prune = sp.init(params)
    return step, (trainable, prune, tx.init(trainable))


def contenders(loss: Callable, params: Any) -> dict[str, tuple[Callable, Any]]:
    """By name: step and first state."""
    result = {"bare optax": bare_step(loss, params)}
    result["dense"] = pruned_step(loss, params, sapp.dense(phases=sapp.phases.dense(LONG)))
    for name in _ALGORITHMS.value or [name for name in sapp.ALGORITHMS if name != "dense"]:
        kinds = ["dense"] if name not in RISING else ["dense", "sparsification"]
        for kind in ["sparse"] if name in NEVER_DENSE else kinds:
            phases = sapp.phases.custom(2 * LONG, [(kind, LONG), ("sparse", LONG)])
            sp = getattr(sapp, name)(block=BLOCK, sparsity=SPARSITY, phases=phases)
            result[f"{name}, {kind}"] = pruned_step(loss, params, sp)
            if name == "sequential_attention":
                result[f"{name}, {kind}, one line"] = one_line_step(loss, params, sp)
    return result


def measure(workload: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table for one workload."""
    model, shape = WORKLOADS[workload]
    batch = drawn(model, shape)
    params = model.init(jax.random.key(2), batch[0][:1])["params"]
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch[0])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    states, calls, memory = {}, {}, {}
    for name, (step, state) in contenders(loss, params).items():
        states[name] = jax.tree.map(jnp.copy, state)  # each its own, to donate
        program = jax.jit(step, donate_argnums=0).lower(states[name], batch).compile()
        sizes: Any = program.memory_analysis()
        memory[name] = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes

        def call(name: str, program: Any) -> None:
            states[name], value = program(states[name], batch)
            jax.block_until_ready((states[name], value))

        calls[name] = functools.partial(call, name, program)
    seconds = timing.alternate(calls, rounds)
    bare = seconds["bare optax"]
    return [
        {
            "workload": workload,
            "contender": name,
            "milliseconds": round(1e3 * float(np.median(s)), 3),
            "time_ratio": timing.spread(s / bare),
            "memory_mib": round(memory[name] / 2**20, 2),
            "memory_ratio": round(memory[name] / memory["bare optax"], 4),
            "extra_in_largest_kernels": round((memory[name] - memory["bare optax"]) / largest, 3),
        }
        for name, s in seconds.items()
    ]


def main(argv: list[str]) -> None:
    del argv
    rows = [row for workload in _WORKLOADS.value for row in measure(workload, _ROUNDS.value)]
    cells = [row | {"time_ratio": "{median:.3f} [{q25:.3f}, {q75:.3f}]".format(**row["time_ratio"])} for row in rows]
    progress.console().print(progress.table(f"Training step, blocks {BLOCK}, {SPARSITY:.0%} sparsity", cells))
    if _NAME.value:
        print(timing.save(_NAME.value, {"block": BLOCK, "sparsity": SPARSITY, "rounds": _ROUNDS.value, "rows": rows}))


if __name__ == "__main__":
    app.run(main)
