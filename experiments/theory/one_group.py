"""Theorem 1.1: just below tau, group LASSO and objective (1) have the same single group; how far below it holds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.theory.instances import FEATURES, KINDS, SIZES, Amount, Kind, instance, keys
from sa_plus_plus.convex import group_lasso, groups, penalised, penalties, problems
from sa_plus_plus.convex.penalties import Penalty

PENALTIES = (
    penalties.absolute(),
    penalties.power(0.5),
    penalties.power(2 / 3),
    penalties.log(0.3),
    penalties.mcp(),
    penalties.scad(),
)
BROKEN = penalties.lambert()
RATIOS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
SLACK = 1e-10  # relative tolerance of objectives


def edges(amount: Amount) -> dict[str, list[float]]:
    """By kind, for each instance: the lowest lambda / tau down to which the group LASSO has at most one group."""

    def edge(key: jax.Array, kind: Kind) -> jax.Array:
        problem, g = instance(key, kind)
        tau = group_lasso.critical_lambda(problem, g)

        def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = ends
            middle = (low + high) / 2
            one = _alive(g, group_lasso.solve(problem, g, middle * tau).coefficients).sum() <= 1
            return jnp.where(one, low, middle), jnp.where(one, middle, high)

        return jax.lax.fori_loop(0, 14, halve, (jnp.zeros(()), jnp.ones(())))[1]

    out: dict[str, list[float]] = {}
    for kind in KINDS:
        run = jax.jit(functools.partial(edge, kind=kind))
        out[kind] = [float(run(key)) for key in keys(2, amount.theorem_instances)]
    return out


def rows(amount: Amount, edge: dict[str, list[float]]) -> list[dict[str, Any]]:
    """For each penalty and kind: just below tau, and at and above it."""
    out = []
    for q in (*PENALTIES, BROKEN):
        for kind in KINDS:
            run = jax.jit(functools.partial(_check, q=q, kind=kind))
            found = []
            for key, e in zip(keys(2, amount.theorem_instances), edge[kind], strict=True):
                near = max(0.97, (1 + e) / 2)  # well inside of where there is one group
                found.append({**jax.tree.map(float, run(key, near)), "ratio": near})
            out.append(
                {
                    "penalty": q.name,
                    "problem": kind,
                    "instances": len(found),
                    "one group": sum(v["active"] == 1 for v in found),
                    "of largest gradient": sum(v["right"] for v in found),
                    "found lower": sum(v["gain"] > SLACK for v in found),
                    "largest gain": max(v["gain"] for v in found),
                    "found another as low": sum(v["different"] for v in found),
                    "starts that reach it": float(np.mean([v["reached"] for v in found])),
                    "zero from tau on": sum(v["zero"] for v in found),
                }
            )
    return out


def wide(amount: Amount) -> list[dict[str, Any]]:
    """Further below tau: the share of instances whose lowest point found has one group, and which group."""
    out = []
    for q in PENALTIES:
        run = jax.jit(functools.partial(_lowest, q=q))
        shares = []
        for ratio in RATIOS:
            found = [jax.tree.map(float, run(key, ratio)) for key in keys(3, amount.wide_instances)]
            shares.append(
                {
                    "ratio": ratio,
                    "one group": float(np.mean([v["active"] == 1 for v in found])),
                    "of largest gradient": float(np.mean([v["active"] == 1 and v["right"] for v in found])),
                }
            )
        out.append({"penalty": q.name, "shares": shares})
    return out


def _alive(g: groups.Groups, beta: jax.Array) -> jax.Array:
    return groups.norms(g, beta) > 0


def _starts(key: jax.Array, g: groups.Groups) -> jax.Array:
    """Dense ones, large and small, and one in each group alone."""
    dense = jax.random.normal(key, (10, FEATURES)) * jnp.asarray([1.0] * 6 + [0.1] * 4)[:, None]
    alone = jax.vmap(functools.partial(groups.spread, g))(jnp.eye(len(SIZES)))
    return jnp.concatenate([dense, 0.1 * jax.random.normal(jax.random.fold_in(key, 1), alone.shape) * alone])


def _check(key: jax.Array, ratio: jax.Array | float, q: Penalty, kind: Kind) -> dict[str, jax.Array]:
    problem, g = instance(key, kind)
    slope = groups.norms(g, problems.gradient_at_zero(problem))
    tau = jnp.max(slope)
    starts = _starts(jax.random.fold_in(key, 7), g)

    def search(lam: jax.Array) -> group_lasso.Solution:
        return jax.vmap(functools.partial(penalised.solve, problem, g, q, lam, "composite", polished=False))(starts)

    lams = jnp.stack([ratio * tau, 1.000001 * tau, 1.3 * tau])
    convex = jax.lax.map(lambda lam: group_lasso.solve(problem, g, lam, tol=1e-10).coefficients, lams)
    lasso, above = convex[0], convex[1:]
    alive = _alive(g, lasso)
    value = penalised.objective(problem, g, q, ratio * tau, lasso, "composite")
    everywhere = jax.lax.map(search, lams)
    ends = jax.tree.map(lambda a: a[0], everywhere)
    low = ends.value <= value + SLACK * jnp.abs(value)
    away = jnp.linalg.norm(ends.coefficients - lasso, axis=1) / jnp.linalg.norm(lasso)
    at_zero = problem.value(problem.origin)
    return {
        "active": jnp.sum(alive),
        "right": jnp.all(alive == (slope == tau)),
        "gain": (value - jnp.min(ends.value)) / jnp.abs(value),
        "different": jnp.any(low & (away > 1e-2)),
        "reached": jnp.mean(low),
        "zero": jnp.all(above == 0) & (jnp.min(everywhere.value[1:]) >= at_zero * (1 - SLACK)),
    }


def _lowest(key: jax.Array, ratio: jax.Array | float, q: Penalty) -> dict[str, jax.Array]:
    problem, g = instance(key, "least squares")
    slope = groups.norms(g, problems.gradient_at_zero(problem))
    lam = ratio * jnp.max(slope)
    solve = functools.partial(penalised.solve, problem, g, q, lam, "composite", polished=False)
    ends = jax.vmap(solve)(_starts(jax.random.fold_in(key, 7), g))
    alive = _alive(g, ends.coefficients[jnp.argmin(ends.value)])
    return {"active": jnp.sum(alive), "right": jnp.all(alive == (slope == jnp.max(slope)))}
