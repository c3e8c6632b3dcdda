"""`docs/benchmarks.md` from `benchmarks/results/*.json`.

    python -m benchmarks.page           # writes the page
    python -m benchmarks.page --check   # exit status 1 if the page is not what the results give

A section is a function of a file's content that returns Markdown. A missing file has no section.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.sweeps import page as sweep_page
from experiments.utils import files

RESULTS = pathlib.Path(__file__).parent / "results"
PAGE = pathlib.Path(__file__).parent.parent / "docs" / "benchmarks.md"
HEAD = """\
<!-- made by `python -m benchmarks.page` from benchmarks/results: do not edit -->
# Benchmarks

Every table is made from a file in `benchmarks/results/`; the command below it measures again. Contenders take turns
within one run. Times are medians. A ratio is the median over rounds, and in brackets are its quartiles.
"""
Content = Mapping[str, Any]
Row = Sequence[str]


def train_step(content: Content) -> str:
    """Time and memory of a training step as multiples of the bare optax step's: a column a workload."""
    names = {
        "mlp_256": "MLP, batch 256",
        "mlp_8192": "MLP, batch 8,192",
        "cnn_32": "residual CNN, batch 32",
        "gpt": "byte GPT, layers in a list",
        "gpt_scanned": "byte GPT, layers in a loop",
    }
    by_workload: dict[str, dict[str, Content]] = {}
    for row in content["rows"]:
        by_workload.setdefault(row["workload"], {})[row["contender"]] = row
    contenders = [name for name in next(iter(by_workload.values())) if name != "bare optax"]
    head = ["", *(f"{names[w]} ({rows['bare optax']['milliseconds']:.0f} ms)" for w, rows in by_workload.items())]
    rows = [
        [name, *(f"{quartiles(of[name]['time_ratio'])}; {of[name]['memory_ratio']:.2f}" for of in by_workload.values())]
        for name in contenders
    ]
    block, sparsity = " × ".join(map(str, content["block"])), content["sparsity"]
    return (
        f"Time of a step; memory. Multiples of the optax step without this library, whose time is in the head; blocks "
        f"{block}, {sparsity:.0%}, {content['rounds']} rounds. The words after the algorithm are the phase, and `one "
        f"line` is `sparsify`.\n\n{table(head, rows)}"
    )


def engines(content: Content) -> str:
    """Milliseconds of whole networks, and the speed-up over the fastest dense engine of the same precision."""
    batches = list(dict.fromkeys(row["batch"] for row in content["rows"]))
    found = {(row["name"], row["batch"]): row for row in content["rows"]}
    names = list(dict.fromkeys(row["name"] for row in content["rows"]))
    images = {batch: f"batch {batch}, ms" for batch in batches}
    head = ["", *(column for batch in batches for column in (images[batch], "speed-up"))]
    rows = []
    for name in names:
        cells = [found.get((name, batch)) for batch in batches]
        shown = [pair for row in cells for pair in _engine_cells(row)]
        rows.append(
            [
                name.replace(" 0%", ", dense")
                .replace(" blocks 16", ", blocks 16 × 16")
                .replace(" blocks 4x16", ", blocks 4 × 16"),
                *shown,
            ]
        )
    return (
        f"{content['cores']} cores. The speed-up is over the fastest dense engine of the same precision.\n\n"
        f"{table(head, rows)}"
    )


def _engine_cells(row: Content | None) -> tuple[str, str]:
    if row is None:
        return "-", "-"
    # No engine has bfloat16 on processors without it.
    ratio = quartiles(row["to_engine"]) if row["to_engine"] else "no engine"
    return significant(row["ms"]["median"]), ratio


def gpu_products(content: Content) -> str:
    """One kernel times a batch on a GPU, by block size and sparsity."""
    head = ["rows of x", "block", "sparsity", "dense, µs", "by blocks, µs", "speed-up", "queued"]
    cells = sorted(content["cells"], key=lambda c: (c["batch"], c["block"], c["sparsity"]))
    rows = [
        [
            *(f"{c['batch']:,}", f"{c['block']} × {c['block']}", f"{c['sparsity']:.0%}"),
            *(significant(c["dense_us"]), significant(c["pallas_us"]), f"{c['pallas_times_as_fast']:.2f}"),
            "yes" if c["queued"] else "no",
        ]
        for c in cells
    ]
    side = cells[0]["side"]
    return (
        f"A {side} × {side} kernel in {content['dtype']} against cuBLAS's dense product. {_sentence(content['note'])}"
        f"\n\n{table(head, rows)}"
    )


def feed_forward(content: Content) -> str:
    """A feed-forward block on a GPU, by number of tokens."""
    head = ["tokens", "dense, µs", "pruned, µs", "speed-up"]
    rows = [
        [
            f"{r['tokens']:,}",
            significant(r["dense_us"]),
            significant(r["pruned_us"]),
            quartiles(r["times_as_fast"]),
        ]
        for r in content["rows"]
    ]
    block = content["block"]
    return (
        f"Llama-3.1-8B's shape, {content['features']} to {content['hidden']} and back, {content['sparsity']:.0%} of "
        f"the {block} × {block} blocks zero, {content['dtype']}. {_sentence(content['note'])}\n\n{table(head, rows)}"
    )


def recipes(content: Content) -> str:
    """Mean and standard error over seeds of the confirming cells: a line a variant, a column a cell."""
    rows = content["confirming"]
    cells = list(dict.fromkeys((r["data"], r["block"], r["sparsity"]) for r in rows))
    found = {(r["variant"], r["data"], r["block"], r["sparsity"]): r["values"] for r in rows}
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    head = ["", *(f"{data.replace('_', ' ')}, {b} × {b}, {sparsity:.0%}" for data, b, sparsity in cells)]
    lines = [[v, *(mean_error(found.get((v, *cell))) for cell in cells)] for v in variants]
    chosen = ", ".join(f"{family}: `{variant}`" for family, variant in content["chosen"].items())
    seeds = len(rows[0]["seeds"])
    return (
        "Test accuracy of Fashion-MNIST and AUC of planted click data in percent, mean ± standard error over "
        f"{seeds} seeds. Chosen on other cells and seeds: {chosen}. See [which recipe](choosing.md)."
        f"\n\n{table(head, lines)}"
    )


def serve_accuracy(content: Content) -> str:
    """Accuracy of one network in each precision."""
    rows = [
        [name.replace("model", "the model itself"), f"{r['top1']:.2f}", f"{r['changed']:.2f}"]
        for name, r in content["rows"].items()
    ]
    block = " × ".join(map(str, content["block"]))
    return (
        f"`configs/{content['config']}.py`, {block} blocks, {content['sparsity']:.0%}; {content['test_images']:,} test "
        f"images.\n\n{table(['', 'test accuracy, %', 'predictions changed, %'], rows)}"
    )


def one_shot(content: Content) -> str:
    """Mean over seeds of the test metric: a line a network, block size and variant, a column a sparsity."""
    rows = content["rows"]
    sparsities = sorted({r["sparsity"] for r in rows if r["variant"] != "dense"})
    lines = []
    for network, block, variant in dict.fromkeys((r["network"], r["block"], r["variant"]) for r in rows):
        mine = [r for r in rows if (r["network"], r["block"], r["variant"]) == (network, block, variant)]
        values = [[r["metric"] for r in mine if r["sparsity"] in (s, 0.0)] for s in sparsities]
        lines.append(
            [network, f"{block} × {block}", variant, *(f"{statistics.mean(v):.3f}" if v else "-" for v in values)]
        )
    head = ["network", "block", "method", *(f"{s:.0%}" for s in sparsities)]
    seeds = f"mean of {content['seeds']} seeds" if content["seeds"] > 1 else "one seed"
    return (
        f"Test accuracy, for bytes bits per byte (lower is better), {seeds}. "
        f"`a tenth`: trained for a tenth of the dense network's steps.\n\n{table(head, lines)}"
    )


def sweep(content: Content) -> str:
    """Tables of a sweep of `experiments.reproduce`, the paper's figures in them, and what is ahead of what."""
    parts = sweep_page.parts(*sweep_page.of_json(content))
    shown = [(kind, part) for kind, part in parts if kind in ("text", "table")]
    return sweep_page.markdown(shown[:-1]).strip()  # the last is of files beside the page


SECTIONS: tuple[tuple[str, str, str, Callable[[Content], str]], ...] = (
    ("Training step", "train_step", "train_step", train_step),
    (
        "Training step of the byte GPT",
        "train_step_gpt",
        "train_step --workloads=gpt,gpt_scanned --name=train_step_gpt",
        train_step,
    ),
    (
        "Whole networks: ResNet-50 on an EPYC (Zen 5)",
        "serve_engines_resnet50",
        "serve_engines --network=resnet50 --batches=1,32",
        engines,
    ),
    (
        "Whole networks: ResNet-50 on a Xeon (Emerald Rapids without AMX)",
        "serve_engines_resnet50_xeon",
        "serve_engines --network=resnet50 --batches=1,32",
        engines,
    ),
    (
        "Whole networks: ResNet-50 on an EPYC with AVX2 only (Zen 3)",
        "serve_engines_resnet50_avx2",
        "serve_engines --network=resnet50 --batches=1 --blocks=16 --sparsities=0,0.8,0.9 --precisions=float32,int8",
        engines,
    ),
    (
        "Whole networks: BERT-base's shape on the EPYC",
        "serve_engines_bert",
        "serve_engines --network=bert --batches=1",
        engines,
    ),
    (
        "Whole networks: BERT-base's shape on the Xeon",
        "serve_engines_bert_xeon",
        "serve_engines --network=bert --batches=1",
        engines,
    ),
    (
        "Whole networks: BERT-base's shape on the EPYC with AVX2 only",
        "serve_engines_bert_avx2",
        "serve_engines --network=bert --batches=1 --blocks=16 --sparsities=0,0.9 --precisions=float32,int8",
        engines,
    ),
    (
        "Whole networks: all-MiniLM-L6-v2's shape on the EPYC with AVX2 only",
        "serve_engines_minilm_avx2",
        "serve_engines --network=minilm --batches=1 --blocks=4x16,16 --sparsities=0,0.5,0.7,0.8 "
        "--precisions=float32,int8",
        engines,
    ),
    (
        "Whole networks: MobileNetV2 on an EPYC (Zen 5)",
        "serve_engines_mobilenetv2",
        "serve_engines --network=mobilenetv2 --batches=1 --blocks=16,4x16 --sparsities=0,0.8 "
        "--min_blocks=16 --precisions=float32",
        engines,
    ),
    ("Products on a GPU", "block_sparse_matmul_gpu", "block_sparse_matmul_gpu", gpu_products),
    ("A feed-forward block on a GPU", "feed_forward_gpu", "feed_forward_gpu", feed_forward),
    ("Recipes", "recipes", "recipes", recipes),
    ("Accuracy of a served network", "serve_accuracy", "serve_accuracy", serve_accuracy),
    (
        "Accuracy of a served network with AVX2 only: int8 weights of 7 and of 8 bits",
        "serve_accuracy_convnet",
        "serve_accuracy --config=configs/cifar10.py --name=serve_accuracy_convnet",
        serve_accuracy,
    ),
    ("Pruning without training", "one_shot", "one_shot", one_shot),
    ("Table 1 at small scale", "table1_small", "experiments.reproduce table1 --scale=small", sweep),
    ("Table 2 at small scale", "table2_small", "experiments.reproduce table2 --scale=small", sweep),
    ("Table 3 at small scale", "table3_small", "experiments.reproduce table3 --scale=small", sweep),
    ("Table 4 at small scale", "table4_small", "experiments.reproduce table4 --scale=small", sweep),
    ("A GPT on bytes", "bytes_small", "experiments.reproduce bytes --scale=small", sweep),
)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, name, command, section in SECTIONS:
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        content = json.loads(file.read_text())
        picture = f"\n![{title}](../benchmarks/results/{name}.png)\n" if file.with_suffix(".png").exists() else ""
        module = "" if command.startswith("experiments.") else "benchmarks."
        made = f"`python -m {module}{command}`; {provenance(content)}"
        parts.append(f"## {title}\n\n{section(content)}\n{picture}\n{made}.\n")
    return "\n".join(parts)


def provenance(content: Content) -> str:
    """When, on what and with what a file was measured."""
    versions = dict(content["versions"])
    device = versions.pop("device")
    return f"{content['date']}, {device}, {', '.join(f'{name} {version}' for name, version in versions.items())}"


def table(head: Row, rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quartiles(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['q25']:.2f}–{ratio['q75']:.2f})"


def significant(value: float) -> str:
    """Three significant digits, more where the number has more before its point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def mean_error(values: Sequence[float] | None) -> str:
    """Mean and standard error in percent."""
    if not values:
        return "-"
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{100 * statistics.mean(values):.2f} ± {100 * error:.2f}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def main(arguments: Sequence[str]) -> int:
    text = page()
    if "--check" not in arguments:
        files.write_text(PAGE, text)
        print(PAGE)
        return 0
    if not PAGE.exists() or PAGE.read_text() != text:
        print(f"{PAGE} is not what benchmarks/results give: run `python -m benchmarks.page`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
