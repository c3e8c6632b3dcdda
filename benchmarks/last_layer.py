"""Which blocks a last layer of few blocks has to keep: LeNet 1024-512 on Fashion-MNIST, 8 x 8 blocks, 99%.

    python -m benchmarks.last_layer --data=path/to/fashion_mnist

The kernel of 512 x 10 has 64 x 2 blocks, of which 99% leave one. Writes the accuracy of each seed and the number of
outputs without a weight to benchmarks/results/last_layer.json, row by row, and goes on there.
"""

import json
from typing import Any

import ml_collections
import numpy as np
from absl import app, flags

from benchmarks.page import RESULTS
from configs import fashion_mnist
from configs.reproduce.scales import CONTROLS, RECOMMENDED
from experiments import tasks
from experiments.outputs import report
from experiments.training import loop, program
from experiments.training.setup import prepare
from experiments.utils import files

_DATA = flags.DEFINE_string("data", "", "Directory of Fashion-MNIST's four files.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds.")
STEPS, LAST = 1000, "Dense_2/kernel"
FILE = RESULTS / "last_layer.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "as many as the sparsity says": {"sparsifier.min_kept": "0"},
    "one in each column": {},
    "two anywhere": {"sparsifier.overrides": {LAST: {"min_kept": 2}}},
    "all": {"sparsifier.min_blocks": 200},
    "one in each column, in all layers": {"sparsifier.min_kept": "outputs"},
}


def config_of(variant: str) -> ml_collections.ConfigDict:
    """A variant's config."""
    config = fashion_mnist.get_config()
    config.data.local, config.model, config.dense_twin = _DATA.value, "MLP", False
    config.steps = config.log_every = config.eval_every = STEPS
    changes = CONTROLS[RECOMMENDED] | {"sparsifier.block": (8, 8), "sparsifier.sparsity": 0.99} | VARIANTS[variant]
    with config.unlocked():
        config.model_options.widths = (1024, 512)
        config.sparsifier.overrides = changes.pop("sparsifier.overrides", {})
    config.update_from_flattened_dict(changes)
    return config


def main(argv: list[str]) -> None:
    del argv
    rows: list[dict[str, Any]] = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    dataset = None
    for variant in VARIANTS:
        seeds = [s for s in range(_SEEDS.value) if (variant, s) not in {(r["variant"], r["seed"]) for r in rows}]
        if not seeds:
            continue
        config = config_of(variant)
        dataset = dataset or tasks.dataset_of(config.data)
        run = program.compiled(prepare(config, dataset=dataset))
        for seed in seeds:
            (outcome,) = loop.train(run, [seed])
            kernels = report.kernel_leaves(outcome)
            cut = {path: int(np.sum(~w.any(0))) for path, w in kernels.items() if w.ndim > 1}
            accuracy = round(100 * outcome.test["test_accuracy"], 2)
            rows.append({"variant": variant, "seed": seed, "accuracy": accuracy, "outputs without a weight": cut})
            print(json.dumps(rows[-1]), flush=True)
            files.write_json(FILE, {"rows": rows, "steps": STEPS, "versions": report.versions()})


if __name__ == "__main__":
    app.run(main)
