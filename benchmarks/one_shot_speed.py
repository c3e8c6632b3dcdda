"""Time and peak memory of pruning one large layer without training.

    python -m benchmarks.one_shot_speed [--size=4096] [--block=16] [--sparsities=0.5,0.7]

A kernel of `size × size` normal weights, and twice as many rows of correlated inputs. Each measurement runs in its own
process, whose peak memory is the maximum reported by the system. Writes
benchmarks/results/one_shot_speed.json.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import sa_plus_plus as sapp
from benchmarks import timing
from experiments.outputs import progress

_SIZE = flags.DEFINE_integer("size", 4096, "Inputs and outputs.")
_BLOCK = flags.DEFINE_integer("block", 16, "Side of a block.")
_SPARSITIES = flags.DEFINE_list("sparsities", ["0.5", "0.7"], "Sparsities.")
_METHODS = flags.DEFINE_list("methods", ["magnitude", "wanda", "obs", "alps"], "Methods.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes for each.")
_NAME = flags.DEFINE_string("name", "one_shot_speed", "Name of the result file; empty for none.")
_ALONE = flags.DEFINE_bool("alone", False, "Measure the first method and sparsity in this process, as JSON.")


def measure() -> dict[str, float]:
    """Seconds of the second and third steps, and the process's peak memory."""
    keys, size = jax.random.split(jax.random.key(0), 3), _SIZE.value
    kernel = jax.random.normal(keys[0], (size, size))
    mixing = jnp.eye(size) + jax.random.normal(keys[1], (size, size)) / size**0.5
    x = jax.nn.relu(jax.random.normal(keys[2], (2 * size, size)) @ mixing)
    before = jax.block_until_ready((kernel, x)) and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    found = sapp.one_shot(
        lambda params, x: x @ params["kernel"],
        {"kernel": kernel},
        [x],
        block=_BLOCK.value,
        sparsity=float(_SPARSITIES.value[0]),
        method=_METHODS.value[0],
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(seconds, 2),
        "peak_gib": round(peak / 2**20, 2),
        "before_gib": round(before / 2**20, 2),
        "error": round(found.layers[0].error, 5),
    }


def main(argv: list[str]) -> None:
    if _ALONE.value:
        print(json.dumps(measure()))
        return
    console = progress.console()
    rows: list[dict[str, Any]] = []
    for method in _METHODS.value:
        for sparsity in _SPARSITIES.value:
            each = []
            for _ in range(_ROUNDS.value):
                line = [sys.executable, "-m", "benchmarks.one_shot_speed", "--alone"]
                line += [f"--size={_SIZE.value}", f"--block={_BLOCK.value}"]
                line += [f"--methods={method}", f"--sparsities={sparsity}"]
                done = subprocess.run(line, capture_output=True, text=True, check=True)
                each.append(json.loads(done.stdout.splitlines()[-1]))
            about = {"method": method, "sparsity": float(sparsity)}
            rows.append(about | {key: [one[key] for one in each] for key in each[0]})
            console.print(rows[-1], highlight=False, soft_wrap=True)
    if _NAME.value:
        timing.save(_NAME.value, {"size": _SIZE.value, "block": _BLOCK.value, "rows": rows})
    console.print(progress.table(f"{_SIZE.value} × {_SIZE.value}, blocks of {_BLOCK.value}", rows))


if __name__ == "__main__":
    app.run(main)
