"""Compare several algorithms on the same problem over several seeds, with mean and spread.

    python -m experiments.compare --config=configs/mnist.py --algorithms=all --seeds=3

    python -m experiments.compare --algorithms=sequential_attention,narrow,dense --seeds=5

`all` is every algorithm and every control of the library, and `narrow`: the dense network whose widths are cut until it
has as many weights as the pruned one (or, with `--config.sparsifier.narrow.equal=multiply_adds`, multiply-adds). Each
is compiled once; its seeds run side by side in that program if this is faster, otherwise one after another. It writes
`compare.json` and `compare.png` to the work directory.
Exit status: 0 done, 2 bad input, 3 every run diverged.
"""

import datetime
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from matplotlib import pyplot as plt
from rich.console import Console

from experiments import cli, tasks
from experiments.outputs import progress, report
from experiments.training import factories, loop, narrow, program
from experiments.training.setup import Setup, prepare
from experiments.utils import files, registry

flags.declare_key_flag("config")  # for --help
_ALGORITHMS = flags.DEFINE_list("algorithms", ["all"], "Comma-separated names, or all.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds, starting at config.seed.", lower_bound=1)
_TOGETHER = flags.DEFINE_enum("together", "auto", ["auto", "yes", "no"], "Run the seeds side by side, or in turn.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go. Default: a new directory under runs/.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the results that the work directory holds.")

RESULT = "compare.json"


def main(argv: list[str]) -> None:
    del argv  # cli.run has refused any
    config, console = cli.CONFIG.value, progress.console()
    with cli.input_errors():
        everything = _ALGORITHMS.value == ["all"]
        asked = factories.CONTENDERS if everything else tuple(dict.fromkeys(_ALGORITHMS.value))
        if not asked:
            raise ValueError(f"--algorithms is empty; write all, or some of {', '.join(factories.CONTENDERS)}")
        setups = prepared(config, asked, everything, console)
        names = tuple(setups)
        config.sparsifier.sparsity = setups[names[0]].config.sparsifier.sparsity
        workdir = cli.workdir_path(_WORKDIR.value, f"{config.name}-compare")
        if (workdir / RESULT).exists() and not _OVERWRITE.value:
            raise FileExistsError(f"{workdir} holds a comparison: choose another --workdir or pass --overwrite")
        workdir.mkdir(parents=True, exist_ok=True)
    progress.warn_of_short_phases({name: setup.phases for name, setup in setups.items()}, console)
    seeds = [config.seed + i for i in range(_SEEDS.value)]
    together = {"yes": True, "no": False, "auto": program.side_by_side_pays(setups[names[0]].plan)}[_TOGETHER.value]
    groups = [seeds] if together else [[s] for s in seeds]
    metric, lower_is_better = setups[names[0]].task.metric, setups[names[0]].task.lower_is_better
    outcomes: dict[str, list[loop.Outcome]] = {}
    for name, setup in setups.items():
        outcomes[name] = []
        run = program.compiled(setup, len(groups[0]))
        for group in groups:
            title = f"{name}, seed{'s' if len(group) > 1 else ''} {', '.join(map(str, group))}"
            with progress.Live(title, setup.config.steps, metric, console) as live:
                outcomes[name] += loop.train(run, group, loop.Hooks(on_row=live))
    rows = [_summary(name, outcomes[name], metric) for name in names]
    narrowed = {name: setup.narrowed for name, setup in setups.items() if name == factories.NARROW}
    content = {
        "metric_name": f"test_{metric}",
        "block": list(config.sparsifier.block),
        "target_sparsity": config.sparsifier.sparsity,
        "seeds": seeds,
        "algorithms": {row["algorithm"]: row for row in rows},
        "narrowed": narrowed.get(factories.NARROW),
        "versions": report.versions(),
        "config": config.to_dict(),
        "date": datetime.date.today().isoformat(),
    }
    files.write_json(workdir / RESULT, content)
    _plot(workdir / "compare.png", config, outcomes, metric, lower_is_better)
    block = progress.sizes(config.sparsifier.block)
    title = f"{config.name}, {config.model}, blocks {block}: mean ± std of {len(seeds)} seeds"
    console.print(progress.table(title, [_cells(row, metric) for row in rows]))
    for name, widths in narrowed.items():
        console.print(f"{name}: {config.model} with {narrow.shown(widths) or 'all its widths'}", highlight=False)
    console.print(f"In {workdir}: compare.json, compare.png", highlight=False)
    if all(all(row["diverged"]) for row in rows):
        sys.exit(cli.DIVERGED)


def prepared(
    config: ml_collections.ConfigDict, names: Sequence[str], lenient: bool, console: Console
) -> dict[str, Setup]:
    """The runs by their algorithm; `lenient`: without `narrow`, and with a message, where that is impossible."""
    configs = {name: _with_algorithm(config, name) for name in names}
    dataset, setups = tasks.dataset_of(config.data), {}
    for name, own in configs.items():
        try:
            setups[name] = prepare(own, dataset=dataset)
        except narrow.CannotNarrow as error:
            if not lenient:
                raise
            console.print(f"{name} is left out: {error}", style="yellow", highlight=False, soft_wrap=True)
    return setups


def _with_algorithm(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.sparsifier.name = registry.check(name, factories.CONTENDERS, "--algorithms")
    return config


def _summary(name: str, outcomes: list[loop.Outcome], metric: str) -> dict[str, Any]:
    sparsity = [report.real_sparsity(report.layer_rows(o)) for o in outcomes]
    return {
        "algorithm": name,
        "metric": [o.test[f"test_{metric}"] for o in outcomes],
        "loss": [o.test["test_loss"] for o in outcomes],
        "real_sparsity": sparsity,
        "kept_weights": [report.kept_weights(o) for o in outcomes],
        "diverged": [o.diverged for o in outcomes],
        "seconds": [o.seconds for o in outcomes],
        "compile_seconds": [o.compile_seconds for o in outcomes],
    }


def _cells(row: dict[str, Any], metric: str) -> dict[str, str]:
    return {
        "algorithm": row["algorithm"],
        f"test {metric}": _mean_std(row["metric"], 4),
        "test loss": _mean_std(row["loss"], 4),
        "sparsity": f"{np.mean(row['real_sparsity']):.2%}",
        "weights": f"{np.mean(row['kept_weights']):,.0f}",
        "s / run": f"{np.mean(row['seconds']):.1f}",
        "s compiling": f"{np.mean(row['compile_seconds']):.1f}",
        "diverged": str(sum(row["diverged"])),
    }


def _mean_std(values: list[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def _plot(
    path: pathlib.Path,
    config: ml_collections.ConfigDict,
    outcomes: dict[str, list[loop.Outcome]],
    metric: str,
    lower_is_better: bool,
) -> None:
    """Plot mean and spread of the test metric against step for each algorithm, and the final value of each seed."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(2, 1), sharey=True)
    for i, (name, runs) in enumerate(outcomes.items()):
        tested = [{row["step"]: row[f"test_{metric}"] for row in o.rows if f"test_{metric}" in row} for o in runs]
        steps = sorted(set().union(*tested))
        curves = np.array([[values.get(step, np.nan) for step in steps] for values in tested])
        mean, std = curves.mean(0), curves.std(0, ddof=min(1, len(runs) - 1))
        last = [o.test[f"test_{metric}"] for o in runs]
        (line,) = left.plot(steps, mean, lw=1.2, label=name)
        left.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.15, lw=0)
        right.plot([i] * len(runs), last, "o", color=line.get_color(), alpha=0.6)
        right.plot([i - 0.3, i + 0.3], [np.mean(last)] * 2, color=line.get_color())
    report.step_axis(left, max(o.phases.total_steps for runs in outcomes.values() for o in runs))
    left.set_ylabel(f"test {metric}")
    ends = np.array([o.test[f"test_{metric}"] for runs in outcomes.values() for o in runs])
    if np.isfinite(ends).any():  # NaN where a run diverged
        low, high = np.nanmin(ends), np.nanmax(ends)
        margin = 0.2 * (high - low + 0.01)
        below, above = (1, 3) if lower_is_better else (3, 1)  # more room on the side where the curves start
        left.set_ylim(low - below * margin, high + above * margin)
    fig.legend(loc="outside lower center", ncols=len(outcomes), fontsize="small")
    right.set_xticks(range(len(outcomes)), list(outcomes), rotation=35, ha="right", fontsize="small")
    block = progress.sizes(config.sparsifier.block)
    fig.suptitle(f"{config.name}, {config.model}: blocks {block}, {config.sparsifier.sparsity:.0%} target sparsity")
    report.save_figure(path, fig)


if __name__ == "__main__":
    cli.run(main)
