"""How the comparison of recipes on bytes depends on the number of steps: a table and a picture of all lengths.

    python -m benchmarks.recipes --data=bytes --bytes_steps=3000 --name=recipes_bytes_3000 --only=rise_0-50
    python -m benchmarks.recipes --data=bytes --bytes_steps=3000 --name=recipes_bytes_3000 --report
    python -m benchmarks.recipes_lengths

Reads benchmarks/results/recipes_bytes*.json, fills in the tables of `docs/choosing.md` and writes
benchmarks/results/recipes_lengths.png. Of the runs to choose by, variants that were trained with one number of steps
only are left out; those to confirm are in a table of their own.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app
from matplotlib import pyplot as plt

from benchmarks import timing
from benchmarks.recipes import PAGE, Cell, cell_of, mean_error
from benchmarks.tables import filled, markdown
from experiments.outputs import report
from experiments.utils import files

Row = dict[str, Any]
NAMES = {
    "effective, rise 0-50, 1": "SA++, recommended (rise 0-50)",
    "effective, rise 0-95, regrow 25": "SA++, rise 0-95, exchanges every 25 steps",
    "effective, rise 10-15, 1": "SA++, rise 10-15",
    "effective, paper, 1": "SA++, paper's schedule",
    "rise 0-50": "gradual magnitude, rise 0-50",
    "rise 0-95": "gradual magnitude, rise 0-95",
    "rise 10-15": "gradual magnitude, rise 10-15",
    "rigl": "RigL",
    "rigl 25": "RigL, every 25 steps",
}


def rows() -> list[Row]:
    """All runs on the cells to choose on, of the variants that have several lengths on one cell."""
    return several(read("choosing"))


def read(stage: str) -> list[Row]:
    """The runs of all lengths, `"choosing"` or `"confirming"`."""
    found = [json.loads(file.read_text()) for file in sorted(timing.RESULTS.glob("recipes_bytes*.json"))]
    return [row for each in found for row in each[stage]]


def several(every: Sequence[Row]) -> list[Row]:
    """The rows of variants that were trained with several numbers of steps on one cell, the shortest first."""
    lengths: dict[tuple[str, Cell], set[int]] = {}
    for row in every:
        lengths.setdefault((row["variant"], cell_of(row)), set()).add(row["steps"])
    wanted = {variant for (variant, _), steps in lengths.items() if len(steps) > 1}
    return sorted((row for row in every if row["variant"] in wanted), key=lambda row: row["steps"])


def table(some: Sequence[Row]) -> list[dict[str, str]]:
    """One line per variant, one column per cell and number of steps, the lowest of each column in bold."""
    columns = sorted({(cell_of(row), row["steps"]) for row in some})
    best = {
        column: min(np.mean(row["values"]) for row in some if (cell_of(row), row["steps"]) == column)
        for column in columns
    }
    blank = dict.fromkeys(("variant", *(_title(*column) for column in columns)), "-")
    lines = {variant: blank | {"variant": NAMES.get(variant, variant)} for variant in _variants(some)}
    for row in some:
        column = cell_of(row), row["steps"]
        text = mean_error(np.array(row["values"]), 3)
        lines[row["variant"]][_title(*column)] = f"**{text}**" if np.mean(row["values"]) == best[column] else text
    return list(lines.values())


def plot(some: Sequence[Row]) -> Any:
    """Bits per byte against the number of steps, a panel per cell, with standard errors."""
    cells = sorted({cell_of(row) for row in some})
    fig, axes = plt.subplots(1, len(cells), figsize=(4.2 * len(cells), 3.6), layout="constrained", squeeze=False)
    for cell, axis in zip(cells, axes[0], strict=True):
        for i, variant in enumerate(_variants(some)):
            mine = [row for row in some if cell_of(row) == cell and row["variant"] == variant]
            values = [np.array(row["values"]) for row in mine]
            errors = [x.std(ddof=1) / np.sqrt(len(x)) for x in values]
            look: dict[str, Any] = {"marker": "o", "ms": 3, "lw": 1, "color": f"C{i}"}
            steps, means = [row["steps"] for row in mine], [x.mean() for x in values]
            axis.errorbar(steps, means, errors, label=NAMES.get(variant, variant), **look)
        axis.set(title=str(cell), xlabel="steps", ylabel="bits per byte" if axis is axes[0, 0] else "", xscale="log")
        axis.set_xticks(ticks := sorted({row["steps"] for row in some}), [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
    axes[0, -1].legend(fontsize=7)
    return fig


def _variants(some: Sequence[Row]) -> list[str]:
    """In the order of `NAMES`, others last."""
    found = dict.fromkeys(row["variant"] for row in some)
    return [v for v in NAMES if v in found] + [v for v in found if v not in NAMES]


def _title(cell: Cell, steps: int) -> str:
    return f"{cell.block} × {cell.block}, {cell.sparsity:.0%}, {steps:,} steps"


def main(argv: list[str]) -> None:
    del argv
    some = rows()
    page = filled(PAGE.read_text(), "lengths", markdown(table(some)))
    files.write_text(PAGE, filled(page, "confirmed lengths", markdown(table(read("confirming")))))
    report.save_figure(timing.RESULTS / "recipes_lengths.png", plot(some))


if __name__ == "__main__":
    app.run(main)
