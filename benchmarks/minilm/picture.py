"""The picture of a campaign, quality against milliseconds, and its tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker

from benchmarks.minilm.contenders import Setting
from benchmarks.minilm.networks import PRECISIONS, PUBLISHED
from experiments.outputs import report  # noqa: F401 - chooses how figures are drawn

METRIC = "mrr"
OURS = "ours"
LOST = 0.01  # lower precision may cost so much of the metric
Rows = Sequence[Mapping[str, Any]]


def points(networks: Rows, rows: Rows, setting: Setting) -> list[dict[str, Any]]:
    """What the picture shows of a setting: each network in its fastest engine of each precision.

    The pruned networks are served by ours, the dense ones by whichever is fastest of those that keep what the network
    is worth in float32, up to `LOST`.

    Args:
      networks: with `folder`, `family`, `label`, `dense`, and `quality` in float32 and by engine in int8.
      rows: as `speed.measure` gives them.
      setting: the batch.
    """
    found = []
    for network in networks:
        mine = [r for r in rows if r["network"] == network["folder"] and (r["batch"], r["length"]) == setting]
        for precision in PRECISIONS:
            served = [r for r in mine if r["engine"].split()[1] == precision and _keeps(network, r)]
            for when in ("warm", "cold"):
                if served:
                    best = min(served, key=lambda row: row[when]["median"])
                    about = {key: network[key] for key in ("family", "label", "dense")}
                    about |= {"engine": best["engine"], "precision": precision, "when": when}
                    about |= {"ms": best[when], "quality": network["quality"][_key(best)]}
                    found.append(about)
    return found


def _keeps(network: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether an engine was measured, and keeps enough of the quality."""
    quality = network["quality"]
    return _key(row) in quality and quality[_key(row)][METRIC] >= quality["float32"][METRIC] - LOST


def _settings(rows: Rows) -> list[Setting]:
    """What was timed."""
    return list(dict.fromkeys(Setting(row["batch"], row["length"]) for row in rows))


def _key(row: Mapping[str, Any]) -> str:
    """In float32 all engines compute the same."""
    return "float32" if row["engine"].endswith("float32") else row["engine"]


def plot(networks: Rows, rows: Rows, title: str) -> Any:
    """Plot quality against milliseconds: a column a setting, with warm and with cold caches below each other."""
    there = _settings(rows)
    fig, axes = plt.subplots(2, len(there), figsize=(5.2 * len(there), 8), layout="constrained", squeeze=False)
    lines = {}
    families = list(dict.fromkeys(network["family"] for network in networks if network["family"] != PUBLISHED))
    for column, setting in enumerate(there):
        found = points(networks, rows, setting)
        for axis, when in zip(axes[:, column], ("warm", "cold"), strict=True):
            for i, family in enumerate(families):
                for precision in PRECISIONS:
                    mine = [p for p in found if (p["family"], p["precision"], p["when"]) == (family, precision, when)]
                    if not mine:
                        continue
                    if mine[0]["dense"]:  # the line begins with the network that they were made from
                        first = (PUBLISHED, precision, when)
                        mine = [p for p in found if (p["family"], p["precision"], p["when"]) == first] + mine
                    x, y = [p["ms"]["median"] for p in mine], [p["quality"][METRIC] for p in mine]
                    style = {"ls": "-"} if precision == "float32" else {"ls": "--", "mfc": "white"}
                    marker = "s" if mine[0]["dense"] else "o"
                    (line,) = axis.plot(x, y, color=f"C{i}", marker=marker, ms=6, lw=1.2, **style)
                    lines[f"{family}, {precision}"] = line
                    for p, a, b in zip(mine, x, y, strict=True):
                        axis.annotate(p["label"], (a, b), xytext=(3, -9), textcoords="offset points", fontsize=6)
            axis.set(xscale="log", title=f"{setting}, {when}", xlabel="ms")
            axis.grid(alpha=0.2, which="both")
            for each in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
                each(ticker.FormatStrFormatter("%g"))
            axis.tick_params(axis="x", which="both", labelsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean reciprocal rank")
    fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize="small")
    fig.suptitle(title)
    return fig


def compared(networks: Rows) -> list[dict[str, str]]:
    """The table of what was trained equally long, best first."""
    mine = sorted(networks, key=lambda network: -network["quality"]["float32"][METRIC])
    return [_cells(network) for network in mine]


def repeated(networks: Rows) -> list[dict[str, str]]:
    """The table of what was trained with several seeds: mean ± standard deviation."""
    lines = []
    for name in dict.fromkeys((network["family"], network["label"]) for network in networks):
        mine = [network for network in networks if (network["family"], network["label"]) == name]
        if len(mine) > 1:
            line = {"network": ", ".join(name), "seeds": str(len(mine)), "weights": _millions(mine[0])}
            for measure in mine[0]["quality"]["float32"]:
                each = [network["quality"]["float32"][measure] for network in mine]
                line[measure] = f"{np.mean(each):.3f} ± {np.std(each, ddof=1):.3f}"
            lines.append(line)
    return lines


def _millions(network: Mapping[str, Any]) -> str:
    return f"{network['weights'] / 1e6:.2f} M"


def _cells(network: Mapping[str, Any]) -> dict[str, str]:
    measured = {name: f"{x:.3f}" for name, x in network["quality"]["float32"].items()}
    return {
        "network": f"{network['family']}, {network['label']}",
        "steps": f"{network['steps']:,}",
        "weights": _millions(network),
        "MB": f"{network['bytes'] / 1e6:.1f}",
        **measured,
    }


def served(networks: Rows, rows: Rows) -> list[dict[str, str]]:
    """The table of the picture: by network and precision, the quality, and the milliseconds of each setting."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for setting in _settings(rows):
        for p in points(networks, rows, setting):
            name = f"{p['family']}, {p['label']}", p["precision"]
            line = lines.setdefault(name, {"network": name[0], "precision": name[1]})
            line |= {METRIC: f"{p['quality'][METRIC]:.3f}", "cosine": f"{p['quality']['cosine']:.3f}"}
            what = "" if p["engine"].startswith(OURS) and not p["dense"] else f" {p['engine'].split()[0]}"
            line[f"{setting}, {p['when']}"] = f"{p['ms']['median']:.2f}{what}"
    return list(lines.values())
