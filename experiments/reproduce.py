"""Reproduce the paper's tables and figures, with the paper's values beside ours.

    python -m experiments.reproduce table1 --scale=small --local=path/to/fashion/mnist
    python -m experiments.reproduce table2 --scale=small --plan
    python -m experiments.reproduce figure2
    python -m experiments.reproduce all --scale=smoke
    python -m experiments.reproduce all --scale=paper --local=path/to/imagenet --local=table2=path/to/criteo

table1 to table4 are sweeps over algorithms, block sizes, sparsities and seeds (`configs/reproduce/`); figure3 and
figure4 are drawn from the runs of table1, figure5 from those of table2; figure2, the schedules, needs no runs; `bytes`
and `cifar10` are sweeps that are not in the paper. `--scale=paper` is for accelerators; on two cores `small` takes
hours and `smoke` minutes. Each cell of a sweep is a work directory of `experiments.main` below `--directory`. The same
command resumes after an interruption; any number of processes and hosts may share one directory. `--plan` shows what
would be run, `--report` writes the results so far. Exit status: 0 done, 2 bad input, 3 cells failed, 4 stopped by
SIGTERM.
"""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.live import Live

from experiments import cli
from experiments.outputs import progress, report
from experiments.sweeps import page, work
from experiments.sweeps.cells import SWEEPS, TABLES, Cell, Sweep, cells_of, check, result_of, sweep
from experiments.training import loop, program
from experiments.training.setup import prepare
from experiments.utils import registry

FIGURES = {"figure2": "", "figure3": "table1", "figure4": "table1", "figure5": "table2"}
NEEDS = {name: name for name in SWEEPS} | FIGURES
_STATES = ("done", "started", "waiting", "diverged", "failed")
_RATE_STEPS = 60


def main() -> None:
    arguments = _parser().parse_args()
    flags.FLAGS.mark_as_parsed()  # the processes that read data check this
    console, directory = progress.console(), pathlib.Path(arguments.directory)
    with cli.input_errors():
        names = _names(arguments.what)
        needed = dict.fromkeys(NEEDS[name] for name in names if NEEDS[name])
        local = _local(arguments.local)
        sweeps = [sweep(n, arguments.scale, local.get(n, local.get("", "")), arguments.seeds) for n in needed]
        for one in sweeps:
            check(cells_of(one), directory)
        if arguments.plan:
            rows = [plan(one, directory) for one in sweeps]
            console.print(progress.table("What would be run", rows) if rows else "No runs are needed.")
            return
        if sweeps and not arguments.report:
            prepare(cells_of(sweeps[0])[0].config())  # the data are there, and the config is right
        directory.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        cli.cache_compilations(directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        with helpers(arguments, directory):
            try:
                for one in sweeps:
                    run(one, directory, console)
            except loop.Preempted:
                console.print("Saved and stopped on SIGTERM: the same command goes on")
                sys.exit(cli.PREEMPTED)
    for path in written(names, sweeps, directory):
        console.print(path, highlight=False)
    failed = [cell for one in sweeps for cell in cells_of(one) if work.state(cell, directory) == "failed"]
    for cell in failed:
        console.print(f"Failed: {directory / cell.folder / work.FAILED}", style="red", highlight=False)
    if failed and not arguments.report:
        sys.exit(cli.DIVERGED)


def run(one: Sweep, directory: pathlib.Path, console: Console) -> None:
    """Run the cells of a sweep, and show progress."""
    cells, shown = cells_of(one), console if one.scale == "paper" else Console(quiet=True)
    started, mine = time.perf_counter(), 0
    with Live(console=console, auto_refresh=False) as live:
        live.update(progress.table(one.options["title"], counts(one, directory)), refresh=True)
        for cell, result in work.work(cells, directory, shown):
            mine += 1
            left = sum(work.state(c, directory) in ("started", "waiting") for c in cells)
            rate = (time.perf_counter() - started) / mine
            live.console.print(
                f"{cell.folder}: {result['metric_name']} {result['metric'] or float('nan'):.4f}, "
                f"{result['seconds']:.0f} s; {left} cells left, {left * rate / 60:.0f} min at this process's rate",
                highlight=False,
                soft_wrap=True,
            )
            live.update(progress.table(one.options["title"], counts(one, directory)), refresh=True)
        live.update(progress.table(one.options["title"], counts(one, directory)), refresh=True)


def counts(one: Sweep, directory: pathlib.Path) -> list[dict[str, Any]]:
    """How many cells of each variant are in each state."""
    states: dict[str, list[str]] = {}
    for cell in cells_of(one):
        states.setdefault(cell.variant, []).append(work.state(cell, directory))
    return [{"variant": name, **{s: each.count(s) for s in _STATES}} for name, each in states.items()]


def plan(one: Sweep, directory: pathlib.Path) -> dict[str, str]:
    """Cells and steps of a sweep, and hours at the rate of completed runs, or of a trial run."""
    cells = cells_of(one)
    left = [cell for cell in cells if work.state(cell, directory) != "done"]
    done = [result for cell in cells if (result := result_of(cell, directory)) is not None]
    row = {"sweep": one.folder, "cells": str(len(cells)), "left": str(len(left))}
    try:
        setup = prepare(left[0].config() if left else cells[0].config())
    except (FileNotFoundError, ValueError) as error:
        return row | {"steps each": "?", "hours left": f"not here: {error}"}
    steps = setup.config.steps
    if done:
        seconds = float(np.median([result["seconds"] for result in done]))
    else:
        pruned = next((cell for cell in left if cell.block), left[0])
        seconds = steps / _rate(pruned)
    return row | {"steps each": f"{steps:,}", "hours left": f"{len(left) * seconds / 3600:.1f}"}


def _rate(cell: Cell) -> float:
    """Steps per second of a cell, measured on its first steps."""
    config = cell.config()
    config.update({"steps": _RATE_STEPS, "epochs": 0.0, "eval_every": _RATE_STEPS, "log_every": 10})
    rates: list[float] = []
    loop.train(program.compiled(prepare(config)), [cell.seed], loop.Hooks(on_row=lambda row: rates.append(row.rate)))
    return float(np.median(rates[1:-1]))


def written(names: Sequence[str], sweeps: Sequence[Sweep], directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Write the requested pages and pictures from the results so far."""
    by_name = {one.name: one for one in sweeps}
    for name in names:
        if name in SWEEPS:
            yield from page.write(by_name[name], directory)
            continue
        one = by_name.get(NEEDS[name])
        path = directory / (one.folder if one else "") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if one is None:
            figure = page.schedules()
        elif name == "figure3":
            figure = page.curves(one, directory)
        else:
            metrics = ["loss", "auc"] if name == "figure5" else [one.options["metric"]]
            figure = page.against_sparsity(one, directory, metrics)
        report.save_figure(path, figure)
        yield path


@contextlib.contextmanager
def helpers(arguments: argparse.Namespace, directory: pathlib.Path) -> Iterator[None]:
    """Start `--jobs` - 1 more processes of the same command that share the work and end with this one."""
    started = []
    for number in range(arguments.jobs):
        environment = {"CUDA_VISIBLE_DEVICES": str(number)} if arguments.jobs > 1 else {}
        if number == 0:
            os.environ.update(environment)  # before JAX looks for devices
            continue
        own = [f"--{name}={getattr(arguments, name)}" for name in ("scale", "seeds", "directory")]
        own += [f"--local={path}" for path in arguments.local]
        line = [sys.executable, "-m", "experiments.reproduce", *arguments.what, *own]
        with (directory / f"job{number}.log").open("ab") as log:
            started.append(subprocess.Popen(line, env=os.environ | environment, stdout=log, stderr=log))
    try:
        yield
        for process in started:
            process.wait()
    finally:
        for process in started:
            process.terminate()


def _names(asked: Sequence[str]) -> list[str]:
    for name in asked:
        registry.check(name, [*NEEDS, "all"], "what to reproduce")
    return [*TABLES, *FIGURES] if "all" in asked else list(dict.fromkeys(asked))


def _local(values: Sequence[str]) -> dict[str, str]:
    """The data path of each table; the empty name stands for all others."""
    found = {}
    for value in values:
        table, _, path = value.partition("=")
        alone = table in SWEEPS and bool(path)
        found[table if alone else ""] = path if alone else value
    return found


def _parser() -> argparse.ArgumentParser:
    description = __doc__ or ""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m experiments.reproduce", description=description, formatter_class=form)
    parser.add_argument("what", nargs="+", help=f"{', '.join(NEEDS)}, all")
    parser.add_argument("--scale", default="small", help="paper, small or smoke")
    local = "where the data are, for data sets read from files; TABLE=PATH for one table alone, may be repeated"
    parser.add_argument("--local", action="append", default=[], metavar="[TABLE=]PATH", help=local)
    parser.add_argument("--seeds", type=_whole, default=0, help="how many; 0: as many as the sweep says")
    parser.add_argument("--directory", default="runs/reproduce", help="where runs and pages go")
    parser.add_argument("--jobs", type=_whole, default=1, help="processes here, each with its own GPU if any")
    parser.add_argument("--plan", action="store_true", help="print cells, steps and hours without running anything")
    parser.add_argument("--report", action="store_true", help="write the results so far without running anything")
    return parser


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


if __name__ == "__main__":
    main()
