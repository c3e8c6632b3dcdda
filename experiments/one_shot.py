"""Prune a trained network without training, by each method and to each sparsity, and optionally fine-tune it.

    python -m experiments.main --config=configs/mnist.py --config.sparsifier.name=dense --workdir=runs/dense
    python -m experiments.one_shot --config=configs/mnist.py --weights=runs/dense --sparsities=0.5,0.8,0.9
    python -m experiments.one_shot --config=configs/mnist.py --weights=runs/dense --budget=weights --finetune=160

For each network it shows the metric on the test set, the file size, the milliseconds of the specialised network beside
those of the dense one, and the seconds that pruning took. Batch-norm averages are estimated again for each. Blocks
follow `config.sparsifier`: its block, min_blocks, include, overrides and views. `--refit` adds variants of `magnitude`
and `wanda` with adjusted weights; `--budget` adds, for each method, a sparsity per layer from its sensitivity, at the
total cost of one sparsity for all layers.
It writes `one_shot.json`, `one_shot.png`, the pruned networks in `networks`, and with a budget the sensitivity of each
layer as a table and a picture to the work directory.
"""

import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from matplotlib import pyplot as plt
from rich.console import Console

import sa_plus_plus as sapp
from experiments import cli, tasks
from experiments.outputs import progress, report, workdir
from experiments.training import factories, trained
from experiments.training.trained import Trained
from experiments.utils import files, registry, timing
from sa_plus_plus.timing import alternate

flags.declare_key_flag("config")  # for --help
METHODS = ("magnitude", "wanda", "obs", "alps")
REFITTED = ("magnitude", "wanda")  # methods whose weights `refit` changes
COSTS = ("weights", "multiply_adds", "milliseconds")
_WEIGHTS = flags.DEFINE_string("weights", "", "Trained weights: a run's directory, a checkpoint or a safetensors file.")
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.5", "0.7", "0.8", "0.9"], "Sparsities.")
_METHODS = flags.DEFINE_list("methods", list(METHODS), "Methods.")
_REFIT = flags.DEFINE_bool("refit", False, "Add magnitude and wanda with the remaining weights adjusted.")
_BUDGET = flags.DEFINE_enum("budget", "", ["", *COSTS], "Add a sparsity per layer, at equal cost of this kind.")
_CALIBRATION = flags.DEFINE_integer("calibration", 500, "Number of training examples for calibration.", lower_bound=1)
_FINETUNE = flags.DEFINE_integer("finetune", 0, "Steps of fine-tuning for each pruned network.", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch", 1, "Batch size for timing.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go. Default: a new directory under runs/.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the results that the work directory holds.")
RESULT, NETWORKS = "one_shot.json", "networks"
_ROUNDS = 5


class Variant(NamedTuple):
    """A way to prune: method, whether weights are adjusted afterwards, and whether each layer has its own sparsity."""

    method: str
    refit: bool = False
    budget: bool = False

    def __str__(self) -> str:
        return self.method + ", refit" * self.refit + ", budget" * self.budget


def main(argv: list[str]) -> None:
    del argv  # cli.run has refused any
    console, config = progress.console(), cli.CONFIG.value
    with cli.input_errors():
        sparsities = _sparsities()
        variants = list(_variants())
        if not _WEIGHTS.value:
            raise ValueError("--weights is needed: what a run with --config.sparsifier.name=dense has left")
        path = cli.workdir_path(_WORKDIR.value, f"{config.name}-one-shot")
        if (path / RESULT).exists() and not _OVERWRITE.value:
            raise FileExistsError(f"{path} holds results: choose another --workdir or pass --overwrite")
        network = trained.read(config, _WEIGHTS.value, "--weights")
        for sparsity in sparsities:
            plan_of(network, sparsity)
        path.mkdir(parents=True, exist_ok=True)
    with workdir.claim(path):
        (path / NETWORKS).mkdir(exist_ok=True)
        cli.cache_compilations(path)
        rows = []
        for row in measure(network, variants, sparsities, path, console):
            rows.append(row)
            shown = "  ".join(f"{k} {v}" for k, v in _cells(row, network).items())
            console.print(shown, highlight=False, soft_wrap=True)
        content = {
            "metric_name": f"test_{network.setup.task.metric}",
            "calibration": _CALIBRATION.value,
            "batch": _BATCH.value,
            "finetune_steps": _FINETUNE.value,
            "budget": _BUDGET.value,
            "rows": rows,
            "versions": report.versions(),
            "config": config.to_dict(),
        }
        files.write_json(path / RESULT, content)
        title = f"{config.name}, {config.model}, blocks {progress.sizes(config.sparsifier.block)}"
        report.save_figure(path / "one_shot.png", plot(rows, network, title))
        console.print(progress.table(title, [_cells(row, network) for row in rows]))
    written = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    console.print(f"In {path}: {', '.join(written)}", highlight=False)


def plan_options(network: Trained) -> dict[str, Any]:
    """The options of `sapp.plan` besides the sparsity, from the config."""
    return factories.plan_options(network.setup.config.sparsifier)


def plan_of(network: Trained, sparsity: float) -> sapp.Plan:
    """The plan at a sparsity.

    Raises:
      ValueError: as `sapp.plan` does.
    """
    return sapp.plan(network.params, sparsity=sparsity, **plan_options(network))


def prune(network: Trained, variant: Variant, sparsity: float, calibration: Sequence[Any], **changed: Any) -> Any:
    """`sapp.one_shot` on the task's outputs; `changed` replaces options of the plan."""
    how: dict[str, Any] = {"method": variant.method, "refit": variant.refit, "sparsity": sparsity}
    return sapp.one_shot(
        network.outputs, network.params, [(b,) for b in calibration], **how, **plan_options(network) | changed
    )


def sensitivity(
    network: Trained, variant: Variant, sparsities: Sequence[float], calibration: Sequence[Any]
) -> sapp.Sensitivity:
    """Sensitivity of the mean loss on the calibration data, at these sparsities and the default ones."""
    steps = sorted({*sparsities, *sapp.SPARSITIES})
    how: dict[str, Any] = {"method": variant.method, "refit": variant.refit, "sparsities": steps}
    data = [((b,), ()) for b in calibration]
    return sapp.sensitivity(
        network.outputs, network.params, data, lambda y, _: y["loss"], **how, **plan_options(network)
    )


def as_uniform(found: sapp.Sensitivity, costs: Any, sparsity: float) -> sapp.Budget:
    """The budget at which the layers cost as much as with one sparsity for all."""
    column = found.sparsities.index(sparsity)
    return sapp.budget(found, costs, limit=float(sum(row[column] for row in costs.values())))


def measure(
    network: Trained, variants: Sequence[Variant], sparsities: Sequence[float], path: pathlib.Path, console: Console
) -> Iterator[dict[str, Any]]:
    """A row for the dense network, and one for each variant at each sparsity."""
    config, metric = network.setup.config, network.setup.task.metric
    test, calibration = network.tester(), network.calibration(_CALIBRATION.value)
    x = jnp.asarray(tasks.random_inputs(network.setup.task, _BATCH.value))
    dense = network.served(network.params, x)

    def row(own: Trained, params: Any, plan: sapp.Plan, name: str, **about: Any) -> dict[str, Any]:
        means = test(params, own.model_state)
        served = own.served(params, x, plan=plan) if plan.sparsity else dense
        file = path / NETWORKS / f"{name}.safetensors"
        calls = {"dense": lambda: jax.block_until_ready(dense(x)), "pruned": lambda: jax.block_until_ready(served(x))}
        seconds = alternate(calls, _ROUNDS, at_least=0.05)
        return {
            **about,
            "metric": means[metric],
            "loss": means["loss"],
            "bytes": own.save(file, params, plan),
            "milliseconds": 1e3 * float(np.median(seconds["pruned"])),
            "dense_to_pruned": timing.spread(seconds["dense"] / seconds["pruned"]),
            "file": f"{NETWORKS}/{file.name}",
        }

    yield row(network, network.params, plan_of(network, 0.0), "dense", method="dense", sparsity=0.0)
    for variant in variants:
        if variant.budget:
            console.print(f"Sensitivity of each layer, {variant.method}", highlight=False)
            found = sensitivity(network, variant, sparsities, calibration)
            _keep(path, f"sensitivity-{_file_name(variant._replace(budget=False))}", found)
            costs = _costs(network, found, x)
        for sparsity in sparsities:
            started, own = time.perf_counter(), {}
            if variant.budget:
                own = {"overrides": as_uniform(found, costs, sparsity).overrides}
            pruned = prune(network, variant, sparsity, calibration, **own)
            taken = time.perf_counter() - started
            name = f"{_file_name(variant)}-{sparsity:g}"
            again = network.recalibrated(pruned.params, calibration)
            done = row(again, pruned.params, pruned.plan, name, method=str(variant), sparsity=sparsity)
            done |= {"seconds": taken, "layers": {layer.plan.path: _layer(layer) for layer in pruned.layers}}
            if _FINETUNE.value:
                done |= _trained_on(config, path / done["file"], sparsity, own, network, metric)
            yield done


def _costs(network: Trained, found: sapp.Sensitivity, x: jax.Array) -> Any:
    if _BUDGET.value != "milliseconds":
        return getattr(found, _BUDGET.value)()
    model, state = network.setup.task.model, network.model_state

    def serve(params: Any, x: jax.Array) -> Any:
        return model.apply({"params": params, **state}, x)

    return sapp.milliseconds(serve, network.params, found, x)


def _trained_on(
    config: ml_collections.ConfigDict, start: pathlib.Path, sparsity: float, own: Any, network: Trained, metric: str
) -> dict[str, Any]:
    """The metric after fine-tuning, and the file of that network."""
    config = config.copy_and_resolve_references()
    config.sparsifier.sparsity = sparsity
    with config.sparsifier.overrides.unlocked() as overrides:
        overrides.update(own.get("overrides", {}))
    outcome = trained.finetuned(config, start, _FINETUNE.value, network.setup.task.dataset)
    file = start.with_name(f"{start.stem}-finetuned.safetensors")
    report.save_weights(file, outcome)
    return {"finetuned_metric": outcome.test[f"test_{metric}"], "finetuned_file": f"{NETWORKS}/{file.name}"}


def _file_name(variant: Variant) -> str:
    return str(variant).replace(", ", "-")


def _layer(layer: Any) -> dict[str, Any]:
    return {"blocks": layer.plan.blocks, "kept": layer.kept, "error": layer.error}


def _keep(path: pathlib.Path, name: str, found: sapp.Sensitivity) -> None:
    files.write_text(path / f"{name}.txt", f"{found}\n")
    axes = found.plot()
    report.save_figure(path / f"{name}.png", axes.figure)


def _variants() -> Iterator[Variant]:
    """The variants selected by the flags."""
    if not _METHODS.value:
        raise ValueError(f"--methods is empty; give some of {', '.join(METHODS)}")
    for budget in (False, True) if _BUDGET.value else (False,):
        for method in dict.fromkeys(_METHODS.value):
            registry.check(method, METHODS, "--methods")
            yield Variant(method, budget=budget)
            if _REFIT.value and method in REFITTED:
                yield Variant(method, refit=True, budget=budget)


def _sparsities() -> list[float]:
    found = []
    for text in _SPARSITIES.value:
        try:
            found.append(float(text))
        except ValueError:
            raise ValueError(f"--sparsities has {text!r}, which is not a number") from None
        if not 0 < found[-1] < 1:
            raise ValueError(f"--sparsities must be in (0, 1), got {text}")
    if not found:
        raise ValueError("--sparsities is empty: give numbers with commas between them, or leave it out")
    return sorted(set(found))


def _cells(row: dict[str, Any], network: Trained) -> dict[str, str]:
    ratio = "{median:.2f} [{q25:.2f}, {q75:.2f}]"
    finetuned = {"fine-tuned": f"{row['finetuned_metric']:.4f}" if "finetuned_metric" in row else "-"}
    return {
        "method": row["method"],
        "sparsity": f"{row['sparsity']:.1%}",
        f"test {network.setup.task.metric}": f"{row['metric']:.4f}",
        **(finetuned if _FINETUNE.value else {}),
        "test loss": f"{row['loss']:.4f}",
        "kB": f"{row['bytes'] / 1e3:,.0f}",
        "ms": f"{row['milliseconds']:.3f}",
        "dense / pruned": ratio.format(**row["dense_to_pruned"]),
        "s": f"{row['seconds']:.1f}" if "seconds" in row else "-",
    }


def plot(rows: list[dict[str, Any]], network: Trained, title: str) -> Any:
    """Plot the metric against sparsity, size and milliseconds; one colour per method, dotted after fine-tuning."""
    task = network.setup.task
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", sharey=True)
    keys = {
        "sparsity, %": ("sparsity", 100),
        "kB": ("bytes", 1e-3),
        f"ms, batch of {_BATCH.value}": ("milliseconds", 1),
    }
    dense = rows[0]
    for i, name in enumerate(dict.fromkeys(row["method"] for row in rows[1:])):
        mine = [row for row in rows[1:] if row["method"] == name]
        for axis, (key, scale) in zip(axes, keys.values(), strict=True):
            x = [scale * row[key] for row in mine]
            axis.plot(x, [row["metric"] for row in mine], "o-", ms=4, lw=1, color=f"C{i}", label=name)
            if "finetuned_metric" in mine[0]:
                axis.plot(x, [row["finetuned_metric"] for row in mine], "s:", ms=3, lw=1, color=f"C{i}")
    for axis, (label, (key, scale)) in zip(axes, keys.items(), strict=True):
        axis.plot(scale * dense[key], dense["metric"], "k*", ms=9, label="dense")
        axis.axhline(dense["metric"], color="black", ls=":", lw=0.8)
        axis.set_xlabel(label)
    axes[0].set_ylabel(f"test {task.metric}" + (", lower is better" if task.lower_is_better else ""))
    axes[-1].legend(fontsize="x-small")
    fig.suptitle(title + (f"; dotted: after {_FINETUNE.value} steps of training" if _FINETUNE.value else ""))
    return fig


if __name__ == "__main__":
    cli.run(main)
