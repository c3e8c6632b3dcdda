"""Write docs/benchmarks.md, the measurements in tables, from benchmarks/results/*.json.

    python -m benchmarks.page

Each file has its date, device and versions. A test compares the page with what this writes.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.timing import RESULTS
from experiments.utils import files

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


class Section(NamedTuple):
    """A table of the page.

    Attributes:
      file: name in `benchmarks/results`, without `.json`.
      title: heading.
      command: what measures it.
      about: what is measured, and in which units.
      columns: by heading, the key of a row.
      rows: the rows of the file's content.
    """

    file: str
    title: str
    command: str
    about: str
    columns: Mapping[str, str]
    rows: Callable[[Any], list[dict[str, Any]]] = lambda content: content["rows"]


SECTIONS = (
    Section(
        "serve_engines_resnet50",
        "ResNet-50 against dense engines",
        "python -m benchmarks.serve_engines --network=resnet50 --batches=1,32",
        "Images of 224 pixels, random blocks of 16 × 16. Speed-up: over the fastest dense engine of the same "
        "precision; all contenders take turns.",
        {"batch": "batch", "contender": "name", "milliseconds": "ms", "speed-up": "to_engine"},
    ),
    Section(
        "serve_engines_bert",
        "An encoder of BERT-base's shape against dense engines",
        "python -m benchmarks.serve_engines --network=bert --batches=1 --sparsities=0,0.9",
        "One sequence of 128 tokens.",
        {"contender": "name", "milliseconds": "ms", "speed-up": "to_engine"},
    ),
    Section(
        "serve_accuracy",
        "What low precision costs",
        "python -m benchmarks.serve_accuracy --config=configs/cifar10_resnet20.py --weights=…",
        "ResNet-20 on CIFAR-10, 90% of 8 × 8 blocks removed: test accuracy in percent, and predictions that differ "
        "from the model's in percent.",
        {"precision": "precision", "test accuracy": "top1", "changed": "changed"},
        lambda content: [{"precision": name, **row} for name, row in content["rows"].items()],
    ),
    Section(
        "block_sparse_matmul_gpu",
        "Products on a GPU",
        "python -m benchmarks.block_sparse_matmul_gpu",
        "A kernel of side × side in bfloat16; microseconds of the dense product by cuBLAS and of the Pallas kernel.",
        {
            "side": "side",
            "rows": "batch",
            "block": "block",
            "sparsity": "sparsity",
            "dense": "dense_us",
            "by blocks": "pallas_us",
            "speed-up": "pallas_times_as_fast",
        },
        lambda content: content["cells"],
    ),
    Section(
        "feed_forward_gpu",
        "A feed-forward block on a GPU",
        "python -m benchmarks.feed_forward_gpu",
        "Llama-3.1-8B's shape in bfloat16, 64 × 64 blocks, 90%; microseconds of a layer.",
        {"tokens": "tokens", "dense": "dense_us", "pruned": "pruned_us", "speed-up": "times_as_fast"},
    ),
    Section(
        "train_step",
        "The training step",
        "python -m benchmarks.train_step",
        "Time and memory relative to the bare optax step.",
        {
            "network": "workload",
            "step": "contender",
            "milliseconds": "milliseconds",
            "time": "time_ratio",
            "memory": "memory_ratio",
        },
    ),
    Section(
        "train_step_gpt",
        "The training step of a GPT",
        "python -m benchmarks.train_step --workloads=gpt,gpt_scanned --algorithms=sequential_attention",
        "A GPT on bytes, 32 × 256 tokens; relative to the bare optax step.",
        {"network": "workload", "step": "contender", "milliseconds": "milliseconds", "time": "time_ratio"},
    ),
    Section(
        "one_shot_speed",
        "Pruning one large layer without training",
        "python -m benchmarks.one_shot_speed",
        "A 4096 × 4096 kernel, blocks of 16 × 16; seconds and peak memory of the process, each run.",
        {"method": "method", "sparsity": "sparsity", "seconds": "seconds", "GiB": "peak_gib"},
    ),
    Section(
        "criteo_step",
        "The step of the click network",
        "python -m benchmarks.criteo_step",
        "32,768 rows.",
        {"step": "step", "milliseconds": "milliseconds", "time to dense": "time_to_dense"},
    ),
    Section(
        "many_layers",
        "A network of 1,000 layers before its first step",
        "python -m benchmarks.many_layers",
        "Seconds.",
        {"what": "what", "seconds": "seconds"},
    ),
)


def page() -> str:
    """The page's text."""
    lines = ["# Benchmarks", ""]
    lines += [
        "Made from `benchmarks/results/` by `python -m benchmarks.page`. Medians, with quartiles in brackets.",
        "",
    ]
    lines += ["The comparison of algorithms and recipes is on [its own page](choosing.md).", ""]
    for section in SECTIONS:
        path = RESULTS / f"{section.file}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        versions = content["versions"]
        lines += [f"## {section.title}", "", section.about, ""]
        lines += [f"`{section.command}`; {versions['device']}, jax {versions['jax']}, {content['date']}.", ""]
        if note := content.get("note"):
            lines += [f"Note: {note}.", ""]
        lines += [_line(section.columns), _line(["---"] * len(section.columns))]
        lines += [_line(_shown(row.get(key, "")) for key in section.columns.values()) for row in section.rows(content)]
        lines.append("")
        if path.with_suffix(".png").exists():
            lines += [f"![{section.title}](../benchmarks/results/{section.file}.png)", ""]
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['median']:.4g} [{value['q25']:.4g}, {value['q75']:.4g}]"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    files.write_text(PAGE, page())
    print(PAGE)
