"""Block selection: exact top-k by bisection against sorting, on one CPU core if run under `taskset`.

taskset -c 0 python -m benchmarks.selection
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

import sa_plus_plus as sapp
from benchmarks import timing
from experiments.outputs import progress


@jax.jit
def by_sorting(scores: jax.Array, k: jax.Array) -> jax.Array:
    """The same mask by a stable descending sort."""
    order = jnp.argsort(-scores, stable=True)
    return jnp.zeros(scores.shape, bool).at[order].set(jnp.arange(scores.size) < k)


def main(argv: list[str]) -> None:
    del argv
    bisect, rows = jax.jit(sapp.select.top_k), []
    for n in (10_000, 400_000, 1_600_000):
        scores = jnp.asarray(np.random.default_rng(0).standard_normal(n), jnp.float32)
        k = jnp.asarray(n // 10)
        np.testing.assert_array_equal(bisect(scores, k), by_sorting(scores, k))
        calls = {
            name: functools.partial(lambda fn, *args: jax.block_until_ready(fn(*args)), fn, scores, k)
            for name, fn in (("bisection", bisect), ("sort", by_sorting))
        }
        seconds = timing.alternate(calls, rounds=11)
        rows.append(
            {"blocks": n}
            | {f"{name}_ms": round(1e3 * float(np.median(s)), 2) for name, s in seconds.items()}
            | {"sort_over_bisection": timing.spread(seconds["sort"] / seconds["bisection"])["median"]}
        )
    progress.console().print(progress.table("Exact top-k", rows))
    print(timing.save("selection", {"rows": rows}))


if __name__ == "__main__":
    app.run(main)
