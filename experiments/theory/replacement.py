"""Theorem B.3: the guarantee for OMPR, its bound on the rounds, and the rounds needed."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.theory.instances import Amount, keys
from sa_plus_plus.convex import constants, greedy, groups, problems
from sa_plus_plus.convex.problems import Problem

GROUPS, SIZE, ROUNDS, STARTS = 8, 2, 40, 6
EPS = 1e-3  # relative to the distance from the loss at 0 to the best
SETTINGS = (  # kind, samples, groups to compete with, correlation, ridge
    ("least squares", 400, 1, 0.0, 0.0),
    ("least squares", 4000, 1, 0.3, 0.0),
    ("least squares", 4000, 2, 0.0, 0.0),
    ("logistic", 400, 1, 0.0, 0.5),
    ("logistic", 400, 2, 0.0, 1.5),
)


def rows(amount: Amount) -> list[dict[str, Any]]:
    """A row for each setting, with the rounds of each run for the figure."""
    g, out = groups.equal(GROUPS * SIZE, SIZE), []
    for kind, samples, k, correlation, ridge in SETTINGS:
        runs: list[dict[str, Any]] = []
        without = 0
        for key in keys(4, amount.promise_instances):
            x, y = _data(key, kind, samples, k, correlation)
            problem = _problem(kind, x, y, ridge)
            promise = constants.guarantee(problem, g, k)
            if promise is None:
                without += 1
                continue
            best = float(_best(problem, g, k))
            eps = EPS * (float(problem.value(problem.origin)) - best)
            for size in range(k, promise.size + 1):
                values = np.asarray(_ompr(problem, g, jax.random.fold_in(key, size), size))
                for v in values:
                    reached = np.flatnonzero(v <= best + eps)
                    runs.append(
                        {
                            "size": size,
                            "promised_size": promise.size,
                            "promised_rounds": promise.rounds(v[0] - best, eps),
                            "rounds": int(reached[0]) if reached.size else None,
                        }
                    )
        full = [r for r in runs if r["size"] == r["promised_size"]]
        kept = [r for r in full if r["rounds"] is not None and r["rounds"] <= r["promised_rounds"]]
        least = [r for r in runs if r["size"] == k]
        out.append(
            {
                "problem": kind,
                "samples": samples,
                "k": k,
                "ridge": ridge,
                "instances": amount.promise_instances - without,
                "no k' below all": without,
                "k'": _range([r["promised_size"] for r in full]),
                "R": _range([r["promised_rounds"] for r in full]),
                "runs": len(full),
                "bound holds": len(kept),
                "rounds taken, at most": max((r["rounds"] for r in kept), default=None),
                "reached with k' = k": f"{sum(r['rounds'] is not None for r in least)} of {len(least)}",
                "each": _counted(runs),
            }
        )
    return out


def _counted(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Equal runs merged, with their number."""
    counts = collections.Counter(tuple(r.items()) for r in runs)
    return [{**dict(items), "runs": count} for items, count in counts.items()]


def _range(values: list[int]) -> str:
    if not values:
        return "–"
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def _data(key: jax.Array, kind: str, samples: int, k: int, correlation: float) -> tuple[jax.Array, jax.Array]:
    a, b, c, d = jax.random.split(key, 4)
    p = GROUPS * SIZE
    x = jax.random.normal(a, (samples, p)) + correlation / np.sqrt(p) * jax.random.normal(d, (samples, 1))
    beta = jnp.repeat(greedy.random_support(b, GROUPS, k), SIZE) * jax.random.normal(c, (p,))
    y = x @ beta + jax.random.normal(jax.random.fold_in(c, 1), (samples,))
    return x, y if kind == "least squares" else (y > 0).astype(x.dtype)


def _problem(kind: str, x: jax.Array, y: jax.Array, ridge: float) -> Problem:
    return problems.least_squares(x, y, ridge) if kind == "least squares" else problems.logistic(x, y, ridge)


def _best(problem: Problem, g: groups.Groups, k: int) -> jax.Array:
    return greedy.brute_force(problem, g, k, batch=8).value


@jax.jit
def _ompr(problem: Problem, g: groups.Groups, key: jax.Array, size: jax.Array | int) -> jax.Array:
    """Losses by round, `(starts, rounds + 1)`, from random supports."""
    supports = jax.vmap(lambda k: greedy.random_support(k, GROUPS, size))(jax.random.split(key, STARTS))
    run = functools.partial(greedy.ompr, problem, g)
    return jax.vmap(lambda s: run(s, ROUNDS, tol=1e-6).values)(supports)
