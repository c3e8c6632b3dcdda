"""ResNet-50 pruned, beside smaller dense networks: the table and picture of `docs/worth_it.md`.

    python -m benchmarks.serve_engines --network=resnet50 --batches=1,32 --blocks=16 --sparsities=0,0.8,0.9
    python -m benchmarks.serve_engines --network=resnet34 --batches=1,32 --sparsities=0
    python -m benchmarks.serve_engines --network=resnet18 --batches=1,32 --sparsities=0
    python -m benchmarks.serve_engines --network=mobilenetv2 --batches=1 --sparsities=0 --precisions=float32
    python -m benchmarks.serve_resnets --precisions=float32,int8
    python -m benchmarks.resnets     # fills in the page from the results of these

Accuracies are published ones; weights and multiply-adds are counted on our models; milliseconds are measured, of pruned
networks with as many blocks zeroed at random, since the time does not depend on which.
"""

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


def milliseconds(network: Network, batch: int, precision: str) -> float | None:
    """The median for a batch, in the fastest engine (ours included) if the network is dense; None if not measured."""
    file = timing.RESULTS / f"serve_engines_{network.architecture.lower()}.json"
    if not file.exists():
        return None
    pruned = f" {network.sparsity:.0%} blocks {BLOCK}"
    rows = [
        row for row in json.loads(file.read_text())["rows"] if (row["batch"], row["precision"]) == (batch, precision)
    ]
    found = [r for r in rows if (r["name"].endswith(pruned) if network.sparsity else "blocks" not in r["name"])]
    return min((row["ms"]["median"] for row in found), default=None)


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


def timed(network: Network) -> dict[str, str]:
    """Columns of milliseconds."""
    found = {(b, p): milliseconds(network, b, p) for b in BATCHES for p in PRECISIONS}
    shown = {key: "-" if ms is None else f"{ms:.1f}" for key, ms in found.items()}
    return {f"ms, batch {batch}, {precision}": ms for (batch, precision), ms in shown.items()}


def rows(every: Sequence[Network]) -> list[dict[str, str]]:
    """The table."""
    lines = []
    for network in every:
        weights, operations = cost(network)
        about = {"network": network.name, "top-1, %": f"{network.top1:.1f}"}
        about |= {"M weights": f"{weights / 1e6:.1f}", "G multiply-adds": f"{operations / 1e9:.2f}"}
        lines.append(about | timed(network))
    return lines


def together(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table of the run that alternates: milliseconds in the fastest engine."""
    top1, lines = {network.name: network.top1 for network in networks()}, []
    for name in dict.fromkeys(row["network"] for row in found):
        line = {"network": name, "top-1, %": f"{top1[name]:.1f}"}
        for precision in PRECISIONS:
            row = _fastest(found, name, precision)
            line[precision] = "{median:.1f} [{q25:.1f}, {q75:.1f}] ".format(**row["ms"]) + row["engine"].split()[0]
        lines.append(line)
    return lines


def against(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """How many times as fast the pruned networks are as dense ones of about their accuracy, by round."""
    lines = []
    for pruned, dense in PAIRS:
        line = {"pruned": pruned, "against": dense}
        for precision in PRECISIONS:
            slow, fast = (_fastest(found, name, precision)["rounds"] for name in (dense, pruned))
            ratio = timing.spread(np.divide(slow, fast))
            line[precision] = "{median:.2f} [{q25:.2f}, {q75:.2f}]".format(**ratio)
        lines.append(line)
    return lines


def _fastest(found: Sequence[Mapping[str, Any]], name: str, precision: str) -> Mapping[str, Any]:
    mine = [row for row in found if (row["network"], row["precision"]) == (name, precision)]
    return min(mine, key=lambda row: row["ms"]["median"])


def _kind(network: Network) -> bool | None:
    """Whether a ResNet is pruned; None for other networks."""
    return bool(network.sparsity) if network.architecture.startswith("ResNet") else None


def plot(every: Sequence[Network]) -> Any:
    """Accuracy against milliseconds, a panel for each precision, one image."""
    fig, axes = plt.subplots(1, len(PRECISIONS), figsize=(9, 3.8), layout="constrained", sharey=True)
    for axis, precision in zip(axes, PRECISIONS, strict=True):
        for label, pruned, style in (
            ("dense ResNets, in the fastest engine", False, "o-"),
            ("another dense network, likewise", None, "^"),
            ("ResNet-50, pruned; timed with zeros at random", True, "s--"),
        ):
            points = [(milliseconds(n, 1, precision), n) for n in every if _kind(n) == pruned]
            measured = [(ms, n) for ms, n in points if ms is not None]
            axis.plot([ms for ms, _ in measured], [n.top1 for _, n in measured], style, label=label)
            for ms, n in measured:
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
    found = json.loads((timing.RESULTS / "serve_resnets.json").read_text())["rows"]
    lines = {"resnet50": rows(every), "resnets together": together(found), "resnets against": against(found)}
    for name, each in lines.items():
        page = filled(page, name, markdown(each))
    files.write_text(PAGE, page)
    report.save_figure(timing.RESULTS / "resnets.png", plot(every))
    print(PAGE)


if __name__ == "__main__":
    main()
