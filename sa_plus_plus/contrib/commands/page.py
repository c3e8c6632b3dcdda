"""The page of the command `report`: one HTML file without references to others."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from sa_plus_plus.contrib.commands import pictures
from sa_plus_plus.contrib.commands.comparison import PRUNED, Comparison
from sa_plus_plus.contrib.commands.measures import Measured
from sa_plus_plus.plans import by
from sa_plus_plus.sparse.comparison import WORTH
from sa_plus_plus.sparse.summaries import Summary, bytes_text

_SHOWN = 4  # matrices of a stack
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin: 2em 0 .6em; }
.small { color: #666; font-size: .88em; } code { background: #f3f3f1; padding: .1em .3em; border-radius: 3px; }
.tiles { display: flex; flex-wrap: wrap; gap: .8em; margin: 1.4em 0; }
.tile { background: #f3f6fa; border-radius: 8px; padding: .7em 1.1em; min-width: 9em; }
.tile b { display: block; font-size: 1.5em; color: #103870; }
table { border-collapse: collapse; width: 100%; font-size: .93em; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #ccc; }
td { border-bottom: 1px solid #e6e6e4; } td, th { padding: .3em .7em .3em 0; vertical-align: middle; }
.wide { overflow-x: auto; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { position: relative; background: #ececea; height: .8em; width: 6em; border-radius: 2px; overflow: hidden; }
.bar i { position: absolute; left: 0; top: 0; bottom: 0; background: #2f68ad; }
.bar .dense { background: #a9b4c0; }
.bar s { position: absolute; top: 0; bottom: 0; width: 2px; background: #d4552a; }
.wide td:first-child { overflow-wrap: anywhere; min-width: 14em; }
.time .bar { width: 100%; height: 1.2em; }
.warn { background: #fdf0ea; border-left: 4px solid #d4552a; padding: .6em 1em; }
.masks { display: flex; flex-wrap: wrap; gap: 1.4em; align-items: flex-end; } figure { margin: 0; max-width: 330px; }
figcaption { font-size: .82em; color: #444; overflow-wrap: anywhere; }
img { image-rendering: pixelated; border: 1px solid #ddd; display: block; margin-bottom: .3em; max-width: 100%; }
"""


class Page(NamedTuple):
    """What the page shows.

    Attributes:
      title: its heading.
      notes: sentences under it.
      warnings: what is wrong, sentences.
      found: the summary of the checkpoint.
      kernels: those that are pruned.
      comparison: of speed and outputs; None without a function.
    """

    title: str
    notes: Sequence[str]
    warnings: Sequence[str]
    found: Summary
    kernels: Sequence[Measured]
    comparison: Comparison | None

    def text(self) -> str:
        """The page in HTML."""
        dense = [leaf for leaf in self.found.kernels if leaf.path not in {k.layer.path for k in self.kernels}]
        reasons = [(_safe(leaf.path), by(leaf.layer.shape), bytes_text(leaf.bytes)) for leaf in dense]
        body = [
            f"<h1>{_safe(self.title)}</h1>",
            *(f'<div class="small">{note}</div>' for note in self.notes),
            *(f'<p class="warn">{_safe(warning)}</p>' for warning in self.warnings),
            _tiles(self),
            *(_times(self.comparison) if self.comparison else ()),
            *_layers(self.kernels),
            *_masks(self.kernels),
        ]
        if reasons:
            body += ["<h2>Kernels without blocks of zeros</h2>", _table(("kernel", "shape", "bytes"), reasons)]
        head = f'<meta charset="utf-8"><title>{_safe(self.title)}</title><style>{_STYLE}</style>'
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"
        )


def _tiles(page: Page) -> str:
    full, stored = page.found.bytes, _bytes_by_blocks(page)
    shown = [
        (f"{page.found.sparsity:.1%}" if page.found.kernels else "–", "of the kernel weights are zero"),
        (f"{bytes_text(full)} → {bytes_text(stored)}", f"in full; by blocks, {stored / max(full, 1):.0%} of it"),
    ]
    if page.comparison:
        fastest, pruned = page.comparison.dense, page.comparison.milliseconds[PRUNED]
        shown.append((f"{fastest:.2f} → {pruned:.2f} ms", f"a call, {fastest / pruned:.2f} times as fast"))
        if apart := page.comparison.pruning:
            shown.append((f"{apart.largest:.3g}", f"largest difference of outputs (up to {apart.of:.3g})"))
    tiles = (f'<div class="tile"><b>{number}</b>{what}</div>' for number, what in shown)
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _bytes_by_blocks(page: Page) -> int:
    saved = sum(kernel.bytes - kernel.stored_bytes for kernel in page.kernels)
    return page.found.bytes - saved


def _times(found: Comparison) -> list[str]:
    longest, gain = max(found.milliseconds.values()), found.dense / found.milliseconds[PRUNED]
    rows = [
        f'<tr><td style="width:12em">{name}</td><td>{_bar(ms / longest, dense=name != PRUNED)}</td>'
        f'<td class="n" style="width:6em">{ms:.2f} ms</td></tr>'
        for name, ms in found.milliseconds.items()
    ]
    lines = ["<h2>The whole network</h2>", f'<table class="time">{"".join(rows)}</table>']
    if gain < WORTH:
        lines.append(
            f'<p class="warn">Not worth it for speed: the pruned network is {gain:.2f} times as fast as the faster of '
            "the dense ones, with this input on this machine.</p>"
        )
    apart = (
        "The specialised network's outputs differ from those that JAX computes with the same weights by "
        f"{found.rounding.largest:.2g} at most"
    )
    if found.pruning:
        apart += (
            f"; the pruned network's from the dense one's by {found.pruning.largest:.3g}, where the largest output is "
            f"{found.pruning.of:.3g}"
        )
    lines.append(
        f'<p class="small">Inputs: {_safe(found.inputs)}. Medians, measured alternately. "Specialised" is by '
        f"<code>sapp.specialize</code>. {apart}.</p>"
    )
    return lines


def _bar(share: float, mark: float | None = None, dense: bool = False) -> str:
    kind = ' class="dense"' if dense else ""
    at = "" if mark is None else f'<s style="left:calc({100 * mark:.1f}% - 1px)"></s>'
    return f'<div class="bar"><i{kind} style="width:{100 * share:.1f}%"></i>{at}</div>'


def _layers(kernels: Sequence[Measured]) -> list[str]:
    if not kernels:
        return ["<p>No kernel has blocks of zeros.</p>"]
    planned = any(kernel.planned is not None for kernel in kernels)
    compared = any(kernel.norm is not None for kernel in kernels)
    head = ["kernel", "shape", "block", "blocks left", "", "removed"]
    head += ["planned"] if planned else []
    head += ["norm kept", "change"] if compared else []
    rows = [_row(kernel, planned, compared) for kernel in kernels]
    lines = ["<h2>What is left of each kernel</h2>", _table([*head, "bytes", "by blocks"], rows)]
    told = []
    if planned:
        told.append(
            "Planned is the share of the blocks that should be removed; the mark on a bar is what should be left."
        )
    if compared:
        told.append(
            "Norm kept is ‖V‖ / ‖W‖ of the kernel V and the dense W, change ‖V − W‖ / ‖W‖, both Frobenius norms."
        )
    return [*lines, *([f'<p class="small">{" ".join(told)}</p>'] if told else [])]


def _row(kernel: Measured, planned: bool, compared: bool) -> list[str]:
    layer, blocks = kernel.layer, kernel.mask.size
    cells = [
        _safe(layer.path),
        by(layer.shape),
        by(layer.block),
        f"{kernel.kept:,} of {blocks:,}",
        _bar(kernel.kept / blocks, None if kernel.planned is None else kernel.planned / blocks),
        f"{1 - kernel.kept / blocks:.1%}",
    ]
    if planned:
        cells.append("–" if kernel.planned is None else f"{1 - kernel.planned / blocks:.1%}")
    if compared:
        cells += [f"{kernel.norm:.1%}", f"{kernel.change:.1%}"]
    return [*cells, bytes_text(kernel.bytes), bytes_text(kernel.stored_bytes)]


def _masks(kernels: Sequence[Measured]) -> list[str]:
    if not kernels:
        return []
    figures = [figure for kernel in kernels for figure in _figures(kernel)]
    return [
        "<h2>The blocks that are left</h2>",
        '<p class="small">A pixel a block, inputs downwards and outputs to the right; darker for a larger norm, grey '
        "for blocks of zeros.</p>",
        '<div class="masks">',
        *figures,
        "</div>",
    ]


def _figures(kernel: Measured) -> list[str]:
    shape = kernel.mask.shape[-2:]
    masks, norms = kernel.mask.reshape(-1, *shape), kernel.norms.reshape(-1, *shape)
    width = min(max(1, min(8, 320 // max(shape))) * shape[1], 330)  # on the screen
    figures = []
    for i in range(min(len(masks), _SHOWN)):
        name = _safe(kernel.layer.path) + (f", {i + 1} of {len(masks)}" if len(masks) > 1 else "")
        image = f'<img src="{pictures.picture(norms[i], masks[i])}" style="width:{width}px" alt="{name}">'
        caption = f"{name}<br>{by(shape)} blocks, {masks[i].mean():.1%} left"
        figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return figures


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numbers = {
        i
        for i, name in enumerate(head)
        if name in ("bytes", "by blocks", "planned", "removed", "change") or " " in name
    }

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells(head, "th")}</tr>{lines}</table></div>'


def _safe(text: str) -> str:
    return html.escape(text)
