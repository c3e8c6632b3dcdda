"""Inference speed of a pruned network: dense, with folded layers, and by its blocks.

    python -m experiments.main --config=configs/mnist.py --workdir=runs/mnist
    python -m experiments.serve_bench --config=configs/mnist.py --weights=runs/mnist/pruned.safetensors
    python -m experiments.serve_bench --config=configs/resnet50_block32.py --blocks=16,32,64 --batches=1,32

The second command measures the network from the run of the first. Without `--weights` the network gets random weights
with random blocks set to zero, for every requested block size and sparsity: speed does not depend on the values. It
needs no data.
`model` is the network as trained, with zeros multiplied; `folded` has batch normalisation and ReLU folded into its
layers; `sparse` also multiplies by blocks where that is faster. They alternate, and the results of the last two are
compared with the model's. Images are noise, and ids are drawn uniformly from the whole vocabulary.
Dense inference engines on all cores, ONNX Runtime and OpenVINO, alternate with them in the precision of the network.
`pip install -e '.[engines]'` installs them; `--engines=` leaves them out.
It writes `serve.json`, the choice for each layer in `layers.txt`, and `serve.png` to the output directory.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from matplotlib import pyplot as plt

import sa_plus_plus as sapp
from experiments import cli, tasks
from experiments.engines import runtimes
from experiments.outputs import progress, report
from experiments.training import sharding
from experiments.training.setup import Setup, blank, prepare, prepare_without_data
from experiments.utils import files, registry, timing
from sa_plus_plus.timing import alternate

flags.declare_key_flag("config")  # for --help
_WEIGHTS = flags.DEFINE_string("weights", "", "A pruned.safetensors of a run with this config.")
_BLOCKS = flags.DEFINE_list("blocks", ["8", "16", "32"], "Block sizes, without --weights.")
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.5", "0.8", "0.9", "0.95"], "Sparsities, without --weights.")
_BATCHES = flags.DEFINE_list("batches", ["1", "32"], "Batch sizes.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds of alternating measurement.")
_ENGINES = flags.DEFINE_list("engines", list(runtimes.ENGINES), "Dense engines to compare with; empty for none.")
_OUTPUT = flags.DEFINE_string("output", "runs/serve", "Directory for the results.")
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # relative to the largest output

Served = tuple[dict[str, Any], Setup, Callable[[], dict[str, Any]]]  # what it is, its parts, its variables


def main(argv: list[str]) -> None:
    del argv  # cli.run has refused any
    console, config = progress.console(), cli.CONFIG.value
    with cli.input_errors():
        batches = _numbers("batches", int, 1, 2**20)
        _in_range("rounds", _ROUNDS.value, 1, 2**20)
        _precision(config)
        for engine in _ENGINES.value:
            registry.check(engine, list(runtimes.ENGINES), "--engines")
        networks = list(_trained(config) if _WEIGHTS.value else _random(config))
        output = pathlib.Path(_OUTPUT.value)
        output.mkdir(parents=True, exist_ok=True)
    rows, layers = [], []
    for (about, setup, make), batch in itertools.product(networks, batches):
        row, network = measure(setup, make(), batch)
        rows.append(about | row)
        layers.append(f"{_named(rows[-1])}\n{network}\n")
        console.print("  ".join(f"{k} {v}" for k, v in _cells(rows[-1]).items()), highlight=False, soft_wrap=True)
    title = f"{config.name}, {config.model}, {jax.devices()[0].device_kind}"
    console.print(progress.table(title, [_cells(row) for row in rows]))
    content = {"config": config.name, "model": config.model, "rows": rows, "versions": report.versions()}
    files.write_json(output / "serve.json", content)
    files.write_text(output / "layers.txt", "\n".join(layers))
    if not _WEIGHTS.value:
        report.save_figure(output / "serve.png", plot(rows, title))
    console.print(f"In {output}: {', '.join(sorted(p.name for p in output.iterdir()))}", highlight=False)


def measure(setup: Setup, variables: Any, batch: int) -> tuple[dict[str, Any], sapp.sparse.Network]:
    """Seconds of each contender for one batch, and the deviation of its results from the model's."""
    model, x, precision = (
        setup.task.model,
        jnp.asarray(tasks.random_inputs(setup.task, batch)),
        _precision(setup.config),
    )

    def apply(x: jax.Array) -> Any:
        return model.apply(variables, x)

    whole = jax.jit(model.apply)
    folded, fast = sapp.specialize(apply, x, mode="never"), sapp.specialize(apply, x)
    dense = runtimes.contenders(model, variables, np.asarray(x), engines=_ENGINES.value, precisions=[precision])
    contenders: dict[str, Callable[[], Any]] = {
        "model": lambda: jax.block_until_ready(whole(variables, x)),
        "folded": lambda: jax.block_until_ready(folded(x)),
        "sparse": lambda: jax.block_until_ready(fast(x)),
        **dense.calls,
    }
    want = contenders["model"]()
    errors = {name: timing.difference(call(), want) for name, call in contenders.items()}
    for name, error in errors.items():
        if not error < _TOLERANCE[precision]:
            raise RuntimeError(f"results of {name!r} are {error:.1e} of the largest output away from the model's")
    seconds = alternate(contenders, _ROUNDS.value)
    milliseconds = {name: round(1e3 * float(np.median(taken)), 4) for name, taken in seconds.items()}
    engine = runtimes.fastest(seconds, precision)
    return {
        "batch": batch,
        **{f"{name}_ms": milliseconds[name] for name in ("model", "folded", "sparse")},
        "engines_ms": {name: milliseconds[name] for name in dense.calls},
        "engines_missing": dense.missing,
        "fastest_engine": engine,
        "engine_to_sparse": timing.spread(seconds[engine] / seconds["sparse"]) if engine else None,
        "model_to_sparse": timing.spread(seconds["model"] / seconds["sparse"]),
        "folded_to_sparse": timing.spread(seconds["folded"] / seconds["sparse"]),
        "sparse_layers": sum(choice.sparse for choice in fast.choices),
        "layers": sum(choice.rows > 0 for choice in fast.choices),
        "relative_error": errors["sparse"],
        "folded_error": errors["folded"],
        "engine_errors": {name: errors[name] for name in dense.calls},
    }, fast


def _precision(config: ml_collections.ConfigDict) -> str:
    dtype = config.model_options.get("dtype", "float32")
    if dtype not in _TOLERANCE:
        known = ", ".join(_TOLERANCE)
        raise ValueError(f"config.model_options.dtype must be one of {known} to compare results, got {dtype!r}")
    return dtype


def _trained(config: ml_collections.ConfigDict) -> Iterator[Served]:
    """The network of a file."""
    for name in ("blocks", "sparsities"):
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} is for networks of random blocks, but --weights gives one: leave out either")
    # Data that are available determine the shapes: the sizes of Criteo's vocabularies differ.
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    setup = prepare(config, mesh) if config.data.local else prepare_without_data(config)
    like = jax.eval_shape(setup.task.init, jax.random.key(0))
    variables = sapp.todense(sapp.load(_WEIGHTS.value, like={"params": like[0], **like[1]}))
    yield {"block": None, "sparsity": None}, setup, lambda: variables


def _random(config: ml_collections.ConfigDict) -> Iterator[Served]:
    """Networks with random blocks set to zero, in the kernels that would be pruned."""
    blocks, sparsities = _numbers("blocks", int, 1, 2**20), _numbers("sparsities", float, 0, 1)
    dataset = blank(config)
    for block, sparsity in itertools.product(blocks, sparsities):
        config = config.copy_and_resolve_references()
        config.sparsifier.update({"name": "random", "block": (block, block), "sparsity": sparsity})
        setup = prepare_without_data(config, dataset)
        yield {"block": block, "sparsity": sparsity}, setup, functools.partial(_drawn, setup)


def _drawn(setup: Setup) -> dict[str, Any]:
    @jax.jit
    def drawn() -> dict[str, Any]:
        params, model_state = setup.task.init(jax.random.key(0))
        # Nonzero everywhere, since batch normalisation may start with scales of zero.
        params = jax.tree.map(lambda a: a + 0.01 * jax.random.normal(jax.random.key(a.size), a.shape, a.dtype), params)
        return {"params": setup.sparsifier.finalize(*setup.sparsifier.init(params)), **model_state}

    return drawn()


def _numbers(name: str, kind: Callable[[str], Any], low: Any, high: Any) -> list[Any]:
    """The numbers of a list flag."""
    texts = flags.FLAGS[name].value
    if not texts:
        raise ValueError(f"--{name} is empty: give numbers with commas between them, or leave it out")
    numbers = []
    for text in texts:
        try:
            numbers.append(kind(text))
        except ValueError as error:
            what = "an integer" if kind is int else "a number"
            raise ValueError(f"--{name} has {text!r}, which is not {what}") from error
    return [_in_range(name, number, low, high) for number in numbers]


def _in_range(name: str, value: Any, low: Any, high: Any) -> Any:
    if not low <= value < high:
        raise ValueError(f"--{name} must be in [{low}, {high}), got {value}")
    return value


def _named(row: dict[str, Any]) -> str:
    what = "trained weights" if row["block"] is None else f"blocks {row['block']}, sparsity {row['sparsity']:.0%}"
    return f"{what}, batch {row['batch']}"


def _cells(row: dict[str, Any]) -> dict[str, str]:
    ratio = "{median:.2f} [{q25:.2f}, {q75:.2f}]"
    engines = {f"{name.split()[0]} ms": f"{taken:.3f}" for name, taken in row["engines_ms"].items()}
    engines |= {f"{name.split()[0]} ms": reason for name, reason in row["engines_missing"].items()}
    compared = {"engine / sparse": ratio.format(**row["engine_to_sparse"])} if row["fastest_engine"] else {}
    return {
        "network": _named(row),
        "model ms": f"{row['model_ms']:.3f}",
        "folded ms": f"{row['folded_ms']:.3f}",
        "sparse ms": f"{row['sparse_ms']:.3f}",
        **engines,
        "model / sparse": ratio.format(**row["model_to_sparse"]),
        **compared,
        "sparse layers": f"{row['sparse_layers']} of {row['layers']}",
        "error": f"{row['relative_error']:.0e}",
    }


def plot(rows: list[dict[str, Any]], title: str) -> Any:
    """Plot speed-up against sparsity, one panel per batch size and one colour per block size."""
    batches, blocks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("batch", "block"))
    fig, axes = plt.subplots(1, len(batches), figsize=(4.5 * len(batches), 4), layout="constrained", squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for i, block in enumerate(blocks):
            mine = [row for row in rows if (row["batch"], row["block"]) == (batch, block)]
            _line(axis, mine, "model_to_sparse", color=f"C{i}", label=f"blocks {block}")
            _line(axis, [row for row in mine if row["engine_to_sparse"]], "engine_to_sparse", color=f"C{i}", ls="--")
        axis.axhline(1, color="black", ls=":", lw=0.8)
        axis.set(xlabel="sparsity of the pruned kernels, %", title=f"batch {batch}", ylim=(0, None))
    measured = any(row["engine_to_sparse"] for row in rows)
    also = "\ndashed: as the fastest dense engine" if measured else ""
    axes[0, 0].set_ylabel(f"times as fast as the model in full{also}")
    axes[0, -1].legend(fontsize="small")
    fig.suptitle(title)
    return fig


def _line(axis: Any, rows: list[dict[str, Any]], key: str, **style: Any) -> None:
    """Medians and quartiles of a ratio against sparsity."""
    ratios = [row[key] for row in rows]
    spread = np.array([[r["median"] - r["q25"], r["q75"] - r["median"]] for r in ratios]).reshape(-1, 2).T
    x, middle = [100 * row["sparsity"] for row in rows], [ratio["median"] for ratio in ratios]
    axis.errorbar(x, middle, spread, marker="o", ms=3, lw=1, capsize=2, **style)


if __name__ == "__main__":
    cli.run(main)
