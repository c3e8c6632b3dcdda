"""A sweep as a page: the paper's figures beside ours, a comparison of the algorithms, and what was not run."""

import datetime
import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt

import sa_plus_plus as sapp
from experiments.outputs import report, workdir
from experiments.sweeps.cells import CAPPED, DENSE, NARROW, Cell, Sweep, cells_of, result_of
from experiments.sweeps.cells import sweep as get_sweep
from experiments.sweeps.work import state
from experiments.utils import files

PAPER = json.loads((pathlib.Path(__file__).parent / "paper.json").read_text())
Key = tuple[str, int, float]  # variant, block, sparsity
Part = tuple[str, Any]  # a part of a page: its kind, and its content


class Measured(NamedTuple):
    """The runs of one variant, block size and sparsity.

    Attributes:
      values: by seed, of those that ended without diverging.
      states: of all its seeds.
      weights: how many the network keeps, embeddings, biases and all else included; None if that is not known.
    """

    values: dict[int, float]
    states: list[str]
    weights: int | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values()))) if self.values else float("nan")

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds; NaN for fewer than two."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else float("nan")


def measured(sweep: Sweep, directory: pathlib.Path, metric: str = "") -> dict[Key, Measured]:
    """The results of a sweep so far; `metric` replaces the sweep's own."""
    name = metric or sweep.options["metric"]
    scale = 100 if sweep.options["percent"] and name == sweep.options["metric"] else 1
    found: dict[Key, Measured] = {}
    for cell in cells_of(sweep):
        key = (cell.variant, cell.block, cell.sparsity)
        entry = found.setdefault(key, Measured({}, []))
        entry.states.append(state(cell, directory))
        if entry.states[-1] == "done":
            result = result_of(cell, directory)
            assert result is not None
            value = result["loss"] if name == "loss" else result["metric"]
            entry.values[cell.seed] = scale * value
            found[key] = entry._replace(weights=result.get("kept_weights", entry.weights))
    return found


def of_paper(sweep: Sweep, variant: str, block: int, sparsity: float) -> tuple[bool, float]:
    """Whether the paper has a cell, and its value; NaN where it diverged."""
    table = PAPER.get(sweep.options["paper"])
    if table is None:
        return False, float("nan")
    if variant == DENSE:
        return True, table["dense"]
    row = table["values"].get(variant, {}).get(str(block))
    if row is None or sparsity not in table["sparsities"]:
        return False, float("nan")
    value = row[table["sparsities"].index(sparsity)]
    return True, float("nan") if value is None else value


def parts(sweep: Sweep, found: Mapping[Key, Measured]) -> list[Part]:
    """The page."""
    options = sweep.options
    digits = 2 if options["percent"] else 4
    dense = found.get((DENSE, 0, 0.0), Measured({}, []))
    page: list[Part] = [("title", options["title"]), ("text", _about(sweep, found))]
    theirs = f"; in the paper {of_paper(sweep, DENSE, 0, 0.0)[1]}" if options["paper"] else ""
    page.append(("text", f"Dense: {_ours(dense, digits)}{theirs}."))
    page.append(("picture", f"{sweep.name}.png"))
    for block in options["blocks"]:
        head = [f"blocks {block} × {block}", *(f"{s:.0%}" for s in options["sparsities"])]
        rows = []
        for variant in options["variants"]:
            cells = [found[variant, block, s] for s in options["sparsities"]]
            rows.append([variant, *(_cell(ours, dense, digits) for ours in cells)])
            paper = [of_paper(sweep, variant, block, s) for s in options["sparsities"]]
            if any(there for there, _ in paper):
                minus = of_paper(sweep, DENSE, 0, 0.0)[1]
                rows.append([f"{variant}, the paper's", *(_theirs(*cell, minus, digits) for cell in paper)])
        page.append(("table", (head, rows)))
    page += _weights(sweep, found)
    if options["note"]:
        page.append(("text", options["note"]))
    if note := PAPER.get(options["paper"], {}).get("note"):
        page.append(("text", f"On the paper's figures: {note}"))
    page += _orders(sweep, found, digits)
    page.append(("text", "The command of each cell, and what became of it, is in commands.txt."))
    return page


def _about(sweep: Sweep, found: Mapping[Key, Measured]) -> str:
    states = [s for entry in found.values() for s in entry.states]
    counts = {name: states.count(name) for name in ("done", "diverged", "failed", "started", "waiting")}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    seeds = len(sweep.options["seeds"])
    runs = "run" if seeds == 1 else f"runs, mean ± standard deviation of {seeds} seeds"
    source = f" Source of the paper's figures: {PAPER['source']}" if sweep.options["paper"] else ""
    return (
        f"Scale {sweep.scale}: {sweep.options['file']}. {len(states)} {runs}: {told}. In brackets, the difference from "
        f"the dense network.{source}"
    )


def _ours(ours: Measured, digits: int) -> str:
    spread = "" if np.isnan(ours.deviation) else f" ± {ours.deviation:.{digits}f}"
    lost = ours.states.count("diverged")
    if not ours.values:
        return f"diverged ({lost})" if lost else "not run"
    missing = len(ours.states) - len(ours.values)
    return f"{ours.mean:.{digits}f}{spread}" + (f", {missing} missing" if missing else "")


def _cell(ours: Measured, dense: Measured, digits: int) -> str:
    change = ours.mean - dense.mean
    return _ours(ours, digits) + ("" if np.isnan(change) else f" ({change:+.{digits}f})")


def _theirs(there: bool, value: float, dense: float, digits: int) -> str:
    if not there:
        return ""
    return "diverged" if np.isnan(value) else f"{value:.{digits}f} ({value - dense:+.{digits}f})"


def _weights(sweep: Sweep, found: Mapping[Key, Measured]) -> list[Part]:
    """How many weights the pruned networks have, and the control `narrow`, which is to have as many."""
    options = sweep.options
    if NARROW not in options["variants"] or all(entry.weights is None for entry in found.values()):
        return []

    def shown(block: int, sparsity: float) -> str:
        weights = {v: found[v, block, sparsity].weights for v in options["variants"]}
        narrow = weights.pop(NARROW)
        pruned = [n for v, n in weights.items() if n is not None and v != CAPPED]
        return " / ".join("?" if n is None else f"{n:,}" for n in (max(pruned, default=None), narrow))

    dense = found.get((DENSE, 0, 0.0), Measured({}, []))
    head = ["weights, pruned / narrow", *(f"{s:.0%}" for s in options["sparsities"])]
    rows = [[f"{b} × {b}", *(shown(b, s) for s in options["sparsities"])] for b in options["blocks"]]
    told = f"Weights kept, of {dense.weights:,}" if dense.weights else "Weights kept"
    told += ", embeddings, biases and all else included. `narrow` is the dense network whose widths are cut, "
    told += "all by one factor, until it has no more than the pruned ones"
    told += f"; `{CAPPED}` cuts the widest layers only." if CAPPED in options["variants"] else "."
    return [("text", told), ("table", (head, rows))]


def _orders(sweep: Sweep, found: Mapping[Key, Measured], digits: int) -> list[Part]:
    """Some variants against others, paired by seed: ahead, behind, or within two standard errors."""
    first, *others = sweep.options["variants"]
    compared = sweep.options["compared"] or {first: others}
    better = -1 if sweep.options["lower_is_better"] else 1
    head = ["", "minus", "ahead", "level", "behind", "mean difference"]
    rows = []
    for first, other in ((a, b) for a, others in compared.items() for b in others):
        verdicts, means = {"ahead": 0, "level": 0, "behind": 0}, []
        for block in sweep.options["blocks"]:
            for sparsity in sweep.options["sparsities"]:
                a, b = (found[v, block, sparsity].values for v in (first, other))
                pairs = np.array([a[seed] - b[seed] for seed in a.keys() & b.keys()])
                if len(pairs) < 2:
                    continue
                mean, error = pairs.mean(), pairs.std(ddof=1) / len(pairs) ** 0.5
                level = abs(mean) <= 2 * error
                verdicts["level" if level else "ahead" if better * mean > 0 else "behind"] += 1
                means.append(mean)
        if means:
            rows.append([first, other, *map(str, verdicts.values()), f"{np.mean(means):+.{digits}f}"])
    if not rows:
        return []
    told = "Pairs of runs of one seed: cells where the difference exceeds two standard errors, and where it does not."
    return [("text", told), ("table", (head, rows))]


def markdown(page: Sequence[Part]) -> str:
    """A page as Markdown."""
    lines: list[str] = []
    for kind, content in page:
        if kind == "table":
            head, rows = content
            lines += [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
        else:
            lines.append({"title": "# {}", "text": "{}", "picture": "![]({})"}[kind].format(content))
        lines.append("")
    return "\n".join(lines)


def as_html(page: Sequence[Part]) -> str:
    """A page as HTML."""
    style = "body{font:16px sans-serif;margin:2em;max-width:70em}td,th{padding:.2em .8em;text-align:right}"
    style += "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    title = html.escape(page[0][1])
    lines = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>']
    for kind, content in page:
        if kind == "table":
            head, rows = ([html.escape(c) for c in content[0]], [[html.escape(c) for c in row] for row in content[1]])
            lines.append(f"<table><tr>{''.join(f'<th>{c}</th>' for c in head)}</tr>")
            lines += [f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows]
            lines.append("</table>")
        else:
            form = {"title": "<h1>{}</h1>", "text": "<p>{}</p>", "picture": '<img src="{}" alt="">'}[kind]
            lines.append(form.format(html.escape(content)))
    return "\n".join(lines) + "</html>\n"


def write(sweep: Sweep, directory: pathlib.Path) -> list[pathlib.Path]:
    """Write the page of a sweep, its pictures, and the commands of its cells, into its directory."""
    folder = directory / sweep.folder
    folder.mkdir(parents=True, exist_ok=True)
    page, name = parts(sweep, measured(sweep, directory)), sweep.name
    files.write_text(folder / f"{name}.md", markdown(page))
    files.write_text(folder / f"{name}.html", as_html(page))
    files.write_json(folder / f"{name}.json", as_json(sweep, directory))
    rows = [f"{state(cell, directory):9} {cell.command(directory)}" for cell in cells_of(sweep)]
    files.write_text(folder / "commands.txt", "\n".join(rows) + "\n")
    report.save_figure(folder / f"{name}.png", against_sparsity(sweep, directory, [sweep.options["metric"]]))
    return [folder / name for name in (*(f"{name}.{kind}" for kind in ("md", "html", "png", "json")), "commands.txt")]


def as_json(sweep: Sweep, directory: pathlib.Path) -> dict[str, Any]:
    """The results by variant, block size and sparsity: values in the order of `seeds`, None for a missing run."""
    about = {key: sweep.options[key] for key in ("title", "file", "changes", "metric", "percent", "seeds", "variants")}
    rows = [
        {"variant": v, "block": b, "sparsity": s, "values": [entry.values.get(seed) for seed in sweep.options["seeds"]]}
        | ({} if entry.weights is None else {"weights": entry.weights})
        for (v, b, s), entry in measured(sweep, directory).items()
    ]
    made = {"versions": report.versions(), "date": datetime.date.today().isoformat()}
    return {"name": sweep.name, "scale": sweep.scale, **about, "rows": rows, **made}


def of_json(content: Mapping[str, Any]) -> tuple[Sweep, dict[Key, Measured]]:
    """The sweep, and what was measured, from what `as_json` made; cells that it did not have then are waiting."""
    sweep = get_sweep(content["name"], content["scale"])
    absent = Measured({}, ["waiting"] * len(content["seeds"]))
    found = {(cell.variant, cell.block, cell.sparsity): absent for cell in cells_of(sweep)}
    for row in content["rows"]:
        values = {seed: v for seed, v in zip(content["seeds"], row["values"], strict=True) if v is not None}
        states = ["waiting" if v is None else "done" for v in row["values"]]
        found[row["variant"], row["block"], row["sparsity"]] = Measured(values, states, row.get("weights"))
    return sweep, found


def against_sparsity(sweep: Sweep, directory: pathlib.Path, metrics: Sequence[str]) -> Any:
    """Plot the difference from dense against sparsity (Figures 4 and 5): ours with its spread, the paper's dashed."""
    options = sweep.options
    blocks = options["blocks"]
    size = (3.4 * len(blocks) + 3, 4.2 * len(metrics))
    fig, axes = plt.subplots(len(metrics), len(blocks), figsize=size, layout="constrained", squeeze=False, sharey="row")
    for line, metric in zip(axes, metrics, strict=True):
        found, shown = measured(sweep, directory, metric), []
        dense = found.get((DENSE, 0, 0.0), Measured({}, [])).mean
        for axis, block in zip(line, blocks, strict=True):
            for i, variant in enumerate(options["variants"]):
                ours = [found[variant, block, s] for s in options["sparsities"]]
                x = [100 * s for s in options["sparsities"]]
                means, spread = [o.mean - dense for o in ours], [np.nan_to_num(o.deviation) for o in ours]
                axis.errorbar(x, means, spread, fmt="o-", ms=3, lw=1, capsize=2, color=_color(i), label=variant)
                shown += np.array(means)[np.isfinite(means)].tolist()
                if metric == options["metric"]:
                    minus = of_paper(sweep, DENSE, 0, 0.0)[1]
                    theirs = [of_paper(sweep, variant, block, s)[1] - minus for s in options["sparsities"]]
                    axis.plot(x, theirs, "x--", ms=4, lw=0.8, color=_color(i))
            axis.set(title=f"blocks {block} × {block}", xlabel="sparsity, %")
        line[0].set_ylabel(f"{metric} minus that of the dense network")
        if shown:  # logarithmic, so that a few that failed do not hide how the rest differ
            line[0].set_yscale("symlog", linthresh=max(float(np.median(np.abs(shown))), 1e-6))
            line[0].set_ylim(1.5 * min(*shown, 0), 1.5 * max(*shown, 0, -0.1 * min(shown)))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    fig.suptitle(options["title"] + (" (dashed: the paper's)" if options["paper"] else ""))
    return fig


def _color(i: int) -> Any:
    """Twenty colours, neighbours far apart."""
    return plt.get_cmap("tab20")(2 * i % 20 + i // 10)


def curves(sweep: Sweep, directory: pathlib.Path) -> Any:
    """Plot training loss against step (Figure 3), at the largest sparsity up to 90%, one panel per block size."""
    options = sweep.options
    sparsity = max((s for s in options["sparsities"] if s <= 0.9), default=min(options["sparsities"]))
    blocks = options["blocks"]
    fig, axes = plt.subplots(1, len(blocks), figsize=(4 * len(blocks), 3.6), layout="constrained", squeeze=False)
    for axis, block in zip(axes[0], blocks, strict=True):
        for i, variant in enumerate((*options["variants"], DENSE)):
            at, share = (0, 0.0) if variant == DENSE else (block, sparsity)
            cells = [Cell(sweep, variant, at, share, seed) for seed in options["seeds"]]
            runs = [rows for cell in cells if (rows := _rows(directory / cell.folder))]
            if runs:
                steps = [row["step"] for row in runs[0]]
                losses = np.array([[row["train_loss"] for row in rows] for rows in runs if len(rows) == len(steps)])
                axis.plot(steps, losses.mean(0), lw=1, color="black" if variant == DENSE else _color(i), label=variant)
        axis.set(title=f"blocks {block} × {block}, {sparsity:.0%}", xlabel="step", yscale="log")
    axes[0, 0].set_ylabel("loss of a training batch")
    axes[0, 0].legend(fontsize="x-small")
    fig.suptitle(options["title"].split(":")[0])
    return fig


def _rows(folder: pathlib.Path) -> list[dict[str, Any]]:
    path = folder / workdir.METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if row.get("train_loss") is not None]


def schedules(sparsity: float = 0.9, steps: int = 900) -> Any:
    """Plot sparsity against step for ACDC and SequentialAttention++ (Figure 2)."""
    fig, axes = plt.subplots(2, 1, figsize=(9, 5), layout="constrained", sharex=True)
    for axis, name in zip(axes, ("acdc", "sequential_attention"), strict=True):
        getattr(sapp.phases, name)(steps).plot(sparsity, axis)
        axis.set_title({"acdc": "ACDC", "sequential_attention": "SequentialAttention++"}[name])
    return fig
