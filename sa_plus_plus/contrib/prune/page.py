"""The page on a pruned network: its quality, its speed, and the blocks that are left."""

import functools
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import sa_plus_plus as sapp
from sa_plus_plus import timing
from sa_plus_plus.checks import occupied, planned_kernels
from sa_plus_plus.contrib.prune.networks import Measure, inputs, output
from sa_plus_plus.contrib.transformers.directories import Published
from sa_plus_plus.files import write_atomically

BATCHES = (1, 8)
SERVED, PAGE, BLOCKS, SPEED = "served.safetensors", "report.md", "blocks.png", "milliseconds.png"
_ROUNDS = 7
_KERNELS = ("query", "key", "value", "out", "up", "down")


class Speed(NamedTuple):
    """Milliseconds of a call, for one size of batch: medians, dense and pruned, both made by `specialize`."""

    batch: int
    dense: float
    pruned: float


def served(
    published: Published, dense: Any, pruned: Any, plan: sapp.Plan, length: int, file: pathlib.Path
) -> list[Speed]:
    """Write the file for `sapp.serve`, and time the network in it beside the dense one.

    Args:
      published: the network.
      dense: its parameters.
      pruned: the pruned network's.
      plan: of these.
      length: number of tokens, for text.
      file: to be written.
    """
    networks, speeds = [], []
    for batch in BATCHES:
        examples = arguments(published, batch, length)
        both = [
            _specialised(published, dense, examples),
            _specialised(published, pruned, examples, plan),
        ]
        calls = {i: functools.partial(_call, network, examples) for i, network in enumerate(both)}
        seconds = timing.alternate(calls, _ROUNDS)
        speeds.append(Speed(batch, *(1000 * float(np.median(seconds[i])) for i in calls)))
        networks.append(both[1])
    sapp.serve.save(file, networks)
    return speeds


def _call(network: Any, examples: Sequence[Any]) -> Any:
    return jax.block_until_ready(network(*examples))


def _specialised(published: Published, params: Any, examples: Sequence[Any], plan: sapp.Plan | None = None) -> Any:
    names = inputs(published)
    return sapp.specialize(
        lambda *values: output(published, params, dict(zip(names, values, strict=True))), *examples, plan=plan
    )


def arguments(published: Published, batch: int, length: int) -> tuple[np.ndarray, ...]:
    """Arguments of a network: random tokens, all of them real, or a grey image.

    Args:
      published: the network.
      batch: how many examples.
      length: number of tokens, for text.
    """
    if published.image:
        return (np.zeros((batch, *published.image), np.float32),)
    tokens = np.random.default_rng(0).integers(0, published.model.vocabulary, (batch, length), np.int32)
    return (tokens, np.full(batch, length, np.int32))[: len(inputs(published))]


def masks(params: Any, plan: sapp.Plan) -> dict[str, np.ndarray]:
    """Which blocks of each pruned kernel hold anything but zeros, by path.

    Args:
      params: of the pruned network.
      plan: of these.
    """
    kernels = planned_kernels(params, plan)
    return {
        path: occupied(np.asarray(x), plan.pruned[path].block, plan.pruned[path].view) for path, x in kernels.items()
    }


def draw_blocks(file: pathlib.Path, found: Mapping[str, np.ndarray], layers: int) -> None:
    """A picture of the blocks that are left: a row for each layer, a column for each of its kernels.

    Args:
      file: to be written.
      found: by `masks`.
      layers: how many.
    """
    fig, axes = _figure(layers, len(_KERNELS), (10, 1.1 * layers + 0.8))
    for i, row in enumerate(axes):
        for name, ax in zip(_KERNELS, row, strict=True):
            ax.set(xticks=[], yticks=[])
            if (mask := found.get(f"layer{i + 1}/{name}/kernel")) is not None:
                ax.imshow(mask, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            if i == 0:
                ax.set_title(name, fontsize="medium")
        row[0].set_ylabel(f"layer {i + 1}")
    fig.suptitle("blocks that are left (blue); inputs downwards, outputs to the right", fontsize="medium")
    _save(file, fig)


def draw_speed(file: pathlib.Path, speeds: Sequence[Speed]) -> None:
    """A picture of milliseconds, dense and pruned.

    Args:
      file: to be written.
      speeds: of several sizes of batches.
    """
    fig, axes = _figure(1, len(speeds), (3.2 * len(speeds), 3))
    for ax, speed in zip(axes[0], speeds, strict=True):
        bars = ax.bar(["dense", "pruned"], [speed.dense, speed.pruned], color=["#bbbbbb", "#1f4e9c"])
        ax.bar_label(bars, fmt="%.2f")
        ax.set(title=f"batch of {speed.batch}", ylabel="milliseconds")
        ax.margins(y=0.15)
    _save(file, fig)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional
    from matplotlib.figure import Figure  # noqa: PLC0415

    fig = Figure(size, layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False)


def _save(file: pathlib.Path, fig: Any) -> None:
    content = io.BytesIO()
    fig.savefig(content, format="png", dpi=120)
    write_atomically(file, lambda opened: opened.write(content.getvalue()))


def text(
    title: str,
    command: str,
    notes: Sequence[str],
    measures: Sequence[Measure],
    speeds: Sequence[Speed],
    found: Mapping[str, np.ndarray],
    plan: sapp.Plan,
    takes: str,
    call: str,
) -> str:
    """The page in Markdown.

    Args:
      title: its heading.
      command: that made the network.
      notes: sentences on the data and the files.
      measures: of quality, on held-out examples.
      speeds: milliseconds.
      found: by `masks`.
      plan: of the pruned network.
      takes: what the served network takes, a sentence.
      call: arguments of the served network in Python.
    """
    kernels = [
        (path.removesuffix("/kernel"), "×".join(map(str, plan.pruned[path].shape)), f"{mask.sum():,} of {mask.size:,}")
        for path, mask in found.items()
    ]
    lines = [f"# {title}", "", f"    {command}", "", *(f"- {note}" for note in notes), "", "## Quality", ""]
    if measures:
        rows = [(m.name, f"{m.dense:.4g}", f"{m.pruned:.4g}") for m in measures]
        lines += ["On held-out examples:", "", *_table(("", "dense", "pruned"), rows)]
    else:
        lines += ["Not measured: no examples were given."]
    times = [(str(s.batch), f"{s.dense:.2f}", f"{s.pruned:.2f}", f"{s.dense / s.pruned:.2f}") for s in speeds]
    return "\n".join(
        [
            *lines,
            *("", "## Milliseconds", "", "Both networks by `sapp.specialize`, in turn, on this machine:", ""),
            *_table(("batch", "dense", "pruned", "times as fast"), times),
            *(
                "",
                f"![milliseconds]({SPEED})",
                "",
                f"`{SERVED}` holds the pruned network, in batches of any size.",
                takes,
            ),
            "",
            *("```python", "import numpy as np", "import sa_plus_plus as sapp", ""),
            *(f'network = sapp.serve.load("{SERVED}")', f"y = network({call})", "```"),
            *("", "## Blocks that are left", "", f"![blocks]({BLOCKS})", ""),
            *_table(("kernel", "shape", "blocks left"), kernels),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
