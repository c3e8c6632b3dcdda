"""What reordering while training is worth: LeNet-300-100 on Fashion-MNIST, a small convolutional network on CIFAR-10
and a small GPT on bytes, pruned by blocks.

    python -m benchmarks.reordering_training --local=path/to/fashion_mnist
    python -m benchmarks.reordering_training --data=cifar10 --local=path/to/cifar10.tar --seeds=3
    python -m benchmarks.reordering_training --data=bytes --seeds=3
    python -m benchmarks.reordering_training --report

The recommended recipe as it is; after a dense phase, with which weights have sizes to reorder by; with units put into
another order where that phase ends; for LeNet with the pixels in another order too, by a table; and with single
weights. All prune the same layers, those with 100 blocks. Writes the metric of each seed to
benchmarks/results/reordering_training.json, cell by cell, and goes on there; the report is made of tables for
`docs/training.md`.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import app, flags

from benchmarks.page import RESULTS
from benchmarks.tables import markdown
from configs import bytes_gpt, cifar10, fashion_mnist
from configs.reproduce import bytes as bytes_sweep
from configs.reproduce.scales import CONTROLS, RECOMMENDED
from experiments import tasks
from experiments.outputs import report
from experiments.training import loop, program
from experiments.training.setup import prepare
from experiments.utils import files

_LOCAL = flags.DEFINE_string("local", "", "Directory of Fashion-MNIST's four files, or archive of CIFAR-10's images.")
_DATA = flags.DEFINE_enum("data", "fashion_mnist", ["fashion_mnist", "cifar10", "bytes"], "Data set.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds.", lower_bound=2)
_REPORT = flags.DEFINE_bool("report", False, "Print the tables of what is measured.")
FILE = RESULTS / "reordering_training.json"
AS_IT_IS, PIXELS_TOO, SINGLE = "as it is", "reordered, pixels too", "single weights"
DENSE_FIRST: dict[str, Any] = {
    "sparsifier.schedule": (("dense", "10%"), ("sparsification", "40%"), ("sparse", "50%")),
}
REORDERED: dict[str, Any] = DENSE_FIRST | {"sparsifier.reorder": ("sparsification",)}
VARIANTS: dict[str, dict[str, Any]] = {
    AS_IT_IS: {},
    "dense first": DENSE_FIRST,
    "reordered": REORDERED,
    PIXELS_TOO: REORDERED | {"model_options.inputs_by_table": True},
    SINGLE: {"sparsifier.block": (1, 1)},
}
CELLS = {
    "fashion_mnist": ((16, 0.9), (8, 0.97), (16, 0.8), (16, 0.95)),
    "cifar10": ((8, 0.9),),
    "bytes": ((16, 0.9), (16, 0.8)),
}
METRIC = {"fashion_mnist": "test_accuracy", "cifar10": "test_accuracy", "bytes": "test_bits_per_byte"}
UNIT = {"fashion_mnist": 100, "cifar10": 100, "bytes": 1}  # accuracy is shown in percent
DIGITS = {"fashion_mnist": 2, "cifar10": 2, "bytes": 3}
BETTER = {"fashion_mnist": 1, "cifar10": 1, "bytes": -1}  # higher, or lower
STEPS = 4000  # on images
Row = dict[str, Any]


def config_of(data: str, block: int, sparsity: float, variant: str) -> ml_collections.ConfigDict:
    """A cell's config. Single weights are pruned in the layers that have enough of the cell's blocks."""
    own = {"sparsifier.block": (block, block), "sparsifier.sparsity": sparsity, "dense_twin": False}
    if data == "bytes":
        config = bytes_gpt.get_config()
        own |= bytes_sweep.get_config().changes
    else:
        config = (cifar10 if data == "cifar10" else fashion_mnist).get_config()
        own |= {"data.local": _LOCAL.value, "steps": STEPS, "log_every": STEPS, "eval_every": STEPS}
    if data == "fashion_mnist":
        with config.unlocked():
            config.model_options.inputs_by_table = False
    if variant == SINGLE:
        own["sparsifier.min_blocks"] = config.sparsifier.min_blocks * block**2
    config.update_from_flattened_dict(CONTROLS[RECOMMENDED] | own | VARIANTS[variant])
    return config


def measured(known: list[Row], data: str) -> Iterator[Row]:
    """The cells of a data set that are not known yet."""
    variants = [variant for variant in VARIANTS if data == "fashion_mnist" or variant != PIXELS_TOO]
    cells = [(block, sparsity, variant) for block, sparsity in CELLS[data] for variant in variants]
    mine = [row for row in known if row["data"] == data and len(row["values"]) == _SEEDS.value]
    done = {(row["block"], row["sparsity"], row["variant"]) for row in mine}
    dataset = None
    for block, sparsity, variant in cells:
        trained = 1 if variant == SINGLE else block
        if (trained, sparsity, variant) in done:
            continue
        config = config_of(data, block, sparsity, variant)
        dataset = dataset or tasks.dataset_of(config.data)
        setup, seeds = prepare(config, dataset=dataset), list(range(_SEEDS.value))
        groups = [seeds] if program.side_by_side_pays(setup.plan) else [[seed] for seed in seeds]
        compiled = program.compiled(setup, len(groups[0]))
        outcomes = [outcome for group in groups for outcome in loop.train(compiled, group)]
        shares = [np.mean(list(o.reorderings[0].shares.values()), 0).tolist() for o in outcomes if o.reorderings]
        yield {
            **{"data": data, "block": trained, "sparsity": sparsity, "variant": variant, "steps": config.steps},
            "values": [round(UNIT[data] * o.test[METRIC[data]], DIGITS[data] + 1) for o in outcomes],
            "shares": shares,
            "seconds": outcomes[0].seconds,
        }


class _Mean(NamedTuple):
    """A mean over seeds, and its standard error."""

    value: float
    error: float


def _mean(values: np.ndarray) -> _Mean:
    return _Mean(values.mean(), values.std(ddof=1) / np.sqrt(len(values)))


def table(rows: list[Row], data: str) -> str:
    """The metric of each way, and by how much of the gap to single weights it is ahead of the recipe as it is.

    The latter only where there is a gap, of more than two standard errors.
    """
    found = {(row["block"], row["sparsity"], row["variant"]): np.array(row["values"]) for row in rows}
    lines, digits = [], DIGITS[data]
    for block, sparsity in CELLS[data]:
        single, plain = found.get((1, sparsity, SINGLE)), found.get((block, sparsity, AS_IT_IS))
        if single is None or plain is None:
            continue
        line = {"blocks": f"{block} × {block}, {sparsity:.0%}"}
        for variant in VARIANTS:
            values = single if variant == SINGLE else found.get((block, sparsity, variant))
            if values is None:
                continue
            line[variant] = f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"
            gap = _mean(single - plain)
            if variant not in (AS_IT_IS, SINGLE) and BETTER[data] * gap.value > 2 * gap.error:
                ahead = _mean(values - plain)
                line[variant] += f" ({ahead.value / gap.value:.0%} ± {ahead.error / abs(gap.value):.0%})"
        lines.append(line)
    return markdown(lines)


def main(argv: list[str]) -> None:
    del argv
    rows: list[Row] = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    if _REPORT.value:
        for data in CELLS:
            if mine := [row for row in rows if row["data"] == data]:
                print(f"{data}\n\n{table(mine, data)}")
        return
    for row in measured(rows, _DATA.value):
        print(json.dumps(row), flush=True)
        same = ("data", "block", "sparsity", "variant")
        rows = [old for old in rows if any(old[key] != row[key] for key in same)] + [row]
        files.write_json(FILE, {"rows": rows, "versions": report.versions()})


if __name__ == "__main__":
    app.run(main)
