"""Train and prune one network.

    python -m experiments.main
    python -m experiments.main --config=configs/mnist.py --config.sparsifier.name=acdc --workdir=runs/acdc
    python -m experiments.main --config.init_from=runs/dense --config.sparsifier.recipe=finetune

Without flags it runs configs/mnist.py. The third command starts from the weights that a run has left in runs/dense. It
writes `result.json`, `metrics.jsonl`, `pruned.safetensors`, `run.png`, `tensorboard/` and `checkpoints/` to the work
directory, and `features.json` for feature selection (configs/feature_selection.py). The same command resumes an
interrupted run and ends with the same result as an uninterrupted one. Exit status: 0 done, 2 bad input, 3 diverged,
4 stopped by SIGTERM after saving, 5 disk full.
"""

import contextlib
import errno
import pathlib
import sys
import time
from collections.abc import Callable

import jax
from absl import flags
from rich.console import Console

import experiments
from experiments import cli
from experiments.outputs import hooks, progress, report, workdir
from experiments.training import checkpoint, loop, program
from experiments.training.setup import Setup, prepare
from experiments.utils import files

flags.declare_key_flag("config")  # for --help
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go. Default: a new directory under runs/.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete the run in the work directory and start over.")
_RESUME_CHANGED = flags.DEFINE_bool("resume_changed", False, "Resume even if the config differs from that of the run.")
_PROFILE = flags.DEFINE_bool("profile", False, "Write a JAX trace of a few steps to profile/ in the work directory.")


def main(argv: list[str]) -> None:
    del argv  # cli.run has refused any
    config, console = cli.CONFIG.value, progress.console()
    with contextlib.ExitStack() as stack:
        with cli.users_mistakes():
            setup = prepare(config)
            path = cli.workdir_path(_WORKDIR.value, f"{config.name}-{config.sparsifier.name}")
            if jax.process_index() == 0:
                stack.enter_context(workdir.claim(path))
                if _OVERWRITE.value:
                    workdir.clear(path)
                workdir.settle(path, config, _RESUME_CHANGED.value)
                workdir.settle_data(path, setup.fingerprint(), _RESUME_CHANGED.value)
        cli.cache_compilations(path.parent)
        progress.warn_of_short_phases({setup.config.sparsifier.name: setup.phases}, console)
        try:
            result = run(setup, path, console, _PROFILE.value, experiments.STARTED)
        except loop.Preempted as preempted:
            console.print(
                f"Saved after {preempted.step} steps on SIGTERM: the same command with --workdir={path} resumes"
            )
            sys.exit(cli.PREEMPTED)
        except checkpoint.NoIntactCheckpoint as error:
            cli.fail(str(error))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            rescue = f"make room, and the same command with --workdir={path} resumes from the last checkpoint"
            cli.fail(f"{error}: {rescue}", cli.DISK_FULL)
    if result["diverged"]:
        sys.exit(cli.DIVERGED)


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
    config = setup.given.copy_and_resolve_references()
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
    config, metric = setup.given, setup.task.metric
    with contextlib.ExitStack() as stack:
        saved = stack.enter_context(
            contextlib.closing(checkpoint.Checkpoints(path / workdir.CHECKPOINTS, keep=config.keep))
        )
        observer = hooks.Observer(path, title, setup.config.steps, metric, console, profile, setup.sparsifier.attention)
        stack.enter_context(observer)
        (outcome,) = loop.train(compiled(setup), [config.seed], observer.hooks, saved)
        rows = observer.rows
        last_saved = saved.latest
    result = report.result(config, outcome, metric) | {"startup_seconds": outcome.first_step_at - started}
    if outcome.diverged:
        result["diverged_at"] = {**rows[-1], "last_checkpoint": last_saved}
    if twin is not None:
        result["dense_twin"] = {"metric": twin["metric"], "loss": twin["loss"]}
    if jax.process_index() == 0:
        report.save_weights(path / workdir.WEIGHTS, outcome)
        heading = f"{config.name}: {config.sparsifier.name}, blocks {progress.sizes(config.sparsifier.block)}"
        report.plot_run(path / workdir.PICTURE, outcome, rows, metric, heading)
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
    if "dense_twin" in result:
        line += f"; the same network trained dense: {result['dense_twin']['metric']:.4f}"
    seconds, compiling = result["seconds"], result["compile_seconds"]
    if result["startup_seconds"] is None:  # the run was complete except for its report
        return line
    startup = f"first step done after {result['startup_seconds']:.1f} s, {compiling:.1f} s of them compiling"
    return f"{line}\n{result['steps']} steps in {seconds:.1f} s; {startup}"


if __name__ == "__main__":
    cli.run(main)
