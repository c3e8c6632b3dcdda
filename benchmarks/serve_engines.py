r"""Whole networks: ours pruned, against dense inference engines, in each precision.

    pip install -e '.[engines]'
    python -m benchmarks.serve_engines --network=resnet50 --batches=1,32 --blocks=16 --sparsities=0,0.8,0.9
    python -m benchmarks.serve_engines --network=resnet18 --sparsities=0
    python -m benchmarks.serve_engines --network=mobilenetv2 --batches=1 --blocks=16,4x16 --sparsities=0,0.8 \
        --min_blocks=16 --precisions=float32
    python -m benchmarks.serve_engines --network=bert

ONNX Runtime and OpenVINO serve the dense network, `sapp.specialize` serves it with random blocks set to zero, and all
alternate, on all cores. Ours runs larger batches whole or in microbatches, whichever is faster in a first trial;
engines run them whole. Convolutional networks are for images of 224 pixels, `bert` is an encoder of the size of
BERT-base for sequences of 128. Weights are random, since speed does not depend on them. Each result is compared with
that of the model with the same weights, in float32. Ratios are to the fastest engine of the same precision. `--cold`
times single calls too, each after the caches were emptied.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from matplotlib import pyplot as plt

import sa_plus_plus as sapp
from benchmarks import timing
from experiments.engines import runtimes
from experiments.models import EfficientNetLite0, MobileNetV2, ResNet18, ResNet34, ResNet50
from experiments.outputs import progress, report
from experiments.utils import registry
from experiments.utils.timing import difference
from sa_plus_plus import plan_options
from sa_plus_plus.contrib.transformers.encoder import Encoder

NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {  # and the shape of an input
    "resnet50": (ResNet50(classes=1000), (224, 224, 3)),
    "resnet34": (ResNet34(classes=1000), (224, 224, 3)),
    "resnet18": (ResNet18(classes=1000), (224, 224, 3)),
    "mobilenetv2": (MobileNetV2(classes=1000), (224, 224, 3)),
    "efficientnet_lite0": (EfficientNetLite0(classes=1000), (224, 224, 3)),
    "bert": (Encoder(), (128, 768)),
    "minilm": (Encoder(layers=6, width=384, hidden=1536), (32, 384)),
}
TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 0.1,
    "int8": 0.5,
}  # relative to the largest output; more than that is a mistake, not rounding

NETWORK = flags.DEFINE_enum("network", "resnet50", list(NETWORKS), "What is served.")
BATCHES = flags.DEFINE_list("batches", ["1", "32"], "Batch sizes.")
BLOCKS = flags.DEFINE_list("blocks", ["16"], "Blocks: `16` for a square, or rows and columns, `4x16`.")
MIN_BLOCKS = flags.DEFINE_integer("min_blocks", plan_options.MIN_BLOCKS, "Kernels with fewer blocks stay dense.")
MICROBATCHES = flags.DEFINE_list("microbatches", ["2", "4"], "Microbatch sizes to try with larger batches.")
SPARSITIES = flags.DEFINE_list("sparsities", ["0", "0.8", "0.9"], "Sparsities of our networks; 0 is the dense network.")
PRECISIONS = flags.DEFINE_list("precisions", list(runtimes.PRECISIONS), "Precisions to compare.")
ENGINES = flags.DEFINE_list("engines", list(runtimes.ENGINES), "Dense inference engines.")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds of alternating measurement.")
COLD = flags.DEFINE_bool("cold", False, "Time single calls with empty caches too.")
SAVE = flags.DEFINE_bool("save", True, "Write benchmarks/results/serve_engines_<network>.json and .png.")

Calls = dict[str, Callable[[], Any]]


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # quantization tells of every tensor
    for given, known in ((PRECISIONS, runtimes.PRECISIONS), (ENGINES, runtimes.ENGINES)):
        for name in given.value:
            registry.check(name, known, f"--{given.name}")
    console, rows = progress.console(), []
    missing: dict[str, str] = {}
    model, shape = NETWORKS[NETWORK.value]
    for batch in map(int, BATCHES.value):
        x = np.random.default_rng(0).standard_normal((batch, *shape), np.float32)
        found, absent = measure(model, x)
        rows += [{"batch": batch, **row} for row in found]
        missing |= absent
        cells = [_cells(row) for row in found] + [_cells({"name": n, "missing": why}) for n, why in absent.items()]
        console.print(progress.table(f"{NETWORK.value}, batch {batch}", cells))
    if SAVE.value:
        content = {
            "network": NETWORK.value,
            "rows": rows,
            "missing": missing,
            "cores": runtimes.threads(),
            "min_blocks": MIN_BLOCKS.value,
        }
        path = timing.save(f"serve_engines_{NETWORK.value}", content)
        report.save_figure(path.with_suffix(".png"), plot(rows))
        console.print(f"Written: {path} and .png", highlight=False, soft_wrap=True)


def measure(model: nn.Module, x: np.ndarray) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each contender, and by name the reasons why others are missing."""
    variables, whole = drawn(model, x), jax.jit(model.apply)
    want = whole(variables, x)
    dense = runtimes.contenders(
        model, variables, x, engines=ENGINES.value, precisions=PRECISIONS.value, calibration=[x]
    )
    for name, call in dense.calls.items():
        check(name, call(), want, runtimes.precision(name))
    calls: Calls = {"jax float32": lambda: jax.block_until_ready(whole(variables, x)), **dense.calls}
    missing = dict(dense.missing)
    pairs = itertools.product(map(float, SPARSITIES.value), BLOCKS.value)
    for sparsity, block in dict.fromkeys((s, b if s else "") for s, b in pairs):
        sides = [int(side) for side in block.split("x") if side]
        pruned = random_blocks(variables, (sides[0], sides[-1]), sparsity, MIN_BLOCKS.value) if sparsity else variables
        want = whole(pruned, x)
        for precision in PRECISIONS.value:
            name = f"ours {precision} {sparsity:.0%}" + (f" blocks {block}" if sparsity else "")
            calls[name] = ours(model, pruned, x, precision)
            check(name, calls[name](), want, precision)
    seconds = timing.alternate(calls, ROUNDS.value)
    rows = [row(name, seconds) for name in calls]
    if COLD.value:
        seconds = timing.alternate_cold(calls, ROUNDS.value)
        rows = [{**warm, "cold": _timed(warm["name"], seconds)} for warm in rows]
    return rows, missing


def ours(model: nn.Module, variables: Any, x: np.ndarray, precision: str) -> Callable[[], Any]:
    """Our network in a precision."""

    def apply(x: jax.Array) -> Any:
        return model.apply(variables, x)

    options: dict[str, Any] = {} if precision == "float32" else {"precision": precision, "calibration": [x]}
    example = jnp.asarray(x)

    def call(microbatch: int | None) -> Callable[[], Any]:
        fast = sapp.specialize(apply, example, mode="always", microbatch=microbatch, **options)
        return lambda: jax.block_until_ready(fast(example))

    sizes = [size for size in map(int, MICROBATCHES.value) if size < len(x) and len(x) % size == 0]
    calls: dict[int | None, Callable[[], Any]] = {size: call(size) for size in (None, *sizes)}
    if len(calls) == 1:
        return calls[None]
    seconds = timing.alternate(calls, rounds=2)
    return calls[min(calls, key=lambda size: float(np.median(seconds[size])))]


def drawn(model: nn.Module, x: np.ndarray) -> dict[str, Any]:
    """Random variables, nonzero everywhere, since batch normalisation may start with scales of zero."""
    variables = dict(jax.jit(model.init)(jax.random.key(0), x[:1]))
    noise = functools.partial(jax.tree.map, lambda a: a + 0.01 * jax.random.normal(jax.random.key(a.size), a.shape))
    return variables | {"params": noise(variables["params"])}


def random_blocks(
    variables: Any, block: int | tuple[int, int], sparsity: float, min_blocks: int = plan_options.MIN_BLOCKS
) -> dict[str, Any]:
    """The variables with random blocks set to zero, in the kernels that would be pruned."""
    sp = sapp.random(block=block, sparsity=sparsity, phases=sapp.phases.random(1), min_blocks=min_blocks)
    return variables | {"params": sp.finalize(*sp.init(variables["params"]))}


def row(name: str, seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Milliseconds of a contender, and its speed-up over the fastest engine of its precision."""
    return {"name": name, "precision": runtimes.precision(name), **_timed(name, seconds)}


def _timed(name: str, seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    best = runtimes.fastest(seconds, runtimes.precision(name))
    ratio = timing.spread(seconds[best] / seconds[name]) if best else None
    return {"ms": timing.spread(1e3 * seconds[name]), "to_engine": ratio}


def check(name: str, got: Any, want: Any, precision: str) -> None:
    """Fail if a contender's result is not that of the model.

    Raises:
      RuntimeError: if they differ by more than rounding.
    """
    error, most = difference(got, want), TOLERANCE[precision]
    if not error < most:
        raise RuntimeError(f"results of {name!r} are {error:.1e} of the largest output away from the model's")


def _cells(row: dict[str, Any]) -> dict[str, str]:
    if "missing" in row:
        return {"contender": row["name"], "ms": row["missing"], "times as fast as the engine": ""}
    text = "{median:.2f} [{q25:.2f}, {q75:.2f}]"
    cells = {"contender": row["name"]}
    for title, timed in (("", row), ("cold: ", row.get("cold"))):
        if timed:
            ratio = text.format(**timed["to_engine"]) if timed["to_engine"] else "no engine"
            cells |= {f"{title}ms": text.format(**timed["ms"]), f"{title}times as fast as the engine": ratio}
    return cells


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plot milliseconds, one panel per batch size and one colour per precision; engines and JAX are hatched."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    height = 1 + 0.25 * len(rows) / len(batches)
    fig, axes = plt.subplots(1, len(batches), figsize=(7 * len(batches), height), layout="constrained", squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        mine = sorted((row for row in rows if row["batch"] == batch), key=_order)
        for i, each in enumerate(mine):
            milliseconds, ratio = each["ms"]["median"], each["to_engine"]
            color = f"C{runtimes.PRECISIONS.index(each['precision'])}"
            hatch = None if each["name"].startswith("ours") else "///"
            axis.barh(i, milliseconds, color=color, alpha=0.6, hatch=hatch)
            digits = 1 if milliseconds < 100 else 0
            label = f" {milliseconds:,.{digits}f} ms" + (f", {ratio['median']:.2f}×" if ratio else "")
            axis.text(milliseconds, i, label, va="center", fontsize="small")
        axis.set_yticks(range(len(mine)), [each["name"] for each in mine], fontsize="small")
        axis.invert_yaxis()
        axis.margins(x=0.4)
        axis.set(xlabel="ms, and times as fast as the fastest engine of the precision", title=f"batch {batch}")
    fig.suptitle(f"{NETWORK.value}, {runtimes.threads()} cores")
    return fig


def _order(row: dict[str, Any]) -> int:
    return runtimes.PRECISIONS.index(row["precision"])


if __name__ == "__main__":
    app.run(main)
