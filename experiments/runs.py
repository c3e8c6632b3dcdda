"""One run in a work directory: train, save, report; or resume it, or return its result if it is done."""

import contextlib
import pathlib
import time
from collections.abc import Callable

import jax
from rich.console import Console

from experiments.outputs import hooks, progress, report, workdir
from experiments.training import checkpoint, factories, loop, program
from experiments.training.setup import Setup, prepare
from experiments.utils import files


def run(
    setup: Setup,
    path: pathlib.Path,
    console: Console,
    profile: bool = False,
    started: float | None = None,
    compiled: Callable[[Setup], program.Program] = program.compiled,
) -> dict:
    """Do one run, after its dense twin if the config requests one.

    Args:
      setup: its parts.
      path: its directory.
      console: the screen.
      profile: whether to write a trace of a few steps.
      started: when the program began, on the clock of `time.perf_counter`; by default now.
      compiled: compiles a run, or finds it compiled for another seed.

    Returns:
      The content of its `result.json`.
    """
    twin, started = None, started or time.perf_counter()
    if setup.config.dense_twin and setup.config.sparsifier.name != "dense":
        twin_path = path / workdir.TWIN
        twin_path.mkdir(parents=True, exist_ok=True)
        twin = _one(_dense_twin(setup), twin_path, "dense twin", console, started, compiled)
        started = time.perf_counter()
    result = _one(setup, path, setup.config.sparsifier.name, console, started, compiled, twin, profile)
    if jax.process_index() == 0:
        _show(result, path, console)
    return result


def _dense_twin(setup: Setup) -> Setup:
    """The same run without pruning, on the same data."""
    config = setup.raw_config.copy_and_resolve_references()
    config.sparsifier.name, config.dense_twin = "dense", False
    return prepare(config, setup.mesh, setup.task.dataset)


def _one(
    setup: Setup,
    path: pathlib.Path,
    title: str,
    console: Console,
    started: float,
    compiled: Callable[[Setup], program.Program],
    twin: dict | None = None,
    profile: bool = False,
) -> dict:
    """Run or resume one network in one directory, or return its result if it is already done."""
    if (result := workdir.result_of(path)) is not None:
        return result
    config, metric = setup.raw_config, setup.task.metric
    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(
            contextlib.closing(checkpoint.Checkpoints(path / workdir.CHECKPOINTS, config.max_to_keep))
        )
        observer = hooks.Observer(path, title, setup.config.steps, metric, console, profile, setup.sparsifier.attention)
        stack.enter_context(observer)
        (outcome,) = loop.train(compiled(setup), [config.seed], observer.hooks, saved)
        rows = observer.rows
        last_saved = saved.latest
    result = report.result(config, outcome, metric) | {"startup_seconds": outcome.first_step_at - started}
    if config.sparsifier.name == factories.NARROW:
        result["narrowed"] = setup.narrowed
    if outcome.diverged:
        result["diverged_at"] = {**rows[-1], "last_checkpoint": last_saved}
    if outcome.reorderings:
        result["reordered"] = [{"step": each.step, "shares": each.shares} for each in outcome.reorderings]
    if twin is not None:
        result["dense_twin"] = {"metric": twin["metric"], "loss": twin["loss"]}
    if jax.process_index() == 0:
        report.save_weights(path / workdir.WEIGHTS, outcome)
        heading = f"{config.name}: {config.sparsifier.name}, blocks {progress.sizes(config.sparsifier.block)}"
        report.plot_run(path / workdir.PICTURE, outcome, rows, metric, heading)
        if outcome.reorderings:
            files.write_json(path / workdir.ORDERS, report.reorderings(outcome))
        if "features" in config and outcome.plan.pruned:
            files.write_json(path / workdir.FEATURES, report.chosen_features(outcome, setup.task.dataset.features))
        files.write_json(path / workdir.RESULT, result)  # last: this file marks the run as complete
    return files.finite(result)


def _show(result: dict, path: pathlib.Path, console: Console) -> None:
    console.print(progress.table("Layers", [_layer_cells(row) for row in result["layers"]]))
    if result["diverged"]:
        at = result["diverged_at"]
        rescue = (
            "no checkpoint" if at["last_checkpoint"] is None else f"last good checkpoint: step {at['last_checkpoint']}"
        )
        console.print(
            f"Diverged: the loss was not finite after step {at['step']}, in a {at['phase']} phase, at learning rate "
            f"{at['learning_rate']:.3g}; {rescue}. A lower config.optimizer.learning_rate may help.",
            style="red",
            highlight=False,
        )
    else:
        console.print(_summary(result), highlight=False)
    console.print(
        f"In {path}: {', '.join(sorted(p.name for p in path.iterdir() if p.name[0] != '.'))}", highlight=False
    )


def _layer_cells(row: dict) -> dict[str, str | int]:
    return {
        "layer": row["path"],
        "shape": progress.sizes(row["shape"]),
        "block": "-" if row["skip_reason"] else progress.sizes(row["block"]),
        "blocks kept": "-" if row["skip_reason"] else f"{row['kept']:,} / {row['blocks']:,}",
        "weights": f"{row['weights']:,}",
        "nonzero": f"{row['nonzero']:,}",
        "sparsity": row["skip_reason"] or f"{1 - row['nonzero'] / row['weights']:.2%}",
    }


def _summary(result: dict) -> str:
    line = f"{result['metric_name']}: {result['metric']:.4f} at {result['real_sparsity']:.2%} sparsity of all kernels"
    line += f", {result['kept_weights']:,} weights"
    if "dense_twin" in result:
        line += f"; the same network trained dense: {result['dense_twin']['metric']:.4f}"
    seconds, compiling = result["seconds"], result["compile_seconds"]
    if result["startup_seconds"] is None:  # the run was complete except for its report
        return line
    startup = f"first step done after {result['startup_seconds']:.1f} s, {compiling:.1f} s of them compiling"
    return f"{line}\n{result['steps']} steps in {seconds:.1f} s; {startup}"
