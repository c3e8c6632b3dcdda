"""The recommended recipe for SequentialAttention++: chosen on half of the cells, confirmed on the other half.

    python -m benchmarks.recipes --local=path/to/fashion/mnist            # any number of these share the cells
    python -m benchmarks.recipes --local=path/to/fashion/mnist --report   # the table and the picture
    python -m benchmarks.recipes --data=bytes --name=recipes_bytes        # a small GPT, which chooses by itself

A cell is a data set, a block size and a sparsity. On the cells of `CHOOSING` every variant is trained, and measured on
examples taken from the training set. The best variant of each family, by the mean position between a random mask (0)
and the dense network (1), is then trained on the cells of `CONFIRMING` with other seeds and measured on the test set,
beside the controls. All runs on a data set have the same number of steps. Each run has a directory in `--directory`,
which is locked while it is trained: when a process dies, another takes over its run. Runs that are in the results
already, with the same options and number of steps, are not trained again.
"""

import functools
import json
import math
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import app, flags
from matplotlib import pyplot as plt

from benchmarks import timing
from benchmarks.tables import filled, markdown
from configs import bytes_gpt, fashion_mnist, planted
from configs.reproduce import bytes as bytes_sweep
from experiments import cli, data, tasks
from experiments.data.from_text import Windows
from experiments.data.sources import Arrays, in_memory
from experiments.outputs import progress, report, workdir
from experiments.training import loop, program
from experiments.training.setup import prepare
from experiments.utils import files

_LOCAL = flags.DEFINE_string("local", "", "Directory with Fashion-MNIST's four files; empty for TensorFlow Datasets.")
_DIRECTORY = flags.DEFINE_string("directory", "runs/recipes", "Where the results of the cells go.")
_DATA = flags.DEFINE_list("data", ["fashion_mnist", "planted"], "Data sets, whose cells choose together.")
_CONFIRM = flags.DEFINE_multi_string(
    "confirm", [], "Train this variant on the cells to confirm on, instead of choosing; may be repeated."
)
_ONLY = flags.DEFINE_list("only", [], "Train only runs whose directory has one of these in its name.")
_STEPS = flags.DEFINE_integer("fashion_steps", 4000, "Steps on Fashion-MNIST.")
_PLANTED_STEPS = flags.DEFINE_integer("planted_steps", 800, "Steps on planted features.")
_BYTES_STEPS = flags.DEFINE_integer("bytes_steps", 600, "Steps on bytes.")
_REPORT = flags.DEFINE_bool("report", False, "Make the table and the picture instead of training.")
_PLAN = flags.DEFINE_bool("plan", False, "Say how many cells there are instead of training.")
_NAME = flags.DEFINE_string("name", "recipes", "Write benchmarks/results/<name>.json and .png.")

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "choosing.md"
PAGES = {"recipes": "", "recipes_bytes": " bytes"}  # results that have tables there
Changes = Mapping[str, Any]


class Cell(NamedTuple):
    """What is pruned."""

    data: str
    block: int
    sparsity: float

    def __str__(self) -> str:
        return f"{self.data} {self.block} × {self.block} {self.sparsity:.0%}"


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell of a result."""
    return Cell(row["data"], row["block"], row["sparsity"])


CHOOSING = (
    Cell("fashion_mnist", 8, 0.97),
    Cell("fashion_mnist", 16, 0.95),
    Cell("planted", 10, 0.95),
    Cell("planted", 20, 0.98),
    Cell("bytes", 16, 0.9),
    Cell("bytes", 32, 0.8),
)
CONFIRMING = (
    Cell("fashion_mnist", 8, 0.95),
    Cell("fashion_mnist", 16, 0.97),
    Cell("planted", 10, 0.98),
    Cell("planted", 20, 0.95),
    Cell("bytes", 16, 0.8),
    Cell("bytes", 32, 0.9),
)
SEEDS = {"choose": range(3), "confirm": range(10, 15)}
CONFIGS = {"fashion_mnist": fashion_mnist, "planted": planted, "bytes": bytes_gpt}
METRIC = {"fashion_mnist": "test_accuracy", "planted": "test_auc", "bytes": "test_bits_per_byte"}
PERCENT = ("fashion_mnist", "planted")  # of the metric; bits per byte, which are better lower, are shown as they are
HELD_OUT = {"fashion_mnist": 10_000, "planted": 100_000, "bytes": 2_000}  # training examples to choose on


def _rise(dense: int, sparse: int) -> Changes:
    """One sparsification phase between a dense and a sparse one that take these percentages of the run."""
    middle = 100 - dense - sparse
    schedule = [("dense", f"{dense}%"), ("sparsification", f"{middle}%"), ("sparse", f"{sparse}%")]
    return {"schedule": tuple(phase for phase in schedule if phase[1] != "0%")}


SCHEDULES: dict[str, Changes] = {"paper": {}} | {
    f"rise {d}-{s}": _rise(d, s) for d, s in ((10, 15), (10, 40), (10, 60), (0, 25), (0, 50), (0, 75), (0, 90), (0, 95))
}
RATES = {  # multiples of the weights' learning rate that the logits have, by score and schedule
    ("attention", "paper"): (1.0, 10.0),
    ("attention", "rise 10-40"): (1.0, 3.0, 10.0),
    ("effective", "paper"): (1.0,),
    ("effective", "rise 10-15"): (1.0,),
    ("effective", "rise 0-25"): (1.0,),
    ("effective", "rise 10-40"): (1.0, 3.0, 10.0),
    ("effective", "rise 10-60"): (1.0,),
    ("effective", "rise 0-50"): (1.0,),
    ("effective", "rise 0-75"): (1.0,),
    ("effective", "rise 0-90"): (1.0,),
    ("effective", "rise 0-95"): (1.0,),
}
GLOBAL = ("rise 0-50",)  # schedules with which the blocks of all layers compete, too
EXCHANGES = {  # steps between exchanges of blocks in the sparse phase, by schedule
    "rise 0-50": (25, 100),
    "rise 0-75": (25, 100),
    "rise 0-90": (25, 100),
    "rise 0-95": (25,),
}


def variants() -> dict[str, dict[str, Changes]]:
    """By family, the changes of each variant to a config's sparsifier; the best of a family goes on."""
    attention: dict[str, Changes] = {}
    for (score, schedule), rates in RATES.items():
        for rate in rates:
            own = {"sequential_attention.score": score, "sequential_attention.logit_lr": rate}
            name = f"{score}, {schedule}, {rate:g}"
            attention[name] = {"name": "sequential_attention", **own, **SCHEDULES[schedule]}
    for schedule in GLOBAL:
        name, local = f"effective, {schedule}, all layers", attention[f"effective, {schedule}, 1"]
        attention[name] = {**local, "scope": "global"}
    for schedule, each in EXCHANGES.items():
        for every in each:
            own = {"score": "effective", "logit_lr": 1.0, "regrow": 0.3, "regrow_every": every, "regrow_until": 0.75}
            changes = {f"sequential_attention.{option}": value for option, value in own.items()}
            name = f"effective, {schedule}, regrow {every}"
            attention[name] = {"name": "sequential_attention", **changes, **SCHEDULES[schedule]}
    gradual: dict[str, Changes] = {
        name: {"name": "gradual_magnitude", **SCHEDULES[name]} for name in SCHEDULES if name != "paper"
    }
    return {"SA++": attention, "gradual magnitude": gradual}


CONTROLS: dict[str, Changes] = {
    "SA++, paper": {"name": "sequential_attention"},
    "ACDC": {"name": "acdc"},
    "magnitude": {"name": "magnitude"},
    **{name: {"name": name} for name in ("rigl", "sparse_evolutionary", "movement", "group_lasso", "d_gating")},
    "rigl 25": {"name": "rigl", "rigl.mask_every": 25},
    "random": {"name": "random"},
    "dense": {"name": "dense"},
}


class Job(NamedTuple):
    """One training run of all seeds of a stage, side by side."""

    stage: str
    cell: Cell
    variant: str
    changes: Changes

    @property
    def file(self) -> pathlib.Path:
        name = f"{self.stage} {self.cell} {config_of(self).steps} steps {self.variant}"
        for old, new in ((" × ", "x"), ("%", ""), (", ", "_"), (" ", "_")):
            name = name.replace(old, new)
        return pathlib.Path(_DIRECTORY.value) / name / workdir.RESULT


def jobs(stage: str, found: Mapping[str, str] | None = None) -> list[Job]:
    """The runs of a stage; `found` has the variant that each family goes on with."""
    if found is None:
        run = every_variant() | {name: CONTROLS[name] for name in ("rigl", "rigl 25", "random", "dense")}
    else:
        run = {f"{family}, chosen": variants()[family][v] for family, v in found.items()} | CONTROLS
    return _on_cells(stage, run)


def named(names: Iterable[str]) -> list[Job]:
    """The runs of variants or controls on the cells to confirm on, by name and whatever is chosen."""
    known = every_variant() | CONTROLS
    if unknown := sorted(set(names) - known.keys()):
        raise app.UsageError(f"--confirm={unknown[0]}: no such variant. There are: " + "; ".join(known))
    return _on_cells("confirm", {name: known[name] for name in names})


def every_variant() -> dict[str, Changes]:
    """The variants of all families."""
    return {variant: changes for family in variants().values() for variant, changes in family.items()}


def _on_cells(stage: str, run: Mapping[str, Changes]) -> list[Job]:
    cells = [cell for cell in (CHOOSING if stage == "choose" else CONFIRMING) if cell.data in _DATA.value]
    return [Job(stage, cell, *variant) for cell in cells for variant in run.items()]


def config_of(job: Job) -> ml_collections.ConfigDict:
    config = CONFIGS[job.cell.data].get_config()
    if job.cell.data == "bytes":
        config.update_from_flattened_dict(bytes_sweep.get_config().changes)
        config.steps = _BYTES_STEPS.value
    else:
        config.data.local = _LOCAL.value if job.cell.data == "fashion_mnist" else ""
        config.steps = _STEPS.value if job.cell.data == "fashion_mnist" else _PLANTED_STEPS.value
    config.log_every = config.eval_every = config.steps
    config.sparsifier.update({"block": (job.cell.block, job.cell.block), "sparsity": job.cell.sparsity})
    config.sparsifier.update_from_flattened_dict(job.changes)
    return config


@functools.cache
def dataset(name: str, stage: str) -> data.Dataset:
    """The data set, or, for choosing, with the last of its training examples as the test set."""
    if stage == "choose":
        whole = dataset(name, "confirm")
        if isinstance(whole.train, Windows):
            train, test = whole.train.split(len(whole.train) - HELD_OUT[name])
            return whole._replace(train=train, test=test)
        arrays, cut = in_memory(whole.train).arrays, len(whole.train) - HELD_OUT[name]
        first, last = (Arrays({k: a[part] for k, a in arrays.items()}) for part in (slice(cut), slice(cut, None)))
        return whole._replace(train=first, test=last)
    cell = next(cell for cell in CHOOSING if cell.data == name)
    return tasks.dataset_of(config_of(Job(stage, cell, "dense", CONTROLS["dense"])).data)


def measure(job: Job) -> dict[str, Any]:
    """Train all seeds of a job side by side."""
    started, seeds = time.perf_counter(), SEEDS[job.stage]
    setup = prepare(config_of(job), dataset=dataset(job.cell.data, job.stage))
    outcomes = loop.train(program.compiled(setup, len(seeds)), seeds)
    values = [round(o.test[METRIC[job.cell.data]], 5) for o in outcomes]
    sparsity = [report.real_sparsity(report.layer_rows(o)) for o in outcomes]
    return {
        **{"stage": job.stage, **job.cell._asdict(), "variant": job.variant, "changes": dict(job.changes)},
        **{"steps": outcomes[0].steps, "seeds": list(seeds), "values": values},
        **{"real_sparsity": round(float(np.mean(sparsity)), 4), "seconds": round(time.perf_counter() - started, 1)},
    }


def done(job: Job) -> dict[str, Any] | None:
    """Do a job, unless it is done or another process is at it."""
    return workdir.once(job.file.parent, lambda: measure(job))


@functools.cache
def earlier() -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows of the results that are there, by what tells a job from others."""
    file = timing.RESULTS / f"{_NAME.value}.json"
    found = json.loads(file.read_text()) if file.exists() else {"choosing": [], "confirming": []}
    return {(row["stage"], cell_of(row), row["variant"]): row for row in (*found["choosing"], *found["confirming"])}


def result(job: Job) -> dict[str, Any] | None:
    """The result of a job: of its run, or of an earlier one with the same options and number of steps."""
    if job.file.exists():
        return dict(json.loads(job.file.read_text()))
    row = earlier().get(job[:3], {})
    options = json.loads(json.dumps(job.changes)), config_of(job).steps
    return row if (row.get("changes"), row.get("steps")) == options else None


def results(stage: list[Job]) -> list[dict[str, Any]]:
    """The results so far."""
    return list(filter(None, map(result, stage)))


def work(stage: list[Job]) -> Iterator[dict[str, Any]]:
    """Do the jobs that are wanted and that no other process does, until all are done."""
    names = _ONLY.value
    mine = [job for job in stage if not names or any(name in job.file.parent.name for name in names)]
    while missing := [job for job in mine if result(job) is None]:
        yield from filter(None, map(done, missing))
        time.sleep(1)


def shares(rows: list[dict[str, Any]]) -> dict[str, dict[Cell, float]]:
    """By variant and cell, the position between a random mask and dense, `(x - random) / (dense - random)`."""
    means: dict[str, dict[Cell, float]] = {}
    for row in rows:
        cell = cell_of(row)
        means.setdefault(row["variant"], {})[cell] = float(np.mean(row["values"]))
    low, high = means.get("random", {}), means.get("dense", {})
    ends = low.keys() & high.keys()  # cells that are not done yet have no share
    return {v: {c: (x - low[c]) / (high[c] - low[c]) for c, x in own.items() if c in ends} for v, own in means.items()}


def chosen(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The best variant of each family, by its mean share; none of a family that has no shares."""
    means = mean_shares(rows)
    found = {family: [v for v in own if v in means] for family, own in variants().items()}
    return {family: max(own, key=lambda v: means[v]) for family, own in found.items() if own}


def mean_shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By variant, the mean of `shares` over all cells, of those that were trained on as many as any."""
    found = {variant: list(own.values()) for variant, own in shares(rows).items()}
    complete = max(map(len, found.values()))
    return {v: float(np.mean(values)) for v, values in found.items() if values and len(values) == complete}


def table(rows: list[dict[str, Any]], against: str) -> list[dict[str, str]]:
    """Mean and standard error: one line per variant, best first, one column per cell. In brackets, the mean and
    standard error of the difference from `against`, paired by seed."""
    base = {cell_of(r): _shown(r) for r in rows if r["variant"] == against}
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        cell, values = cell_of(row), _shown(row)
        digits = 2 if row["data"] in PERCENT else 3
        text = mean_error(values, digits)
        if cell in base and row["variant"] != against:
            text += f" ({mean_error(values - base[cell], digits, sign='+')})"
        lines.setdefault(row["variant"], {"variant": row["variant"]})[str(cell)] = text
    share = mean_shares(rows)
    cells = dict.fromkeys(str(cell_of(row)) for row in rows)
    order = sorted(lines, key=lambda variant: -share.get(variant, -math.inf))
    blank = dict.fromkeys(("variant", *cells), "-")
    return [{**blank, **lines[v], "share": f"{share[v]:.3f}" if v in share else "-"} for v in order]


def _shown(row: Mapping[str, Any]) -> np.ndarray:
    """The metric of each seed, in percent if it is a share."""
    return np.array(row["values"]) * (100 if row["data"] in PERCENT else 1)


def mean_error(values: np.ndarray, digits: int, sign: str = "") -> str:
    """The mean of the seeds ± its standard error."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):{sign}.{digits}f} ± {error:.{digits}f}"


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plot each seed and the mean, one panel per cell."""
    cells = list(dict.fromkeys(map(cell_of, rows)))
    names = [line["variant"] for line in table(rows, "") if line["variant"] != "dense"]
    fig, axes = plt.subplots(1, len(cells), figsize=(3.4 * len(cells), 3.6), layout="constrained", squeeze=False)
    for cell, axis in zip(cells, axes[0], strict=True):
        for row in (r for r in rows if cell_of(r) == cell):
            values = _shown(row)
            if row["variant"] == "dense":
                axis.axvline(values.mean(), color="black", ls=":", lw=0.8)
                continue
            y = names.index(row["variant"])
            axis.plot(values, [y] * len(values), "o", ms=3, alpha=0.4, color=f"C{y}")
            axis.plot(values.mean(), y, "|", ms=14, color=f"C{y}")
        axis.set_yticks(range(len(names)), names if axis is axes[0, 0] else [""] * len(names))
        axis.invert_yaxis()
        axis.set(title=str(cell).replace("_", " "), xlabel=_label(cell.data))
    return fig


def _label(data_set: str) -> str:
    name = METRIC[data_set].removeprefix("test_").replace("_", " ")
    return f"{name}, %" if data_set in PERCENT else name


def summarise(choosing: list[dict[str, Any]], confirming: list[dict[str, Any]]) -> None:
    """Print both tables and write the file, the picture and the tables of the page."""
    found, console = chosen(choosing), progress.console()
    tables = {"choosing": table(choosing, found.get("gradual magnitude", ""))}
    if confirming:
        tables["confirming"] = table(confirming, "gradual magnitude, chosen")
        report.save_figure(timing.RESULTS / f"{_NAME.value}.png", plot(confirming))
    for title, lines in tables.items():
        console.print(progress.table(title.capitalize(), lines))
    console.print(f"chosen: {found}", highlight=False)
    print(timing.save(_NAME.value, {"chosen": found, "confirming": confirming, "choosing": choosing}))
    if _NAME.value in PAGES:
        page = PAGE.read_text()
        for title, lines in tables.items():
            page = filled(page, title + PAGES[_NAME.value], markdown(lines))
        files.write_text(PAGE, page)


def main(argv: list[str]) -> None:
    del argv
    pathlib.Path(_DIRECTORY.value).mkdir(parents=True, exist_ok=True)
    first, by_name = jobs("choose"), named(_CONFIRM.value)
    if _PLAN.value:
        any_of_each = {family: next(iter(own)) for family, own in variants().items()}
        print(f"{len(first)} cells to choose, {len(jobs('confirm', any_of_each))} to confirm")
        return
    if _REPORT.value:
        rows = results(first)
        found = chosen(rows)
        confirmed = jobs("confirm", found) + named(every_variant()) if found else named(every_variant() | CONTROLS)
        summarise(rows, results(confirmed))
        return
    with cli.input_errors():
        for name in _DATA.value:
            dataset(name, "confirm")
    if _CONFIRM.value:
        _train(by_name)
        return
    _train(first)
    if missing := [job for job in first if result(job) is None]:
        print(f"{len(missing)} runs to choose by are missing: nothing is confirmed yet")
        return
    _train(jobs("confirm", chosen(results(first))))


def _train(stage: list[Job]) -> None:
    console = progress.console()
    for row in work(stage):
        console.print(f"{row['seconds']:>6} s  {row['variant']}  {row['values']}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
