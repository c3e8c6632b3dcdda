"""What another order of units is worth before pruning by blocks: LeNet on Fashion-MNIST, and MiniLM.

    python -m benchmarks.reordering --data=path/to/fashion_mnist --model=path/to/all-MiniLM-L6-v2
    python -m benchmarks.reordering --speed

Each network is pruned without training: in the order in which it was trained, in one by `sapp.reorder`, for LeNet also
with its pixels looked up in another order, and by single weights. Writes the accuracy on the test images, or the mean
cosine to the embeddings before, and the layers' errors to benchmarks/results/reordering.json, row by row.

`--speed` measures instead what it costs to look pixels up in another order: the milliseconds of LeNet, with random
blocks set to zero, without a lookup, with one in the compiled kernel, and with one by XLA, in turn. Writes
benchmarks/results/reordering_speed.json.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

import sa_plus_plus as sapp
from benchmarks import timing
from benchmarks.page import RESULTS
from experiments.data.from_files import idx_files
from experiments.data.sentences import docstring_sentences
from experiments.models import sentences
from experiments.models.small import LeNet300
from experiments.outputs import report
from experiments.utils import files
from sa_plus_plus.contrib.transformers.text import tokenize

_DATA = flags.DEFINE_string("data", "", "Directory of Fashion-MNIST's four files; empty to leave LeNet out.")
_MODEL = flags.DEFINE_string("model", "", "Directory of the encoder; empty to leave it out.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of LeNet.")
_SPEED = flags.DEFINE_bool("speed", False, "Measure what a lookup costs.")
METHODS = ("magnitude", "wanda", "obs")
EPOCHS, BATCH = 8, 256
Row = dict[str, Any]


def lenet(seed: int, data: Any) -> Iterator[Row]:
    """Train one, prune it in all ways."""
    model = LeNet300()
    x, y = data("train")
    params = jax.jit(model.init)(jax.random.key(seed), x[:1])
    steps = EPOCHS * (len(x) // BATCH)
    tx = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=1e-2)

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(seed)
    rows = np.concatenate([rng.permutation(len(x)) for _ in range(EPOCHS)])
    for i in range(steps):
        batch = rows[i * BATCH : (i + 1) * BATCH]
        params, state = step(params, state, x[batch], y[batch])
    tables = params | {"places": np.arange(x[0].size)}

    def looked_up(p: Any, x: Any) -> Any:
        return model.apply({"params": p["params"]}, x.reshape(len(x), -1)[:, p["places"]])

    calibration, (x_test, y_test) = [x[i : i + 1000] for i in range(0, 3000, 1000)], data("test")

    def quality(fn: Callable[..., Any]) -> Callable[[Any], float]:
        return lambda params: float(np.mean(np.argmax(jax.jit(fn)(params, x_test), 1) == y_test))

    yield {"network": "LeNet", "seed": seed, "order": "dense", "quality": quality(model.apply)(params)}
    for sparsity in (0.8, 0.9):
        for method in METHODS:
            for block, order in ((16, "as trained"), (16, "reordered"), (16, "pixels too"), (1, "as trained")):
                fn, tree = (looked_up, tables) if order == "pixels too" else (model.apply, params)
                options = {"block": block, "where": lambda path: "Dense_2" not in path and path.endswith("kernel")}
                row = pruned(fn, tree, calibration, quality(fn), order, method, sparsity, **options)
                yield {"network": "LeNet", "seed": seed, **row}


def minilm(path: str) -> Iterator[Row]:
    """Prune the published encoder in all ways."""
    encoder = sentences.load(path)
    texts = sorted(set(docstring_sentences()))
    batch = tokenize(encoder.tokenizer, [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:1536]], 32)
    batches = [tuple(batch[k][i : i + 64] for k in ("tokens", "real")) for i in range(0, 1536, 64)]

    def fn(params: Any, tokens: Any, real: Any) -> jax.Array:
        return sentences.embed(encoder.model, params, tokens, real)

    embed = jax.jit(fn)
    before = [embed(encoder.params, *b) for b in batches[8:]]

    def cosine(params: Any) -> float:
        return float(np.mean([jnp.sum(embed(params, *b) * y, 1) for b, y in zip(batches[8:], before, strict=True)]))

    for method in reversed(METHODS):
        for order in ("as trained", "reordered"):
            yield {
                "network": "MiniLM",
                **pruned(fn, encoder.params, batches[:8], cosine, order, method, 0.5, block=16),
            }


def pruned(
    fn: Callable[..., Any],
    params: Any,
    calibration: Any,
    quality: Callable[[Any], float],
    order: str,
    method: str,
    sparsity: float,
    **options: Any,
) -> Row:
    """One way to prune a network, and what is left of its quality."""
    start = time.perf_counter()
    options |= {"sparsity": sparsity, "method": method, "refit": method != "obs", "reorder": order != "as trained"}
    result = sapp.one_shot(fn, params, calibration, **options)
    return {
        **{"block": options["block"], "sparsity": sparsity, "method": method, "order": order},
        "seconds": time.perf_counter() - start,
        "quality": quality(result.params),
        "errors": {layer.plan.path: layer.error for layer in result.layers},
    }


def speed(batch: int, sparsity: float = 0.9, calls: int = 50) -> Row:
    """Microseconds of a call, without a lookup, with one in the compiled kernel, and with one by XLA.

    Args:
      batch: number of images.
      sparsity: of the kernels.
      calls: that are measured together.
    """
    model, rng = LeNet300(), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, 784)), jnp.float32)
    sp = sapp.random(block=16, sparsity=sparsity, phases=sapp.phases.random(1))
    params = sp.finalize(*sp.init(jax.jit(model.init)(jax.random.key(0), x)))
    places = rng.permutation(784)

    def network(x: jax.Array) -> Any:
        return model.apply(params, x)

    plain = sapp.specialize(network, x, mode="always")
    inside = sapp.specialize(lambda x: network(x[:, places]), x, mode="always")
    outside = jax.jit(lambda x: plain.fn(plain.weights, x[:, places]))
    runs: dict[str, Callable[[Any], Any]] = {"without": plain, "in the compiled kernel": inside, "by XLA": outside}

    def repeated(run: Callable[[Any], Any]) -> Callable[[], Any]:
        return lambda: jax.block_until_ready([run(x) for _ in range(calls)])

    seconds = timing.alternate({name: repeated(run) for name, run in runs.items()}, rounds=31)
    found = {name: timing.spread(1e6 * s / calls) for name, s in seconds.items()}
    ratios = {name: timing.spread(s / seconds["without"]) for name, s in seconds.items()}
    return {"batch": batch, "sparsity": sparsity, "microseconds": found, "to_without": ratios}


def main(argv: list[str]) -> None:
    del argv
    if _SPEED.value:
        found = [speed(batch) for batch in (1, 32, 256)]
        for row in found:
            print(json.dumps(row), flush=True)
        print(timing.save("reordering_speed", {"rows": found}))
        return
    rows: list[Row] = []

    def measured() -> Iterator[Row]:
        if _MODEL.value:
            yield from minilm(_MODEL.value)
        if _DATA.value:
            source = idx_files(_DATA.value)

            def data(split: str) -> Any:
                part = getattr(source, split)
                batch = part.gather(np.arange(len(part)))
                return np.asarray(batch["image"], np.float32) / 255, np.asarray(batch["label"])

            for seed in range(_SEEDS.value):
                yield from lenet(seed, data)

    for row in measured():
        print(json.dumps(row), flush=True)
        rows.append(row)
        files.write_json(RESULTS / "reordering.json", {"rows": rows, "versions": report.versions()})


if __name__ == "__main__":
    app.run(main)
