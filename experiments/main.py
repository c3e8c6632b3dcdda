"""Train and prune one network.

    python -m experiments.main
    python -m experiments.main --config=configs/mnist.py --config.sparsifier.name=acdc --workdir=runs/acdc

Without flags it runs configs/mnist.py. The work directory gets `result.json`, `metrics.jsonl`, `pruned.safetensors`
and `run.png`. Exit status: 0 done, 2 bad input, 3 diverged.
"""

import json
import pathlib
import sys

import ml_collections
from absl import flags
from rich.console import Console

from experiments import cli, progress, report, train

DIVERGED = 3  # exit status
flags.declare_key_flag("config")  # for --help
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go. Default: a new directory under runs/.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the results that the work directory holds.")


def main(argv: list[str]) -> None:
    del argv  # cli.run has refused any
    config, console = cli.CONFIG.value, progress.console()
    with cli.users_mistakes():
        train.check(config)
        workdir = cli.prepare_workdir(
            _WORKDIR.value, f"{config.name}-{config.sparsifier.name}", report.RESULT, _OVERWRITE.value
        )
    if run(config, workdir, console):
        sys.exit(DIVERGED)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, console: Console) -> bool:
    """One run, with its dense twin if the config asks for it; returns whether it diverged."""
    metric = train.task_of(config).metric
    name = config.sparsifier.name
    twin = None
    if config.dense_twin and name != "dense":
        dense = config.copy_and_resolve_references()
        dense.sparsifier.name = "dense"
        with progress.Live("dense twin", config.steps, metric, console) as live:
            (twin,) = train.train(train.compiled(dense), [config.seed], live)
    with (
        (workdir / "metrics.jsonl").open("w") as file,
        progress.Live(name, config.steps, metric, console) as live,
    ):

        def on_row(row: train.Row) -> None:
            live(row)
            file.write(json.dumps(report.finite(train.row_of_seed(row, 0))) + "\n")
            file.flush()

        (outcome,) = train.train(train.compiled(config), [config.seed], on_row)
    result = report.result(config, outcome, metric)
    if twin is not None:
        result["dense_twin"] = {"metric": twin.test[f"test_{metric}"], "loss": twin.test["test_loss"]}
    report.save_weights(workdir / "pruned.safetensors", outcome)
    title = f"{config.name}: {name}, blocks {'×'.join(map(str, config.sparsifier.block))}"
    report.plot_run(workdir / "run.png", outcome, metric, title)
    report.write_json(workdir / report.RESULT, result)  # last: where it stands, the run is complete
    console.print(progress.table("Layers", [_layer_cells(row) for row in result["layers"]]))
    console.print(_summary(result), highlight=False)
    console.print(f"In {workdir}: {', '.join(sorted(p.name for p in workdir.iterdir()))}", highlight=False)
    if outcome.diverged:
        console.print(f"[red]Diverged[/] before step {result['steps']}: lower config.optimizer.learning_rate")
    return outcome.diverged


def _layer_cells(row: dict) -> dict[str, str | int]:
    return {
        "layer": row["path"],
        "shape": "×".join(map(str, row["shape"])),
        "block": "-" if row["why_not"] else "×".join(map(str, row["block"])),
        "blocks kept": "-" if row["why_not"] else f"{row['kept']:,} / {row['blocks']:,}",
        "weights": f"{row['weights']:,}",
        "nonzero": f"{row['nonzero']:,}",
        "sparsity": row["why_not"] or f"{1 - row['nonzero'] / row['weights']:.2%}",
    }


def _summary(result: dict) -> str:
    line = f"{result['metric_name']}: {result['metric']:.4f} at {result['real_sparsity']:.2%} sparsity of all kernels"
    if "dense_twin" in result:
        line += f"; the same network trained dense: {result['dense_twin']['metric']:.4f}"
    seconds, compiling = result["seconds"], result["compile_seconds"]
    return f"{line}\n{result['steps']} steps in {seconds:.1f} s, after {compiling:.1f} s compiling"


if __name__ == "__main__":
    cli.run(main)
