"""Pruning without training against further training: MNIST digits, bytes and CIFAR-10, from dense networks.

    python -m benchmarks.one_shot --cifar=path/to/cifar10.tar
    python -m benchmarks.one_shot --report

For each seed a dense network is trained, and pruned by every method at each block size and sparsity: as it is, with the
remaining weights adjusted, and with sparsities by sensitivity at equal numbers of weights. For comparison, from the
same trained weights in a tenth of the steps: SequentialAttention++, and fine-tuning after `obs`. Each network, seed and
block size has a directory in `--directory`, locked while it is measured: several processes may share the work. Writes
benchmarks/results/one_shot.json and .png.
"""

import functools
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app, flags
from matplotlib import pyplot as plt

from benchmarks import timing
from configs import bytes_gpt, cifar10_resnet20, mnist
from experiments import cli, data, one_shot, tasks
from experiments.data.sources import Arrays
from experiments.one_shot import Variant
from experiments.outputs import progress, report, workdir
from experiments.training import loop, program, trained
from experiments.training.setup import prepare

_DIRECTORY = flags.DEFINE_string("directory", "runs/one_shot_evidence", "Where networks and rows go.")
_CIFAR = flags.DEFINE_string("cifar", "", "Tar file of CIFAR-10's images; empty for TensorFlow Datasets.")
_NETWORKS = flags.DEFINE_list("networks", ["mnist", "bytes", "cifar"], "Networks.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds, of networks and of the order of the data.")
_REPORT = flags.DEFINE_bool("report", False, "Make the table and the picture instead of measuring.")
SPARSITIES = (0.5, 0.7, 0.8, 0.9)
CALIBRATION = {"mnist": 500, "bytes": 256, "cifar": 256}  # examples
BLOCKS = {"mnist": (4, 8, 16), "bytes": (8, 16), "cifar": (8,)}
TRAINED_AT = {"mnist": SPARSITIES, "bytes": SPARSITIES, "cifar": (0.8, 0.9)}  # where it takes long
TEST_IMAGES = 2000  # a sample of CIFAR-10's
VARIANTS = (
    *(Variant("magnitude"), Variant("magnitude", refit=True), Variant("wanda"), Variant("wanda", refit=True)),
    *(Variant("obs"), Variant("alps"), Variant("magnitude", refit=True, budget=True), Variant("obs", budget=True)),
)
TUNED, SEARCHED = "obs, then a tenth", "SA++, a tenth"


class Job(NamedTuple):
    """The unit of work of one process."""

    network: str
    seed: int
    block: int

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(_DIRECTORY.value) / f"{self.network}-{self.seed}-{self.block}"


def config_of(network: str, seed: int) -> ml_collections.ConfigDict:
    """The config for training a dense network."""
    config = {"mnist": mnist, "bytes": bytes_gpt, "cifar": cifar10_resnet20}[network].get_config()
    config.seed = seed
    if network == "bytes":
        config.model_options.update({"width": 128, "hidden": 512})
        config.data.options.held_out = 0.004
        config.steps = 1000
    if network == "cifar":
        config.data.local = _CIFAR.value
        config.steps, config.optimizer.warmup_steps = 1000, 100
    if network != "mnist":
        config.sparsifier.min_blocks = 20
    config.eval_every = config.log_every = config.steps
    return config


@functools.cache
def dataset(network: str) -> data.Dataset:
    """A network's data, with a sample of the test images for CIFAR-10."""
    whole = tasks.dataset_of(config_of(network, 0).data)
    if network != "cifar":
        return whole
    chosen = np.random.default_rng(0).choice(len(whole.test), TEST_IMAGES, replace=False)
    return whole._replace(test=Arrays(whole.test.gather(np.sort(chosen))))


def dense_network(network: str, seed: int) -> pathlib.Path:
    """The file of a dense network, which is trained if the file does not exist yet."""
    folder = pathlib.Path(_DIRECTORY.value) / f"{network}-{seed}"
    with workdir.claim(folder):
        if not (file := folder / "pruned.safetensors").exists():
            config = config_of(network, seed)
            config.sparsifier.name = "dense"
            (outcome,) = loop.train(program.compiled(prepare(config, dataset=dataset(network))), [seed])
            report.save_weights(file, outcome)
    return file


def measure(job: Job) -> Iterator[dict[str, Any]]:
    """Rows of a network, seed and block size."""
    config = config_of(job.network, job.seed)
    config.sparsifier.block = (job.block, job.block)
    file = dense_network(job.network, job.seed)
    network = trained.read(config, str(file), "the dense network", dataset(job.network))
    test, metric = network.tester(), network.setup.task.metric
    calibration = network.calibration(CALIBRATION[job.network])

    def row(variant: str, sparsity: float, means: dict[str, float], **more: Any) -> dict[str, Any]:
        cell = {**job._asdict(), "variant": variant, "sparsity": sparsity}
        return {**cell, "metric": round(means[metric], 5), "loss": round(means["loss"], 5), **more}

    yield row("dense", 0.0, test(network.params))
    for variant in VARIANTS:
        started = time.perf_counter()
        found = one_shot.sensitivity(network, variant, SPARSITIES, calibration) if variant.budget else None
        measuring = time.perf_counter() - started
        for sparsity in SPARSITIES:
            started, own = time.perf_counter(), {}
            if found:
                own = {"overrides": one_shot.as_uniform(found, found.weights(), sparsity).overrides}
            pruned = one_shot.prune(network, variant, sparsity, calibration, **own)
            seconds = time.perf_counter() - started + measuring
            error = float(np.mean([layer.error for layer in pruned.layers]))
            again = network.recalibrated(pruned.params, calibration)
            means = test(pruned.params, again.model_state)
            yield row(str(variant), sparsity, means, error=round(error, 5), seconds=round(seconds, 2))
            if variant == Variant("obs") and sparsity in TRAINED_AT[job.network]:
                start = job.folder / f"obs-{sparsity}.safetensors"
                again.save(start, pruned.params, pruned.plan)
                outcome = trained.finetuned(*_tenth(config, sparsity, start), dataset(job.network))
                yield row(TUNED, sparsity, _means(outcome), seconds=round(outcome.seconds, 2))
    for sparsity in TRAINED_AT[job.network]:
        outcome = searched(*_tenth(config, sparsity, file), job)
        yield row(SEARCHED, sparsity, _means(outcome), seconds=round(outcome.seconds, 2))


def searched(config: ml_collections.ConfigDict, start: pathlib.Path, steps: int, job: Job) -> loop.Outcome:
    """SequentialAttention++ from trained weights."""
    config.update({"init_from": str(start), "steps": steps, "eval_every": steps, "log_every": steps})
    config.optimizer.update({"warmup_steps": 0, "warmup_epochs": 0.0})
    config.sparsifier.update({"name": "sequential_attention", "recipe": "finetune"})
    (outcome,) = loop.train(program.compiled(prepare(config, dataset=dataset(job.network))), [job.seed])
    return outcome


def _tenth(
    config: ml_collections.ConfigDict, sparsity: float, start: pathlib.Path
) -> tuple[ml_collections.ConfigDict, pathlib.Path, int]:
    config = config.copy_and_resolve_references()
    config.sparsifier.sparsity = sparsity
    return config, start, config.steps // 10


def _means(outcome: loop.Outcome) -> dict[str, float]:
    return {name.removeprefix("test_"): value for name, value in outcome.test.items()}


def jobs() -> list[Job]:
    return [
        Job(network, seed, block)
        for seed in range(_SEEDS.value)
        for network in _NETWORKS.value
        for block in BLOCKS[network]
    ]


def done(job: Job) -> list[dict[str, Any]] | None:
    """Do a job, unless it is done or another process is at it."""

    def rows() -> list[dict[str, Any]]:
        found = []
        for row in measure(job):
            found.append(row)
            print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        return found

    return workdir.once(job.folder, rows)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Mean and standard deviation over seeds: one line per network, block size and variant, one column per sparsity."""
    lines = []
    for network, block, variant in dict.fromkeys((r["network"], r["block"], r["variant"]) for r in rows):
        mine = [r for r in rows if (r["network"], r["block"], r["variant"]) == (network, block, variant)]
        columns = (0.0,) if variant == "dense" else SPARSITIES
        cells = {s: _mean_std([r["metric"] for r in mine if r["sparsity"] == s]) for s in columns}
        shown = {f"{s:.0%}": cells.get(s, "") for s in SPARSITIES}
        if variant == "dense":
            shown = {f"{s:.0%}": cells[0.0] if i == 0 else "" for i, s in enumerate(SPARSITIES)}
        errors = [r["error"] for r in mine if "error" in r and r["sparsity"] == 0.8]
        about = {"network": f"{network}, {block} × {block}", "variant": variant}
        seconds = f"{np.mean([r['seconds'] for r in mine]):.1f}" if "seconds" in mine[0] else ""
        lines.append({**about, **shown, "error at 80%": f"{np.mean(errors):.3f}" if errors else "", "s": seconds})
    return lines


def _mean_std(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=min(1, len(values) - 1)):.4f}" if values else "-"


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plot the metric against sparsity, mean and spread over seeds: one panel per network and block size."""
    panels = list(dict.fromkeys((row["network"], row["block"]) for row in rows))
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != "dense"]
    columns = max(len(BLOCKS[network]) for network, _ in panels)
    lines = list(dict.fromkeys(network for network, _ in panels))
    fig, axes = plt.subplots(len(lines), columns, figsize=(5 * columns, 3.6 * len(lines)), layout="constrained")
    axes = np.reshape(axes, (len(lines), columns))
    for axis in axes.ravel():
        axis.set_axis_off()
    for network, block in panels:
        axis = axes[lines.index(network), BLOCKS[network].index(block)]
        axis.set_axis_on()
        here = [row for row in rows if (row["network"], row["block"]) == (network, block)]
        axis.axhline(np.mean([r["metric"] for r in here if r["variant"] == "dense"]), color="black", ls=":", lw=0.8)
        for i, name in enumerate(names):
            x = sorted({row["sparsity"] for row in here if row["variant"] == name})
            values = [[r["metric"] for r in here if (r["variant"], r["sparsity"]) == (name, s)] for s in x]
            spread = [np.std(v, ddof=min(1, len(v) - 1)) for v in values]
            style = "s:" if name in (TUNED, SEARCHED) else "o-"
            axis.errorbar(
                *(np.array(x) * 100, [np.mean(v) for v in values], spread),
                **{"fmt": style, "ms": 3, "lw": 1, "capsize": 2, "color": f"C{i}", "label": name},
            )
        metric = "bits per byte, lower is better" if network == "bytes" else "test accuracy"
        axis.set(title=f"{network}, blocks {block} × {block}", xlabel="sparsity, %", ylabel=metric)
        if network == "bytes":
            axis.set_ylim(top=min(axis.get_ylim()[1], 8))
    axes[0, 0].legend(fontsize="x-small")
    return fig


def main(argv: list[str]) -> None:
    del argv
    console = progress.console()
    if not _REPORT.value:
        cli.cache_compilations(pathlib.Path(_DIRECTORY.value))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for job in jobs():
            done(job)
    found = [job.folder / workdir.RESULT for job in jobs()]
    rows = [row for file in found if file.exists() for row in json.loads(file.read_text())]
    if missing := sum(not file.exists() for file in found):
        console.print(f"{missing} of {len(found)} cells are not done yet", style="yellow")
    settings = {network: {"calibration": CALIBRATION[network]} for network in _NETWORKS.value}
    timing.save("one_shot", {"seeds": _SEEDS.value, "networks": settings, "rows": rows})
    console.print(progress.table("Pruned without training: test metric", summary(rows)))
    report.save_figure(timing.RESULTS / "one_shot.png", plot(rows))


if __name__ == "__main__":
    app.run(main)
