"""What reordering while training is worth: LeNet-300-100 on Fashion-MNIST, pruned by blocks.

    python -m benchmarks.reordering_training --data=path/to/fashion_mnist
    python -m benchmarks.reordering_training --report

The recommended recipe as it is; after a dense phase, with which weights have sizes to reorder by; with units put into
another order where that phase ends; with the pixels in another order too, by a table; and with single weights. The last
layer stays whole. Writes the accuracy of each seed to benchmarks/results/reordering_training.json, cell by cell, and
goes on there; the report is a table for `docs/training.md`.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import app, flags

from benchmarks.page import RESULTS
from benchmarks.tables import markdown
from configs import fashion_mnist
from configs.reproduce.scales import CONTROLS, RECOMMENDED
from experiments import tasks
from experiments.outputs import report
from experiments.training import loop, program
from experiments.training.setup import prepare
from experiments.utils import files

_DATA = flags.DEFINE_string("data", "", "Directory of Fashion-MNIST's four files.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds.", lower_bound=2)
_REPORT = flags.DEFINE_bool("report", False, "Print the table of what is measured.")
CELLS = ((16, 0.9), (8, 0.97), (16, 0.8), (16, 0.95))
STEPS = 4000
FILE = RESULTS / "reordering_training.json"
AS_IT_IS, SINGLE = "as it is", "single weights"
DENSE_FIRST: dict[str, Any] = {
    "sparsifier.schedule": (("dense", "10%"), ("sparsification", "40%"), ("sparse", "50%")),
}
REORDERED: dict[str, Any] = DENSE_FIRST | {"sparsifier.reorder": ("sparsification",)}
VARIANTS: dict[str, dict[str, Any]] = {
    AS_IT_IS: {},
    "dense first": DENSE_FIRST,
    "reordered": REORDERED,
    "reordered, pixels too": REORDERED | {"model_options.inputs_by_table": True},
    SINGLE: {"sparsifier.block": (1, 1)},
}
Row = dict[str, Any]


def config_of(block: int, sparsity: float, variant: str) -> ml_collections.ConfigDict:
    """A cell's config."""
    config = fashion_mnist.get_config()
    config.data.local, config.steps, config.dense_twin = _DATA.value, STEPS, False
    config.log_every = config.eval_every = STEPS
    with config.unlocked():
        config.model_options.inputs_by_table = False
    own = {"sparsifier.block": (block, block), "sparsifier.sparsity": sparsity}
    own |= {"sparsifier.include": "Dense_[01]/kernel"}
    config.update_from_flattened_dict(CONTROLS[RECOMMENDED] | own | VARIANTS[variant])
    return config


def measured(known: list[Row]) -> Iterator[Row]:
    """The cells that are not known yet."""
    cells = [(1 if variant == SINGLE else block, s, variant) for block, s in CELLS for variant in VARIANTS]
    done = {(row["block"], row["sparsity"], row["variant"]) for row in known}
    dataset = None
    for block, sparsity, variant in cells:
        if (block, sparsity, variant) in done:
            continue
        config = config_of(block, sparsity, variant)
        dataset = dataset or tasks.dataset_of(config.data)
        outcomes = loop.train(
            program.compiled(prepare(config, dataset=dataset), _SEEDS.value), list(range(_SEEDS.value))
        )
        shares = [np.mean(list(o.reorderings[0].shares.values()), 0).tolist() for o in outcomes if o.reorderings]
        yield {
            **{"block": block, "sparsity": sparsity, "variant": variant},
            "values": [round(100 * o.test["test_accuracy"], 2) for o in outcomes],
            "shares": shares,
            "seconds": outcomes[0].seconds,
        }


class _Mean(NamedTuple):
    """A mean over seeds, and its standard error."""

    value: float
    error: float


def _mean(values: np.ndarray) -> _Mean:
    return _Mean(values.mean(), values.std(ddof=1) / np.sqrt(len(values)))


def table(rows: list[Row]) -> str:
    """Accuracy of each way, and by how much of the gap to single weights it is ahead of the recipe as it is.

    The latter only where there is a gap, of more than two standard errors.
    """
    found = {(row["block"], row["sparsity"], row["variant"]): np.array(row["values"]) for row in rows}
    lines = []
    for block, sparsity in CELLS:
        single, plain = found.get((1, sparsity, SINGLE)), found.get((block, sparsity, AS_IT_IS))
        if single is None or plain is None:
            continue
        line = {"blocks": f"{block} × {block}, {sparsity:.0%}"}
        for variant in VARIANTS:
            values = single if variant == SINGLE else found.get((block, sparsity, variant))
            if values is None:
                continue
            line[variant] = f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
            if variant not in (AS_IT_IS, SINGLE) and (gap := _mean(single - plain)).value > 2 * gap.error:
                ahead = _mean(values - plain)
                line[variant] += f" ({ahead.value / gap.value:.0%} ± {ahead.error / gap.value:.0%})"
        lines.append(line)
    return markdown(lines)


def main(argv: list[str]) -> None:
    del argv
    rows: list[Row] = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    if _REPORT.value:
        print(table(rows))
        return
    for row in measured(rows):
        print(json.dumps(row), flush=True)
        rows.append(row)
        files.write_json(FILE, {"rows": rows, "seeds": _SEEDS.value, "steps": STEPS, "versions": report.versions()})


if __name__ == "__main__":
    app.run(main)
