"""From a file to the first answer: loading, first call and later calls, each in a fresh process.

    python -m benchmarks.serve_load

ResNet-50 for one image of 224 pixels, random weights, 90% of random 16 × 16 blocks zero. Once without and once with
JAX's persistent compilation cache, filled by an earlier process. Times start after imports.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import sa_plus_plus as sapp
from benchmarks import serve_engines, timing
from experiments.outputs import progress

PROCESSES = flags.DEFINE_integer("processes", 5, "Fresh processes for each file.")
PRECISION_NAMES = flags.DEFINE_list("served", ["float32", "int8"], "Precisions.")
CALLS = 20  # later calls, whose median is reported

LOADER = f"""
import json, sys, time, jax, numpy as np, sa_plus_plus as sapp
x = np.load(sys.argv[2])
jax.block_until_ready(jax.numpy.zeros(1))  # XLA has started
times = [time.perf_counter()]
def passed():
    times.append(time.perf_counter())
    return times[-1] - times[-2]
fast = sapp.serve.load(sys.argv[1])
load = passed()
jax.block_until_ready(fast(x))
first = passed()
later = []
for _ in range({CALLS}):
    jax.block_until_ready(fast(x))
    later.append(passed())
seconds = {{"load": load, "first call": first, "later calls": float(np.median(later)), "first answer": load + first}}
print(json.dumps(seconds))
"""


def main(argv: list[str]) -> None:
    del argv
    rows = []
    for precision in PRECISION_NAMES.value:
        with tempfile.TemporaryDirectory() as folder:
            paths = pathlib.Path(folder, "network"), pathlib.Path(folder, "x.npy")
            about = write(precision, *paths)
            rows += [{"precision": precision, **about, **row} for row in loaded(*paths)]
    path = timing.save("serve_load", {"rows": rows, "processes": PROCESSES.value, "cores": os.cpu_count()})
    progress.console().print(progress.table("serve_load", [_cells(row) for row in rows]))
    print(f"Written: {path}")


def write(precision: str, file: pathlib.Path, inputs: pathlib.Path) -> dict[str, Any]:
    """Write the network and its input to files; returns times and sizes."""
    model, shape = serve_engines.NETWORKS["resnet50"]
    x = np.random.default_rng(0).standard_normal((1, *shape), np.float32)
    variables = serve_engines.random_blocks(serve_engines.drawn(model, x), 16, 0.9)
    example = jnp.asarray(x)
    options: dict[str, Any] = {} if precision == "float32" else {"precision": precision, "calibration": [example]}
    network = sapp.specialize(lambda x: model.apply(variables, x), example, mode="always", **options)
    np.save(inputs, x)
    started = time.perf_counter()
    size = network.save(file)
    taken = time.perf_counter() - started
    weights = sum(a.nbytes for a in jax.tree.leaves(network.weights))
    return {"bytes": size, "weight_bytes": weights, "save_seconds": taken}


def loaded(file: pathlib.Path, inputs: pathlib.Path) -> list[dict[str, Any]]:
    """Seconds of each part in fresh processes, without and with a compilation cache."""
    rows = []
    for cached in (False, True):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
        if cached:
            environment |= {"JAX_COMPILATION_CACHE_DIR": str(file.parent / "cache")}
            environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "-c", LOADER, str(file), str(inputs)]
        results = []
        for number in range(PROCESSES.value + cached):
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            if number or not cached:  # the first fills the cache
                results.append(json.loads(done.stdout.splitlines()[-1]))
        seconds = {name: timing.spread(np.array([r[name] for r in results])) for name in results[0]}
        rows.append({"compilation_cache": cached, "seconds": seconds})
    return rows


def _cells(row: dict[str, Any]) -> dict[str, str]:
    cells = {"precision": row["precision"], "cache": str(row["compilation_cache"]), "MB": f"{row['bytes'] / 1e6:.1f}"}
    return cells | {name: f"{s['median']:.3f} [{s['q25']:.3f}, {s['q75']:.3f}]" for name, s in row["seconds"].items()}


if __name__ == "__main__":
    app.run(main)
