"""Recovery of planted features: every algorithm on click data in which the features that matter are known.

    python -m benchmarks.planted
    python -m benchmarks.planted --algorithms=acdc,sequential_attention --set=sparsifier.recipe=imagenet --name=

For each block size and sparsity, means over seeds of: the share of kept blocks that lie on rows of the features that
matter (`found`; `chance` for random blocks), the share of those features that keep any block (`covered`), loss and AUC
on held-out rows. The teacher's own results are printed beside them as the upper bound.
"""

import ast
import itertools
from typing import Any

import ml_collections
import numpy as np
from absl import app, flags
from matplotlib import pyplot as plt

from benchmarks import timing
from configs import planted as planted_config
from experiments import data, tasks
from experiments.data.planted import Teacher, found_and_covered, teacher, true_logits
from experiments.data.sources import in_memory
from experiments.outputs import progress, report
from experiments.training import evaluation, factories, loop, program
from experiments.training.setup import prepare

_ALGORITHMS = flags.DEFINE_list("algorithms", list(factories.NAMES), "Algorithms to compare.")
_BLOCKS = flags.DEFINE_list("blocks", ["5", "10", "20"], "Block sizes.")
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.9", "0.95", "0.97", "0.98", "0.99"], "Target sparsities.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of the student; the data stay the same.")
_STEPS = flags.DEFINE_integer("steps", 800, "Steps of each run.")
_SET = flags.DEFINE_multi_string("set", [], "Override in configs/planted.py, sparsifier.exponent=2.0; repeatable.")
_NAME = flags.DEFINE_string("name", "planted", "Write benchmarks/results/<name>.json and .png; empty for neither.")


def measure(name: str, block: int, sparsity: float, dataset: data.Dataset) -> dict[str, Any]:
    """One row of the table."""
    config = planted_config.get_config()
    config.steps = config.eval_every = _STEPS.value
    config.sparsifier.update({"name": name, "block": (block, block), "sparsity": sparsity})
    config.update_from_flattened_dict(changes())
    run = program.compiled(prepare(config, dataset=dataset), _SEEDS.value)
    outcomes = loop.train(run, range(_SEEDS.value))
    network = teacher_of(config)
    shares = [found_and_covered(np.asarray(o.params["hidden1"]["kernel"]), block, network.features) for o in outcomes]
    found, covered, chance = np.array(shares).T
    loss, auc = (np.array([o.test[f"test_{key}"] for o in outcomes]) for key in ("loss", "auc"))
    row: dict[str, Any] = {"algorithm": name, "block": block, "sparsity": sparsity, "chance": round(chance[0], 3)}
    for key, values in (("found", found), ("covered", covered), ("loss", loss), ("auc", auc)):
        row[key] = [round(float(x), 4) for x in values]
    return row


def changes() -> dict[str, Any]:
    """The changes requested by `--set`."""
    pairs = [pair.partition("=") for pair in _SET.value]
    return {key: _literal(text) for key, _, text in pairs}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def teacher_of(config: ml_collections.ConfigDict) -> Teacher:
    options = config.data.options
    return teacher(informative=options.informative, categories=options.categories, seed=options.seed)


def cells(row: dict[str, Any]) -> dict[str, str]:
    lists = {k: f"{np.mean(v):.4f} ± {np.std(v):.4f}" if isinstance(v, list) else str(v) for k, v in row.items()}
    return lists


def teachers_own(config: ml_collections.ConfigDict, dataset: data.Dataset) -> dict[str, float]:
    """Loss and AUC of the teacher on the held-out rows."""
    test = in_memory(dataset.test).arrays
    logits, label = true_logits(teacher_of(config), test["ids"]), test["label"]
    return {"loss": float(np.mean(np.logaddexp(0, logits) - label * logits)), "auc": evaluation.auc(logits, label)}


def plot(rows: list[dict[str, Any]], own: dict[str, float]) -> None:
    blocks = sorted({row["block"] for row in rows})
    fig, axes = plt.subplots(2, len(blocks), figsize=(4.2 * len(blocks), 7), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    for column, block in enumerate(blocks):
        for i, name in enumerate(names):
            mine = [row for row in rows if (row["algorithm"], row["block"]) == (name, block)]
            x = [f"{row['sparsity']:.0%}" for row in mine]
            for axis, key in zip(axes[:, column], ("found", "loss"), strict=True):
                if name == "dense" and key == "found":
                    continue
                means, stds = ([f(row[key]) for row in mine] for f in (np.mean, np.std))
                axis.errorbar(x, means, stds, marker="o", ms=3, lw=1, capsize=2, color=f"C{i}", label=name)
        chance = next(row["chance"] for row in rows if row["block"] == block)
        axes[0, column].axhline(chance, color="black", ls=":", lw=0.8)
        axes[0, column].set(title=f"blocks {block} × {block}", ylim=(0, 1.02))
        axes[1, column].axhline(own["loss"], color="black", ls=":", lw=0.8)
        axes[1, column].set(xlabel="sparsity of the first layer")
    axes[0, 0].set_ylabel("share of kept blocks on planted rows\n(dotted: by chance)")
    axes[1, 0].set_ylabel("held-out loss\n(dotted: the teacher's own)")
    axes[1, -1].legend(fontsize="x-small")
    report.save_figure(timing.RESULTS / f"{_NAME.value}.png", fig)


def main(argv: list[str]) -> None:
    del argv
    config, console, rows = planted_config.get_config(), progress.console(), []
    config.update_from_flattened_dict(changes())
    dataset = tasks.dataset_of(config.data)
    own = teachers_own(config, dataset)
    grid = list(itertools.product(map(int, _BLOCKS.value), map(float, _SPARSITIES.value), _ALGORITHMS.value))
    for i, (block, sparsity, name) in enumerate(grid, 1):
        rows.append(measure(name, block, sparsity, dataset))
        shown = "  ".join(f"{key} {value}" for key, value in cells(rows[-1]).items())
        console.print(f"{i:>3}/{len(grid)}  {shown}", highlight=False, soft_wrap=True)
    console.print(progress.table("Planted features", [cells(row) for row in rows]))
    console.print(f"the teacher: loss {own['loss']:.4f}, auc {own['auc']:.4f}", highlight=False)
    if _NAME.value:
        plot(rows, own)
        print(timing.save(_NAME.value, {"rows": rows, "steps": _STEPS.value, "changed": changes(), "teacher": own}))


if __name__ == "__main__":
    app.run(main)
