"""Which recipe for SequentialAttention++ to choose: schedules, scores and learning rates against the other algorithms.

    python -m benchmarks.recipes --local=path/to/fashion_mnist --directory=runs/recipes  # in as many processes as cores
    python -m benchmarks.recipes --directory=runs/recipes --table  # the table and the picture

LeNet-300-100 on Fashion-MNIST, 4,000 steps. The best variant is chosen on some cells (block size and sparsity) and
confirmed on others, with more seeds. Each process takes the next run that nobody has begun, by creating a file that
must not exist yet; a run whose file is empty was interrupted: delete it, and it is done again. Means of test accuracy
are shown with their standard errors.
"""

import itertools
import json
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from matplotlib import pyplot as plt

from benchmarks import timing
from configs import fashion_mnist
from experiments import cli, tasks
from experiments.outputs import progress, report
from experiments.training import loop, program
from experiments.training.setup import prepare
from experiments.utils import files

_LOCAL = flags.DEFINE_string("local", "", "Directory with Fashion-MNIST's four files.")
_DIRECTORY = flags.DEFINE_string("directory", "runs/recipes", "Where the runs' results are, shared by all processes.")
_STEPS = flags.DEFINE_integer("steps", 4000, "Steps of each run.")
_ONLY = flags.DEFINE_string("only", "", "Train only variants in whose name this occurs.")
_TABLE = flags.DEFINE_bool("table", False, "Sum up what is there, and train nothing.")
_NAME = flags.DEFINE_string("name", "recipes", "Write benchmarks/results/<name>.json and .png.")

ATTENTION = "sequential_attention"
VARIANTS: dict[str, dict[str, Any]] = {  # changes to config.sparsifier
    "SA++": {"name": ATTENTION},
    "SA++, one rise": {"name": ATTENTION, "recipe": "finetune"},
    "SA++, effective": {"name": ATTENTION, f"{ATTENTION}.score": "effective"},
    "SA++, effective, one rise": {"name": ATTENTION, f"{ATTENTION}.score": "effective", "recipe": "finetune"},
    "SA++, effective, one rise, logit_lr 3": {
        "name": ATTENTION,
        f"{ATTENTION}.score": "effective",
        f"{ATTENTION}.logit_lr": 3.0,
        "recipe": "finetune",
    },
    "SA++, one rise, logit_lr 3": {"name": ATTENTION, f"{ATTENTION}.logit_lr": 3.0, "recipe": "finetune"},
    "gradual magnitude": {"name": "gradual_magnitude"},
    "gradual magnitude, one rise": {"name": "gradual_magnitude", "recipe": "finetune"},
    "ACDC": {"name": "acdc"},
    "PowerPropagation": {"name": "powerpropagation"},
    "magnitude": {"name": "magnitude"},
    "random": {"name": "random"},
}
CHOOSING = {(8, 0.97): 3, (16, 0.95): 3, (4, 0.98): 3}  # seeds by block size and sparsity
CONFIRMING = {(8, 0.95): 5, (8, 0.99): 5, (16, 0.97): 5, (16, 0.98): 5, (4, 0.95): 5}


class Run(NamedTuple):
    variant: str
    block: int
    sparsity: float
    seeds: int

    @property
    def path(self) -> pathlib.Path:
        name = f"{self.variant}-{self.block}-{self.sparsity}".replace(" ", "_").replace(",", "")
        return pathlib.Path(_DIRECTORY.value) / f"{name}.json"


def runs() -> list[Run]:
    cells = [*CHOOSING.items(), *CONFIRMING.items()]
    return [
        Run(variant, block, sparsity, seeds)
        for ((block, sparsity), seeds), variant in itertools.product(cells, VARIANTS)
    ]


def claimed(path: pathlib.Path) -> bool:
    """Whether this process is the first to ask."""
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True


def measure(run: Run, dataset: Any) -> dict[str, Any]:
    started = time.perf_counter()
    config = fashion_mnist.get_config()
    config.steps = config.eval_every = config.log_every = _STEPS.value
    config.sparsifier.update({"block": (run.block, run.block), "sparsity": run.sparsity})
    config.sparsifier.update_from_flattened_dict(VARIANTS[run.variant])
    compiled = program.compiled(prepare(config, dataset=dataset))
    outcomes = [outcome for seed in range(run.seeds) for outcome in loop.train(compiled, [seed])]
    return {
        **run._asdict(),
        "accuracy": [round(o.test["test_accuracy"], 4) for o in outcomes],
        "real_sparsity": [round(report.real_sparsity(report.layer_rows(o)), 4) for o in outcomes],
        "seconds": round(time.perf_counter() - started, 1),
    }


def error(values: list[float]) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A line a variant, a column a cell: percent, mean and standard error."""
    found = {(row["variant"], row["block"], row["sparsity"]): row["accuracy"] for row in rows}
    lines = []
    for variant in VARIANTS:
        line = {"variant": variant}
        for block, sparsity in [*CHOOSING, *CONFIRMING]:
            values = found.get((variant, block, sparsity))
            shown = f"{100 * np.mean(values):.2f} ± {100 * error(values):.2f}" if values else "-"
            line[f"{block} × {block}, {sparsity:.0%}"] = shown
        lines.append(line)
    return lines


def plot(rows: list[dict[str, Any]]) -> Any:
    cells = [*CHOOSING, *CONFIRMING]
    fig, axes = plt.subplots(1, len(cells), figsize=(3 * len(cells), 4.2), layout="constrained", sharey=True)
    names = list(VARIANTS)
    for (block, sparsity), axis in zip(cells, axes, strict=True):
        mine = [row for row in rows if (row["block"], row["sparsity"]) == (block, sparsity)]
        for row in mine:
            y = len(names) - names.index(row["variant"])
            axis.errorbar(
                100 * np.mean(row["accuracy"]), y, xerr=100 * error(row["accuracy"]), fmt="o", ms=4, capsize=2
            )
        used = "chosen on" if (block, sparsity) in CHOOSING else "confirmed on"
        axis.set(title=f"{block} × {block}, {sparsity:.0%}\n({used})", xlabel="test accuracy, %")
        axis.grid(axis="y", lw=0.3)
    axes[0].set_yticks(range(len(names), 0, -1), names, fontsize="small")
    return fig


def main(argv: list[str]) -> None:
    del argv
    directory, console = pathlib.Path(_DIRECTORY.value), progress.console()
    directory.mkdir(parents=True, exist_ok=True)
    if _TABLE.value:
        texts = [run.path.read_text() for run in runs() if run.path.exists()]
        rows = [json.loads(text) for text in texts if text]
        console.print(progress.table("Test accuracy, %", table(rows)))
        console.print(f"{len(rows)} of {len(runs())} done")
        report.save_figure(timing.RESULTS / f"{_NAME.value}.png", plot(rows))
        console.print(str(timing.save(_NAME.value, {"steps": _STEPS.value, "rows": rows})))
        return
    config = fashion_mnist.get_config()
    config.data.local = _LOCAL.value
    with cli.users_mistakes():
        dataset = tasks.dataset_of(config.data)
    for run in runs():
        if _ONLY.value not in run.variant or not claimed(run.path):
            continue
        row = measure(run, dataset)
        files.write_json(run.path, row)
        console.print(str(row), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
