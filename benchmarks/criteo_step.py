"""Rows per second of the click network's training step: pruned against dense, and a breakdown of the time.

    python -m benchmarks.criteo_step
    python -m benchmarks.criteo_step --table=10000000 --blocks=10 --name=criteo_step_large_table
    python -m benchmarks.criteo_step --batch=4096 --table=200000 --rounds=5 --name=

The steps are those of the training loop, for configs/criteo_block*.py, on one batch of Zipf-distributed ids that is
already on the device. `dense, rows of the batch` is the step whose optimizer touches only those rows of the table. The
parts are timed separately: lookup and accumulation of the table's rows, the forward and backward pass of the layers,
and Adam on all parameters. Their sum is not the step's time, since the step is compiled as one program.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import timing
from experiments import data
from experiments.outputs import progress
from experiments.training import program, sharding
from experiments.training.setup import prepare

_BATCH = flags.DEFINE_integer("batch", 32768, "Rows a step.")
_TABLE = flags.DEFINE_integer("table", 1_000_000, "Rows of the embedding table, of all features together.")
_BLOCKS = flags.DEFINE_list("blocks", ["5", "10", "20"], "Block sizes.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "What activations are computed in.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds of alternating measurement.")
_NAME = flags.DEFINE_string("name", "criteo_step", "Write benchmarks/results/<name>.json; empty for not.")
FEATURES = 39


def dataset() -> data.Dataset:
    """Just enough rows for a batch; sizes of the features' vocabularies fall geometrically, as Criteo's do."""
    sizes = np.geomspace(1, 1e-5, FEATURES)
    vocabulary = np.maximum(4, sizes / sizes.sum() * _TABLE.value).astype(int)
    rng = np.random.default_rng(0)
    ids = np.stack([np.minimum(rng.zipf(1.2, _BATCH.value) - 1, n - 1) for n in vocabulary], 1).astype(np.int32)
    label = (rng.random(_BATCH.value) < 0.25).astype(np.uint8)
    rows = data.Arrays({"ids": ids, "label": label})
    return data.Dataset(rows, rows, 2, tuple(vocabulary.tolist()))


def compiled(rows: data.Dataset, block: int, algorithm: str, touched: str = "all") -> program.Program:
    config = importlib.import_module(f"configs.criteo_block{block}").get_config()
    config.batch_size = config.eval_batch_size = _BATCH.value
    config.epochs, config.steps = 0.0, 10_000
    config.model_options.dtype = _DTYPE.value
    config.sparsifier.name, config.optimizer.rows = algorithm, touched
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return program.compiled(prepare(config, mesh, rows))


def step_of(run: program.Program, batch: Any) -> Callable[[], None]:
    held = [run.functions.init(program.seed_argument([0]))]

    def step() -> None:
        held[0], means = run.functions.step(held[0], batch)
        jax.block_until_ready((held[0], means))

    return step


def parts(run: program.Program, batch: Any) -> dict[str, Callable[[], None]]:
    """The pieces of the dense step, each compiled by itself."""
    model, params = run.setup.task.model, run.functions.init(program.seed_argument([0])).trainable.params
    start = jnp.asarray(np.concatenate([[0], np.cumsum(model.vocabulary)[:-1]]), jnp.int32)
    x = jnp.ones((_BATCH.value, FEATURES * model.size))
    layers = {name: layer for name, layer in params.items() if name != "table"}
    tx = optax.adam(1e-3)

    def table(embedding: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.grad(lambda e: jnp.sum(e[ids + start] ** 2))(embedding)

    def dense(layers: Any, x: jax.Array) -> Any:
        def loss(layers: Any, x: jax.Array) -> jax.Array:
            for name in sorted(name for name in layers if name != "logit"):
                x = jax.nn.relu(x @ layers[name]["kernel"] + layers[name]["bias"])
            return jnp.sum((x @ layers["logit"]["kernel"]) ** 2)

        return jax.grad(loss, argnums=(0, 1))(layers, x)

    def adam(state: Any, params: Any) -> Any:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    calls = {
        "part: table, forwards and backwards": (jax.jit(table), params["table"]["embedding"], batch["ids"]),
        "part: layers, forwards and backwards": (jax.jit(dense), layers, x),
        "part: Adam": (jax.jit(adam), tx.init(params), params),
    }
    return {name: functools.partial(_wait, *call) for name, call in calls.items()}


def _wait(function: Callable[..., Any], *arguments: Any) -> None:
    jax.block_until_ready(function(*arguments))


def main(argv: list[str]) -> None:
    del argv
    rows = dataset()
    dense = compiled(rows, 10, "dense")
    batch = jax.device_put(rows.train.gather(np.arange(_BATCH.value)), next(iter(dense.batch.values())).sharding)
    by_rows = compiled(rows, 10, "dense", "batch")
    contenders = {"dense": step_of(dense, batch), "dense, rows of the batch": step_of(by_rows, batch)}
    for block in _BLOCKS.value:
        for name in ("acdc", "sequential_attention"):
            contenders[f"{name}, {block}"] = step_of(compiled(rows, int(block), name), batch)
    contenders |= parts(dense, batch)
    seconds = timing.alternate(contenders, _ROUNDS.value)
    results: list[dict[str, Any]] = [
        {
            "step": name,
            "milliseconds": round(1e3 * float(np.median(taken)), 2),
            "rows_per_second": round(_BATCH.value / float(np.median(taken))),
            "time_to_dense": timing.spread(taken / seconds["dense"]),
        }
        for name, taken in seconds.items()
    ]
    cells = [r | {"time_to_dense": "{median:.3f} [{q25:.3f}, {q75:.3f}]".format(**r["time_to_dense"])} for r in results]
    title = f"Click network, {_BATCH.value} rows, table of {sum(rows.vocabulary):,}, {_DTYPE.value}"
    progress.console().print(progress.table(title, cells))
    if _NAME.value:
        content = {"rows": results, "batch": _BATCH.value, "table": sum(rows.vocabulary), "dtype": _DTYPE.value}
        print(timing.save(_NAME.value, content))


if __name__ == "__main__":
    app.run(main)
