"""Is a pruned network better than a smaller dense one? The tables and the picture of `docs/worth_it.md`.

    python -m benchmarks.worth_it --local=path/to/fashion/mnist    # any number of these share the runs
    python -m benchmarks.worth_it --report                         # fills in the page

Most rows are from the sweeps of `experiments.reproduce` at scale `small`, of which `narrow`, the dense network with as
many weights as the pruned one, is a part. The first command adds a larger LeNet, pruned to the same number of weights.
"""

import argparse
import bisect
import functools
import json
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

import sa_plus_plus as sapp
from benchmarks import timing
from benchmarks.tables import filled, markdown
from configs.reproduce.scales import RECOMMENDED
from experiments import cli, tasks
from experiments.outputs import progress, report, workdir
from experiments.sweeps.cells import CAPPED, DENSE, NARROW, Cell
from experiments.sweeps.cells import sweep as get_sweep
from experiments.training import factories, loop, narrow, program
from experiments.training.setup import prepare, prepare_without_data
from experiments.utils import files

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "worth_it.md"
GRADUAL = "gradual magnitude, long sparse phase"
PRUNED = {"SA++": RECOMMENDED, "gradual magnitude": GRADUAL}
SMALLER = {"narrow": NARROW, "narrow, capped": CAPPED}
MISSING = "Not measured."
WIDTHS, CELLS, SEEDS = (1024, 512), ((8, 0.9),), (0, 1)  # of the larger LeNet


class Network(NamedTuple):
    """A network of the page.

    Attributes:
      title: on the page.
      results: its file in `benchmarks/results`.
      digits: after the point.
      aside: weights of embedding tables, which neither pruning nor narrowing changes; they are not counted.
    """

    title: str
    results: str
    digits: int
    aside: int = 0


NETWORKS = {
    "fashion": Network("LeNet-300-100, Fashion-MNIST: accuracy, %", "table1_small", 2),
    "bytes": Network("GPT on bytes: bits per byte", "bytes_small", 3),
    "clicks": Network("click network, planted features: loss", "table2_small", 4, aside=39 * 200 * 10),
    "cifar10": Network("ResNet-20, CIFAR-10: accuracy, %", "cifar10_small", 2),
}


class Measured(NamedTuple):
    """The runs of one contender: weights it keeps, tables aside, and the values of its seeds."""

    weights: int
    values: np.ndarray

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


Found = Mapping[tuple[str, int, float], Measured]


def found_in(network: Network) -> tuple[bool, Found] | None:
    """Whether lower is better, and by variant, block and sparsity what was measured; None if there is no file."""
    path = timing.RESULTS / f"{network.results}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    lower = get_sweep(content["name"], content["scale"]).options["lower_is_better"]
    return lower, {
        (row["variant"], row["block"], row["sparsity"]): Measured(
            row["weights"] - network.aside, np.array(row["values"], float)
        )
        for row in content["rows"]
        if "weights" in row and None not in row["values"]
    }


def equal_dense(value: float, dense: Iterable[Measured], lower_is_better: bool) -> tuple[str, float]:
    """The number of weights with which a dense network is as good as a value: `=`, `<` or `>`, and the number.

    Between the networks measured it is interpolated against the logarithm of the number of weights; a larger network
    counts as at least as good as a smaller one.
    """
    sign = -1 if lower_is_better else 1
    curve = sorted((each.weights, sign * each.mean) for each in dense)
    weights, best = np.log([w for w, _ in curve]), np.maximum.accumulate([v for _, v in curve])
    if sign * value < best[0]:
        return "<", float(np.exp(weights[0]))
    if sign * value > best[-1]:
        return ">", float(np.exp(weights[-1]))
    i = max(1, int(np.searchsorted(best, sign * value)))
    share = (sign * value - best[i - 1]) / (best[i] - best[i - 1]) if best[i] > best[i - 1] else 0.0
    return "=", float(np.exp(weights[i - 1] + share * (weights[i] - weights[i - 1])))


def rows_of(network: Network) -> list[dict[str, str]]:
    """The table of a network: a line for each block size and sparsity."""
    read = found_in(network)
    if read is None:
        return []
    lower, found = read
    dense = [each for (variant, *_), each in found.items() if variant in (DENSE, *SMALLER.values())]
    cells = dict.fromkeys((block, s) for variant, block, s in found if variant == RECOMMENDED)
    return [row for cell in cells if (row := _row(network, found, dense, *cell, lower))]


def _row(
    network: Network, found: Found, dense: list[Measured], block: int, sparsity: float, lower: bool
) -> dict[str, str]:
    smaller = [found[v, block, sparsity] for v in SMALLER.values() if (v, block, sparsity) in found]
    if not smaller:
        return {}
    pruned, digits = found[RECOMMENDED, block, sparsity], network.digits
    best = _best(smaller, lower)
    there = {n: found[v, block, sparsity] for n, v in (PRUNED | SMALLER).items() if (v, block, sparsity) in found}
    sign, equal = equal_dense(pruned.mean, dense, lower)
    ratio = equal / pruned.weights
    return {
        "blocks": f"{block} × {block}, {sparsity:.0%}",
        "weights": f"{pruned.weights:,}",
        **{name: _mean_deviation(each.values, digits) for name, each in there.items()},
        "SA++ minus narrow": difference(pruned.values, best.values, digits, lower),
        "dense needs": f"{'' if sign == '=' else sign + ' '}{ratio:.1f} ×",
    }


def difference(pruned: np.ndarray, dense: np.ndarray, digits: int, lower_is_better: bool) -> str:
    """Mean difference by seed and its standard error, in bold where it exceeds two of them, with who is better then.

    With one seed, which decides nothing, the difference alone.
    """
    each = pruned - dense
    if len(each) == 1:
        return f"{each[0]:+.{digits}f}, {_UNDECIDED}"
    mean, error = each.mean(), each.std(ddof=1) / len(each) ** 0.5
    text = f"{mean:+.{digits}f} ± {error:.{digits}f}"
    if abs(mean) <= 2 * error:
        return f"{text}, level"
    return f"**{text}, {'pruned' if (mean < 0) == lower_is_better else 'narrow'}**"


def _mean_deviation(values: np.ndarray, digits: int) -> str:
    return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


def summary(rows: Sequence[Mapping[str, str]]) -> str:
    """How often which is ahead."""
    if all(row["SA++ minus narrow"].endswith(_UNDECIDED) for row in rows):
        return "One seed decides nothing."
    pruned, level, dense = (sum(row["SA++ minus narrow"].endswith(end) for row in rows) for end in _ENDINGS)
    return f"The pruned network is ahead in {pruned} of {len(rows)} cells, level in {level}, behind in {dense}."


_ENDINGS = ("pruned**", "level", "narrow**")
_UNDECIDED = "one seed"


def others_rows() -> list[dict[str, str]]:
    """Each algorithm and recipe against the narrow networks: cells in which it is ahead, level and behind."""
    lines: dict[str, dict[str, str]] = {}
    for network in NETWORKS.values():
        lower, found = found_in(network) or (False, {})
        verdicts: dict[str, list[str]] = {}
        for (variant, block, sparsity), each in found.items():
            smaller = [found[key] for v in SMALLER.values() if (key := (v, block, sparsity)) in found]
            if smaller and variant not in SMALLER.values() and len(each.values) > 1:
                verdicts.setdefault(variant, []).append(
                    difference(each.values, _best(smaller, lower).values, network.digits, lower)
                )
        for variant, texts in verdicts.items():
            counts = [str(sum(text.endswith(end) for text in texts)) for end in _ENDINGS]
            lines.setdefault(variant, {"pruned by": variant})[network.title.partition(": ")[0]] = ", ".join(counts)
    return list(lines.values())


def _best(each: Sequence[Measured], lower_is_better: bool) -> Measured:
    return (min if lower_is_better else max)(each, key=lambda one: one.mean)


class Job(NamedTuple):
    """All seeds of the larger LeNet, pruned to the number of weights that a cell of the sweep keeps."""

    block: int
    sparsity: float
    local: str = ""
    directory: str = "runs/worth_it"

    @property
    def file(self) -> pathlib.Path:
        return pathlib.Path(self.directory) / f"larger-{self.block}-{self.sparsity:g}" / workdir.RESULT

    def config(self) -> tuple[ml_collections.ConfigDict, int]:
        """Its config, with the lowest sparsity in thousandths that has no more weights, and their number."""
        config = Cell(get_sweep("table1", "small", self.local), RECOMMENDED, self.block, self.sparsity, 0).config()
        with config.unlocked():
            setup = prepare_without_data(config)
            most = narrow.cost(setup.task, plan=setup.plan)
            config.model_options.widths = WIDTHS
        config.sparsifier.min_blocks = 200  # the last layer stays whole, as in the usual LeNet: 128 blocks are too few
        task = prepare_without_data(config).task
        params = jax.eval_shape(task.init, jax.random.key(0))[0]

        def weights(kept: int) -> int:
            options = factories.plan_options(config.sparsifier)
            return narrow.cost(task, plan=sapp.plan(params, sparsity=1 - kept / 1000, **options))

        kept = bisect.bisect_right(range(1, 1000), most, key=weights)
        config.sparsifier.sparsity = 1 - kept / 1000
        return config, weights(kept)


def measure(job: Job) -> dict[str, Any]:
    """Train all seeds of a job side by side."""
    started = time.perf_counter()
    config, weights = job.config()
    setup = prepare(config, dataset=tasks.dataset_of(config.data))
    outcomes = loop.train(program.compiled(setup, len(SEEDS)), SEEDS)
    return {
        **{"block": job.block, "of": job.sparsity, "widths": list(WIDTHS), "sparsity": config.sparsifier.sparsity},
        **{
            "weights": weights,
            "seeds": list(SEEDS),
            "values": [round(100 * o.test["test_accuracy"], 2) for o in outcomes],
        },
        **{"seconds": round(time.perf_counter() - started, 1)},
    }


def larger_rows(larger: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table of the larger LeNet beside the usual one."""
    read = found_in(NETWORKS["fashion"])
    found = read[1] if read else {}
    rows = []
    for row in larger:
        usual, small = (found.get((v, row["block"], row["of"])) for v in (RECOMMENDED, CAPPED))
        values = np.array(row["values"], float)
        rows.append(
            {
                "blocks": f"{row['block']} × {row['block']}",
                "300-100, pruned": _beside(usual, len(values)),
                f"{'-'.join(map(str, row['widths']))}, pruned to {row['sparsity']:.1%}": _shown(row["weights"], values),
                "narrow, capped": _beside(small, len(values)),
            }
        )
    return rows


def _beside(each: Measured | None, seeds: int) -> str:
    return "-" if each is None else _shown(each.weights, each.values[:seeds])


def _shown(weights: int, values: np.ndarray) -> str:
    return f"{values.mean():.2f} ({weights:,} weights)"


def plot() -> Any:
    """Plot the metric against the number of weights, a panel for each network: dense by size, pruned by block size."""
    read = {network: result for network in NETWORKS.values() if (result := found_in(network)) is not None}
    fig, axes = plt.subplots(1, len(read), figsize=(5 * len(read), 4.2), layout="constrained", squeeze=False)
    for axis, (network, (lower, found)) in zip(axes[0], read.items(), strict=True):
        for i, variant in enumerate(SMALLER.values()):
            ours = [found[key] for key in found if key[0] in (variant, DENSE)]
            if len(ours) > 1:
                _line(axis, ours, marker="o", color=f"C{i}", label=variant)
        for i, block in enumerate(dict.fromkeys(b for v, b, _ in found if v == RECOMMENDED)):
            ours = [found[key] for key in found if key[:2] == (RECOMMENDED, block)]
            _line(axis, ours, marker="s", ls="--", color=f"C{i + 3}", label=f"pruned, {block} × {block}")
        name, _, metric = network.title.partition(": ")
        counted = "weights" + (" besides the embeddings" if network.aside else "")
        axis.set(title=name, xscale="log", xlabel=counted, ylabel=metric)
        if lower:
            axis.invert_yaxis()
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize="x-small")
    return fig


def _line(axis: Any, measured: Iterable[Measured], **style: Any) -> None:
    each = sorted(
        {(m.weights, m.mean, float(np.std(m.values, ddof=1)) if len(m.values) > 1 else 0.0) for m in measured}
    )
    x, y, spread = zip(*each, strict=True)
    axis.errorbar(x, y, spread, ms=4, lw=1, capsize=2, **style)


def tables(larger: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What goes between the marks of the page."""
    found = {name: rows_of(network) for name, network in NETWORKS.items()}
    told = {name: f"{markdown(rows)}\n\n{summary(rows)}" if rows else MISSING for name, rows in found.items()}
    return told | {"larger": markdown(larger_rows(larger)) if larger else MISSING, "others": markdown(others_rows())}


def summarise(jobs: list[Job]) -> None:
    """Write the file, the picture and the tables of the page."""
    larger = [json.loads(job.file.read_text()) for job in jobs if job.file.exists()]
    path = timing.RESULTS / "worth_it.json"
    if not larger and path.exists():  # measured elsewhere
        larger = json.loads(path.read_text())["larger"]
    elif larger:
        timing.save("worth_it", {"larger": larger})
    report.save_figure(path.with_suffix(".png"), plot())
    page = PAGE.read_text()
    for name, text in tables(larger).items():
        page = filled(page, name, text)
    files.write_text(PAGE, page)
    print(PAGE)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.worth_it", description=__doc__, formatter_class=form)
    parser.add_argument("--local", default="", help="directory with Fashion-MNIST's files; else TensorFlow Datasets")
    parser.add_argument("--directory", default="runs/worth_it", help="where the results of the runs go")
    parser.add_argument("--report", action="store_true", help="fill in the page instead of training")
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # the processes that read data check this
    jobs = [Job(*cell, arguments.local, arguments.directory) for cell in CELLS]
    if arguments.report:
        summarise(jobs)
        return
    pathlib.Path(arguments.directory).mkdir(parents=True, exist_ok=True)
    with cli.input_errors():
        tasks.dataset_of(jobs[0].config()[0].data)
    console = progress.console()
    while not all(job.file.exists() for job in jobs):
        for job in jobs:
            if (row := workdir.once(job.file.parent, functools.partial(measure, job))) is not None:
                console.print(f"{row['seconds']:>6} s  {row['block']} {row['of']}  {row['values']}", highlight=False)
        time.sleep(1)


if __name__ == "__main__":
    main()
