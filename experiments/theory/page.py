"""Tables and figures of the theory, as one Markdown page."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from experiments.outputs import report
from experiments.theory import instances, replacement
from experiments.utils import files


def write(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    """`theory.md`, its figures and `theory.json` in `folder`; the page last, so that its figures exist."""
    _plot_edges(folder / "theory_one_group.png", content)
    _plot_rounds(folder / "theory_replacement.png", content["theorem_b3"])
    _plot_recovery(folder / "theory_recovery.png", content)
    files.write_json(folder / "theory.json", content)
    text = _page(content)
    files.write_text(folder / "theory.md", text)


def _page(content: Mapping[str, Any]) -> str:
    edges = {kind: np.array(values) for kind, values in content["edges"].items()}
    near = [
        f"- {kind}, {len(e)} instances: down to {np.median(e):.3f} tau in the median, {e.max():.4f} tau in the worst, "
        f"{e.min():.3f} tau in the best."
        for kind, e in edges.items()
    ]
    without = ("each",)
    digits = content["digits"]
    cells = [
        {"method": method, **{f"{p['blocks']} blocks": f"{p['accuracy']:.1%}" for p in curve}}
        for method, curve in digits["curves"].items()
    ]
    parts = [
        "# Theory, measured",
        "Everything here is computed by `sa_plus_plus.convex` in float64 (the digits in float32): "
        "`python -m experiments.theory`. The numbers are in `theory.json`.",
        "## The lemmas",
        "The minimum of each masked problem, found over mask and coefficients by L-BFGS from two starts on every "
        "support (the loss's minimiser there, and a random one), against that of the regularised problem, from as "
        "many. `mapped there` is the masked objective at the image of the regularised minimiser, `mapped back` the "
        "reverse; all relative.",
        table(content["lemmas"]),
        "## Theorem 1.1",
        "Five groups of 1 to 4 coordinates. Just under tau is `max(0.97, halfway from the edge to tau)`. There "
        f"objective (1) is minimised from {10 + len(instances.SIZES)} starts; `found lower` counts instances where "
        "one ended below the group LASSO's solution by more than 1e-10 of it, `found another as low` those where one "
        "ended as low more than 1% away; `largest gain` is by how much, relatively, the best end is lower. MCP and "
        "SCAD increase up to a point, and objective (1) is infinite beyond it. The last rows are the penalty of Lemma "
        "2.1: it is not subadditive, the theorem does not cover it, and does not hold for it.",
        table(content["theorem_1_1"]),
        "How close to tau is close: lambda for which the group LASSO has one group.",
        "\n".join(near),
        "![one group](theory_one_group.png)",
        "## Theorem B.3",
        f"{replacement.GROUPS} groups of {replacement.SIZE}, constants by enumeration, {replacement.STARTS} random "
        f"starts for each instance, eps = {replacement.EPS:g} of the distance from the loss at 0 to the best. The "
        "bound holds where, at the stated k', the loss is within eps of the best k groups' in R rounds or fewer.",
        table([{k: v for k, v in row.items() if k not in without} for row in content["theorem_b3"]]),
        "![rounds](theory_replacement.png)",
        "## Which groups are found",
        "Left: planted logistic regression, 4 of 16 groups of 4, neighbouring features correlated by 0.5; the share of "
        "runs in which all four are found. Right: multinomial regression on real digits, test accuracy with so many of "
        f"the {'×'.join(map(str, digits['block']))} blocks of the 10×784 matrix ({digits['train']} digits to train, "
        f"{digits['test']} to test; all blocks {digits['dense']['accuracy']:.1%}).",
        table(cells),
        "![recovery](theory_recovery.png)",
        f"Computed in {content['seconds']:.0f} s.",
    ]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of dicts with the same keys."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(_cell(v) for v in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.3g}"
    return "–" if value is None else str(value)


def _plot_edges(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for kind, values in content["edges"].items():
        left.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), where="post", label=kind)
    left.set(xlabel="least λ / τ with one group, group LASSO", ylabel="share of instances", ylim=(0, 1.02))
    left.legend(fontsize="small")
    for row in content["wide"]:
        ratios = [s["ratio"] for s in row["shares"]]
        right.plot(ratios, [s["of largest gradient"] for s in row["shares"]], "o-", ms=3, label=row["penalty"])
    right.set(xlabel="λ / τ", ylabel="share of instances", ylim=(-0.02, 1.02))
    right.set_title("the lowest point found has one group", fontsize="medium")
    right.legend(fontsize="small")
    fig.suptitle("Theorem 1.1: how close to τ is close")
    report.save_figure(path, fig)


def _plot_rounds(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rng = np.random.default_rng(0)
    for row in rows:
        label = f"{row['problem']}, n = {row['samples']}, k = {row['k']}"
        full = [r for r in row["each"] if r["size"] == r["promised_size"] and r["rounds"] is not None]
        promised = [r["promised_rounds"] for r in full for _ in range(r["runs"])]
        taken = [r["rounds"] for r in full for _ in range(r["runs"])]
        left.plot(promised, np.array(taken) + rng.uniform(-0.15, 0.15, len(taken)), ".", ms=4, alpha=0.5, label=label)
        sizes = sorted({r["size"] for r in row["each"]})
        shares = [
            np.average([r["rounds"] is not None for r in of_size], weights=[r["runs"] for r in of_size])
            for of_size in ([r for r in row["each"] if r["size"] == s] for s in sizes)
        ]
        right.plot(np.array(sizes) / row["k"], shares, "o-", ms=3, label=label)
    ends = [0, max((r["promised_rounds"] for row in rows for r in row["each"]), default=1)]
    left.plot(ends, ends, "k:", lw=0.8)
    left.set(xlabel="rounds promised, R", ylabel="rounds taken", title="at the stated k'")
    right.set(xlabel="k' / k", ylabel=f"share within eps in {replacement.ROUNDS} rounds", ylim=(-0.02, 1.05))
    right.set_title("with fewer groups than stated")
    right.legend(fontsize="x-small")
    fig.suptitle("Theorem B.3: OMPR")
    report.save_figure(path, fig)


def _plot_recovery(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row in content["planted"]:
        left.plot(
            [p["samples"] for p in row["curve"]], [p["all"] for p in row["curve"]], "o-", ms=3, label=row["method"]
        )
    left.set(xlabel="samples", ylabel="share of runs with all groups found", ylim=(-0.02, 1.02))
    left.legend(fontsize="small")
    for method, curve in content["digits"]["curves"].items():
        right.plot([p["blocks"] for p in curve], [p["accuracy"] for p in curve], "o-", ms=3, label=method)
    right.axhline(content["digits"]["dense"]["accuracy"], color="black", lw=0.8, ls=":")
    right.set(xlabel="blocks kept", ylabel="test accuracy, MNIST digits")
    report.save_figure(path, fig)
