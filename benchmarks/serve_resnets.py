"""ResNet-50 pruned and smaller dense networks, all in one run: whose milliseconds can be compared.

    pip install -e '.[engines]'
    python -m benchmarks.serve_resnets --precisions=float32,int8
    python -m benchmarks.resnets     # fills in the page

The networks are those of `benchmarks.resnets`, at 80 and 90%, for images of 224 pixels: the dense ones in ONNX Runtime,
OpenVINO and ours, the pruned ones, with as many blocks zeroed at random, in ours. All take turns on all cores. The
other flags are those of `benchmarks.serve_engines`.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from rich.console import Console

from benchmarks import resnets, serve_engines, timing
from experiments.engines import runtimes
from experiments.outputs import progress

SPARSITIES = (0.0, 0.8, 0.9)
NAME = flags.DEFINE_string("name", "serve_resnets", "Write benchmarks/results/<name>.json.")


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # quantization tells of every tensor
    console = progress.console()
    rows: list[dict[str, Any]] = []
    for batch in map(int, serve_engines.BATCHES.value):
        found = measure(batch, console)
        rows += found
        text = "{median:.2f} [{q25:.2f}, {q75:.2f}]"
        cells = [{"network": r["network"], "engine": r["engine"], "ms": text.format(**r["ms"])} for r in found]
        console.print(progress.table(f"batch {batch}", cells))
    path = timing.save(NAME.value, {"rows": rows, "cores": runtimes.threads()})
    console.print(f"Written: {path}", highlight=False, soft_wrap=True)


def measure(batch: int, console: Console) -> list[dict[str, Any]]:
    """A row for each network and engine."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    x = np.random.default_rng(0).standard_normal((batch, 224, 224, 3), np.float32)
    for network in resnets.networks():
        if network.sparsity in SPARSITIES:
            console.print(f"preparing {network.name}, batch {batch}", highlight=False)
            calls |= {(network.name, engine): call for engine, call in contenders(network, x).items()}
    seconds = timing.alternate(calls, serve_engines.ROUNDS.value)
    return [
        {
            "batch": batch,
            "network": network,
            "engine": engine,
            "precision": runtimes.precision(engine),
            "ms": timing.spread(1e3 * each),
            "rounds": [round(1e3 * s, 3) for s in each.tolist()],
        }
        for (network, engine), each in seconds.items()
    ]


def contenders(network: resnets.Network, x: np.ndarray) -> serve_engines.Calls:
    """By engine and precision, the network's calls."""
    model, _ = serve_engines.NETWORKS[network.architecture.lower()]
    variables, precisions = serve_engines.drawn(model, x), serve_engines.PRECISIONS.value
    calls: serve_engines.Calls = {}
    if network.sparsity:
        variables = serve_engines.random_blocks(variables, resnets.BLOCK, network.sparsity)
    else:
        engines = serve_engines.ENGINES.value
        calls |= runtimes.contenders(model, variables, x, engines=engines, precisions=precisions, calibration=[x]).calls
    calls |= {f"ours {p}": serve_engines.ours(model, variables, x, p) for p in precisions}
    want = jax.jit(model.apply)(variables, x)
    for name, call in calls.items():
        serve_engines.check(f"{network.name}, {name}", call(), want, runtimes.precision(name))
    return calls


if __name__ == "__main__":
    app.run(main)
