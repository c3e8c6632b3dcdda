"""Pruning a trained network in a tenth of its steps, against pruning during training: LeNet-300-100, Fashion-MNIST.

    python -m benchmarks.finetune --local=path/to/its/four/files

For each seed a dense network is trained. Then every algorithm prunes it by the recipe `finetune`, with and without the
dense network as teacher, and by the recipe `imagenet`; and it prunes from scratch, in the same number of steps and in
the dense network's number of steps. Results are written after each cell; the same command resumes from there. From
trained weights, ACDC uses `form="masking"`, since `pruning` would discard them.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app, flags
from matplotlib import pyplot as plt

from benchmarks import timing
from configs import fashion_mnist
from experiments import cli, data, tasks
from experiments.outputs import progress, report
from experiments.training import factories, loop, program
from experiments.training.setup import prepare

_LOCAL = flags.DEFINE_string("local", "", "Directory with Fashion-MNIST's four files; empty for TensorFlow Datasets.")
_CELLS = flags.DEFINE_list("cells", ["8:0.97", "16:0.95"], "Block sizes and sparsities.")
_ALGORITHMS = flags.DEFINE_list("algorithms", [n for n in factories.NAMES if n != "dense"], "Algorithms to compare.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds, of networks and of the order of the data.")
_STEPS = flags.DEFINE_integer("steps", 4000, "Steps of the dense network; pruning takes a tenth.")
_DIRECTORY = flags.DEFINE_string("directory", "runs/finetune", "Where the dense networks go.")
_NAME = flags.DEFINE_string("name", "finetune", "Write benchmarks/results/<name>.json and .png.")


class Variant(NamedTuple):
    """A way to a pruned network: its start, its share of the dense network's steps, its recipe, and the weight of the
    teacher in the loss."""

    trained: bool
    length: float
    recipe: str
    teacher: float = 0.0


VARIANTS = {
    "from scratch": Variant(False, 1, "imagenet"),
    "from scratch, a tenth": Variant(False, 0.1, "imagenet"),
    "trained, imagenet": Variant(True, 0.1, "imagenet"),
    "trained, finetune": Variant(True, 0.1, "finetune"),
    "trained, finetune, teacher": Variant(True, 0.1, "finetune", 0.5),
}


def config_of(name: str, variant: Variant, block: int = 8, sparsity: float = 0.9) -> ml_collections.ConfigDict:
    """A run's config, except for its initial weights."""
    config = fashion_mnist.get_config()
    config.data.local = _LOCAL.value
    config.steps = config.eval_every = config.log_every = round(_STEPS.value * variant.length)
    config.sparsifier.update({"name": name, "block": (block, block), "sparsity": sparsity, "recipe": variant.recipe})
    config.sparsifier.acdc.form = "masking" if variant.trained else "pruning"
    config.distil.weight = variant.teacher
    return config


def dense_network(seed: int) -> pathlib.Path:
    return pathlib.Path(_DIRECTORY.value) / f"dense-{_STEPS.value}-{seed}.safetensors"


def train_dense(dataset: data.Dataset, seeds: Sequence[int]) -> dict[str, Any]:
    """Train and save the dense networks."""
    dense_network(0).parent.mkdir(parents=True, exist_ok=True)
    setup = prepare(config_of("dense", VARIANTS["from scratch"]), dataset=dataset)
    outcomes = loop.train(program.compiled(setup, len(seeds)), seeds)
    for outcome in outcomes:
        report.save_weights(dense_network(outcome.seed), outcome)
    return _row(outcomes, variant="dense", algorithm="dense", block=0, sparsity=0.0)


def measure(
    variant: str, name: str, block: int, sparsity: float, dataset: data.Dataset, seeds: Sequence[int]
) -> dict[str, Any]:
    """Measure one cell, with seeds side by side, or in turn if each starts from its own network."""
    outcomes: list[loop.Outcome] = []
    for group in [[seed] for seed in seeds] if VARIANTS[variant].trained else [seeds]:
        config = config_of(name, VARIANTS[variant], block, sparsity)
        if VARIANTS[variant].trained:
            config.init_from = str(dense_network(group[0]))
        outcomes += loop.train(program.compiled(prepare(config, dataset=dataset), len(group)), group)
    return _row(outcomes, variant=variant, algorithm=name, block=block, sparsity=sparsity)


def _row(outcomes: list[loop.Outcome], **cell: Any) -> dict[str, Any]:
    return {
        **cell,
        "steps": outcomes[0].steps,
        "accuracy": [round(o.test["test_accuracy"], 4) for o in outcomes],
        "real_sparsity": round(float(np.mean([report.real_sparsity(report.layer_rows(o)) for o in outcomes])), 4),
        "seconds": round(float(np.mean([o.seconds for o in outcomes])), 2),
    }


def measured() -> list[dict[str, Any]]:
    """The rows of an earlier call of the same length and seeds."""
    path = timing.RESULTS / f"{_NAME.value}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    same = (found.get("steps"), found.get("seeds")) == (_STEPS.value, _SEEDS.value)
    return found["rows"] if same else []


def summary(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Mean and standard deviation over seeds in percent: one line per cell and algorithm, one column per variant."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cell = f"{row['block']} × {row['block']}, {row['sparsity']:.0%}" if row["block"] else "-"
        line = lines.setdefault((cell, row["algorithm"]), {"blocks": cell, "algorithm": row["algorithm"]})
        line["from scratch" if row["variant"] == "dense" else row["variant"]] = _mean_std(row["accuracy"])
    return [
        {key: line.get(key, "-") for key in ("blocks", "algorithm", *VARIANTS)} for _, line in sorted(lines.items())
    ]


def _mean_std(values: list[float]) -> str:
    return f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=min(1, len(values) - 1)):.2f}"


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plot accuracy of each algorithm and variant, mean and standard deviation, with dense accuracy as a line."""
    cells = sorted({(row["block"], row["sparsity"]) for row in rows if row["block"]})
    fig, axes = plt.subplots(len(cells), 1, figsize=(9, 3.2 * len(cells)), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row["algorithm"] for row in rows if row["block"]))
    for (block, sparsity), axis in zip(cells, axes[:, 0], strict=True):
        for i, variant in enumerate(VARIANTS):
            mine = [r for r in rows if (r["variant"], r["block"], r["sparsity"]) == (variant, block, sparsity)]
            x = [names.index(row["algorithm"]) + 0.13 * (i - (len(VARIANTS) - 1) / 2) for row in mine]
            means = [100 * np.mean(row["accuracy"]) for row in mine]
            stds = [100 * np.std(row["accuracy"], ddof=min(1, len(row["accuracy"]) - 1)) for row in mine]
            axis.errorbar(x, means, stds, fmt="o", ms=4, lw=1, capsize=2, color=f"C{i}", label=variant)
        for row in (r for r in rows if r["variant"] == "dense"):
            axis.axhline(100 * np.mean(row["accuracy"]), color="black", ls=":", lw=0.8, label="dense")
        axis.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize="small")
        axis.set(ylabel="test accuracy, %", title=f"blocks {block} × {block}, {sparsity:.0%} of them removed")
    axes[0, 0].legend(fontsize="x-small", ncols=2)
    return fig


def main(argv: list[str]) -> None:
    del argv
    console, seeds = progress.console(), range(_SEEDS.value)
    cells = [(int(block), float(sparsity)) for block, _, sparsity in (cell.partition(":") for cell in _CELLS.value)]
    with cli.input_errors():
        dataset = tasks.dataset_of(config_of("dense", VARIANTS["from scratch"]).data)
    cli.cache_compilations(pathlib.Path(_DIRECTORY.value))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # seeds that start from networks of their own
    rows = measured()

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        timing.save(_NAME.value, {"steps": _STEPS.value, "seeds": _SEEDS.value, "rows": rows})
        shown = "  ".join(f"{k} {_mean_std(v) if k == 'accuracy' else v}" for k, v in row.items())
        console.print(shown, highlight=False, soft_wrap=True)

    if not all(dense_network(seed).exists() for seed in seeds):
        rows = []  # they started from others
        add(train_dense(dataset, seeds))
    for block, sparsity in cells:
        for name in _ALGORITHMS.value:
            for variant in VARIANTS:
                wanted = {"variant": variant, "algorithm": name, "block": block, "sparsity": sparsity}
                if not any(wanted.items() <= {k: row[k] for k in wanted}.items() for row in rows):
                    add(measure(variant, name, block, sparsity, dataset, seeds))
    console.print(progress.table("Test accuracy, %", summary(rows)))
    report.save_figure(timing.RESULTS / f"{_NAME.value}.png", plot(rows))


if __name__ == "__main__":
    app.run(main)
