"""ResNet-50 pruned, beside smaller dense networks: the table and picture of `docs/worth_it.md`.

    python -m benchmarks.serve_resnets --precisions=float32,int8
    python -m benchmarks.serve_resnets --precisions=float32,int8 --batches=1 --name=serve_resnets_avx2  # elsewhere
    python -m benchmarks.resnets     # fills in the page from the results of these

Accuracies are published ones; weights and multiply-adds are counted on our models; milliseconds are measured, of pruned
networks with as many blocks zeroed at random, since the time does not depend on which.
"""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib import pyplot as plt

from benchmarks import timing
from benchmarks.tables import filled, markdown
from configs import resnet50_block16
from experiments import models
from experiments.models import costs
from experiments.outputs import report
from experiments.sweeps.page import PAPER
from experiments.training import narrow
from experiments.training.setup import prepare_without_data
from experiments.utils import files

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "worth_it.md"
# https://docs.pytorch.org/vision/stable/models.html, weights IMAGENET1K_V1: top-1 accuracy on ImageNet, %.
TORCHVISION = {"ResNet18": 69.758, "ResNet34": 73.314, "ResNet50": 76.130, "MobileNetV2": 71.878}
BLOCK = 16
PRECISIONS, BATCHES = ("float32", "int8"), (1, 32)
RESULTS = {"Zen 5": "serve_resnets.json", "AVX2": "serve_resnets_avx2.json"}  # by processor
Rows = Sequence[Mapping[str, Any]]
# Networks of about equal accuracy, by their names: the pruned one, and a dense one.
PAIRS = tuple(
    (f"ResNet-50, {BLOCK} × {BLOCK}, {sparsity}", f"dense {dense}")
    for sparsity, dense in (("80%", "ResNet-34"), ("90%", "ResNet-18"), ("90%", "MobileNetV2"))
)


class Network(NamedTuple):
    """A network of the table.

    Attributes:
      name: as in the table.
      top1: published accuracy, in percent.
      architecture: one of `TORCHVISION`.
      sparsity: of its blocks; 0 for a dense network.
    """

    name: str
    top1: float
    architecture: str
    sparsity: float = 0.0


def networks() -> list[Network]:
    """Torchvision's dense networks and the paper's pruned ResNet-50, the best first."""
    found = [Network(f"dense {name.replace('ResNet', 'ResNet-')}", x, name) for name, x in TORCHVISION.items()]
    table = PAPER["table1"]
    for sparsity, top1 in zip(table["sparsities"], table["values"]["SA++"][str(BLOCK)], strict=True):
        found.append(Network(f"ResNet-50, {BLOCK} × {BLOCK}, {sparsity:.0%}", top1, "ResNet50", sparsity))
    return sorted(found, key=lambda network: -network.top1)


def measured(processor: str) -> list[dict[str, Any]]:
    """The rows of `benchmarks.serve_resnets` on a processor."""
    return list(json.loads((timing.RESULTS / RESULTS[processor]).read_text())["rows"])


def fastest(found: Rows, name: str, batch: int, precision: str) -> Mapping[str, Any] | None:
    """The row of the fastest engine, ours included, that serves a network; None if none was measured."""
    mine = [row for row in found if (row["network"], row["batch"], row["precision"]) == (name, batch, precision)]
    return min(mine, key=lambda row: row["ms"]["median"], default=None)


def cost(network: Network) -> tuple[int, int]:
    """Weights, and multiply-adds for an image of 224 × 224 pixels."""
    if network.sparsity:
        config = resnet50_block16.get_config()
        config.sparsifier.sparsity = network.sparsity
        setup = prepare_without_data(config)
        weights, operations = (narrow.cost(setup.task, equal, setup.plan) for equal in narrow.EQUAL)
        return weights, operations
    model = getattr(models, network.architecture)(classes=1000)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return weights, sum(costs.multiply_adds(model, variables, image).values())


def timed(found: Rows, name: str) -> dict[str, str]:
    """Columns of milliseconds in the fastest engine: median and quartiles."""
    columns = {}
    for batch, precision in itertools.product(BATCHES, PRECISIONS):
        if any(row["batch"] == batch for row in found):
            row = fastest(found, name, batch, precision)
            digits = 1 if batch == 1 else 0
            text = f"{{median:.{digits}f}} [{{q25:.{digits}f}}, {{q75:.{digits}f}}] {{engine}}"
            shown = text.format(engine=row["engine"].split()[0], **row["ms"]) if row else "-"
            columns[f"ms, batch {batch}, {precision}"] = shown
    return columns


def rows(every: Sequence[Network], found: Rows) -> list[dict[str, str]]:
    """The table of all networks."""
    lines = []
    for network in every:
        weights, operations = cost(network)
        about = {"network": network.name, "top-1, %": f"{network.top1:.1f}"}
        about |= {"M weights": f"{weights / 1e6:.1f}", "G multiply-adds": f"{operations / 1e9:.2f}"}
        lines.append(about | timed(found, network.name))
    return lines


def together(found: Rows) -> list[dict[str, str]]:
    """The table of the networks that took turns."""
    top1 = {network.name: network.top1 for network in networks()}
    names = dict.fromkeys(row["network"] for row in found)
    return [{"network": name, "top-1, %": f"{top1[name]:.1f}"} | timed(found, name) for name in names]


def against(by_processor: Mapping[str, Rows]) -> list[dict[str, str]]:
    """How many times as fast the pruned networks are as dense ones of about their accuracy, by round."""
    lines = []
    for (pruned, dense), (processor, found) in itertools.product(PAIRS, by_processor.items()):
        line = {"pruned": pruned, "against": dense, "processor": processor}
        for batch, precision in itertools.product(BATCHES, PRECISIONS):
            slow, fast = (fastest(found, name, batch, precision) for name in (dense, pruned))
            ratio = "{median:.2f} [{q25:.2f}, {q75:.2f}]"
            shown = ratio.format(**timing.spread(np.divide(slow["rounds"], fast["rounds"]))) if slow and fast else "-"
            line[f"batch {batch}, {precision}"] = shown
        lines.append(line)
    return lines


def _kind(network: Network) -> bool | None:
    """Whether a ResNet is pruned; None for other networks."""
    return bool(network.sparsity) if network.architecture.startswith("ResNet") else None


def plot(every: Sequence[Network], found: Rows) -> Any:
    """Accuracy against milliseconds, a panel for each precision, one image."""
    fig, axes = plt.subplots(1, len(PRECISIONS), figsize=(9, 3.8), layout="constrained", sharey=True)
    for axis, precision in zip(axes, PRECISIONS, strict=True):
        for label, pruned, style in (
            ("dense ResNets, in the fastest engine", False, "o-"),
            ("another dense network, likewise", None, "^"),
            ("ResNet-50, pruned; timed with zeros at random", True, "s--"),
        ):
            fast = [(fastest(found, n.name, 1, precision), n) for n in every if _kind(n) == pruned]
            points = [(row["ms"]["median"], n) for row, n in fast if row]
            axis.plot([ms for ms, _ in points], [n.top1 for _, n in points], style, label=label)
            for ms, n in points:
                text = f"{n.sparsity:.0%}" if pruned else n.name.removeprefix("dense ")
                axis.annotate(text, (ms, n.top1), (5, -11 if not pruned else 5), textcoords="offset points", fontsize=8)
        axis.set(title=precision, xlabel="ms for one image, 224 × 224", xlim=(0, 1.25 * axis.dataLim.xmax))
        axis.grid(alpha=0.3)
        axis.margins(y=0.1)
    axes[0].set_ylabel("published top-1 in float32, %")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    fig.suptitle(
        f"ResNet-50 in blocks of {BLOCK} × {BLOCK} beside smaller dense networks, two cores of an EPYC (Zen 5)"
    )
    return fig


def main() -> None:
    every, page = networks(), PAGE.read_text()
    found = {processor: measured(processor) for processor in RESULTS}
    first, second = found.values()
    lines = {"resnet50": rows(every, first), "resnets together": together(second), "resnets against": against(found)}
    for name, each in lines.items():
        page = filled(page, name, markdown(each))
    files.write_text(PAGE, page)
    report.save_figure(timing.RESULTS / "resnets.png", plot(every, first))
    print(PAGE)


if __name__ == "__main__":
    main()
