"""Overhead of the training loop over its own jitted step, at about 5 ms per step.

    python -m benchmarks.loop_overhead

The bare contender calls the compiled step repeatedly on one batch that is already on the device. The loop does what it
does in a run: it draws and places batches and reads a row of metrics every `log_every` steps. A third contender also
saves a checkpoint every 100 steps. Start-up time is reported too: compilation, with an empty and with a warm cache.
"""

import functools
import pathlib
import tempfile
import time

import jax
import numpy as np
from absl import app, logging

from benchmarks import timing
from configs import mnist
from experiments.outputs import progress
from experiments.training import loop, program
from experiments.training.checkpoint import Checkpoints
from experiments.training.setup import prepare

STEPS, ROUNDS, FIRST = 400, 9, 20
BATCH = 700  # 5 ms a step on two cores


def bare(run: program.Program) -> float:
    """Seconds per step of the compiled step alone."""
    seed = program.seed_argument([0])
    state = run.functions.init(seed)
    batch = jax.device_put(
        program.next_batch(run, program.train_streams(run, [0])), next(iter(run.batch.values())).sharding
    )
    for _ in range(FIRST):
        state, _ = run.functions.step(state, batch)
    jax.block_until_ready(state)
    started = time.perf_counter()
    for _ in range(STEPS - FIRST):
        state, _ = run.functions.step(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - started) / (STEPS - FIRST)


def whole_loop(run: program.Program, save: bool) -> float:
    """Seconds per step of the training loop."""
    times = {}

    def on_step(done: int) -> bool:
        times[done] = time.perf_counter()
        return False

    with tempfile.TemporaryDirectory() as directory:
        saved = Checkpoints(pathlib.Path(directory), max_to_keep=2) if save else None
        loop.train(run, [0], loop.Hooks(on_step=on_step), saved)
        if saved:
            saved.close()
    return (times[STEPS - 1] - times[FIRST]) / (STEPS - 1 - FIRST)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    config = mnist.get_config()
    config.steps, config.eval_every, config.checkpoint_every = STEPS, STEPS, 100
    config.batch_size, config.eval_batch_size = BATCH, 1000
    setup = prepare(config)
    compile_seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for kind in ("empty", "warm"):
            jax.clear_caches()
            run = program.compiled(setup)
            compile_seconds[kind] = round(run.compile_seconds, 2)
        jax.config.update("jax_compilation_cache_dir", None)  # it goes now
    contenders = {
        "bare step": functools.partial(bare, run),
        "loop": functools.partial(whole_loop, run, False),
        "loop, saving": functools.partial(whole_loop, run, True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, measure in contenders.items():
            seconds[name].append(measure())
    base = np.array(seconds["bare step"])
    rows = [
        {
            "contender": name,
            "ms_per_step": round(1e3 * float(np.median(s)), 3),
            "ratio": timing.spread(np.array(s) / base),
        }
        for name, s in seconds.items()
    ]
    progress.console().print(progress.table(f"Loop overhead; compile seconds {compile_seconds}", rows))
    print(
        timing.save(
            "loop_overhead",
            {"steps": STEPS, "batch_size": BATCH, "rows": rows, "compile_seconds_by_cache": compile_seconds},
        )
    )


if __name__ == "__main__":
    app.run(main)
