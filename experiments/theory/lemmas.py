"""Hoff's lemma and Lemmas 2.1 to 2.3: the masked problem's minimum against the regularised one's."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.theory.instances import KINDS, SIZES, Amount, Kind, instance, keys
from sa_plus_plus.convex import greedy, group_lasso, groups, masked, penalised
from sa_plus_plus.convex.masked import Masking

LAMBDA = 0.2  # as a share of tau
MASKINGS = {"Hoff": masked.hoff(), "2.1": masked.exponential(), "2.2": masked.l1(), "2.3": masked.own_norm()}


def rows(amount: Amount) -> list[dict[str, Any]]:
    """A row for each lemma and kind of problem."""
    out = []
    for name, masking in MASKINGS.items():
        for kind in KINDS:
            run = jax.jit(functools.partial(_compare, masking=masking, kind=kind))
            values = [jax.tree.map(float, run(key)) for key in keys(1, amount.lemma_instances)]
            off = np.array([v["values"] for v in values])
            out.append(
                {
                    "lemma": name,
                    "problem": kind,
                    "instances": len(values),
                    "largest relative difference": float(off.max()),
                    "above 1e-8": int((off > 1e-8).sum()),
                    "mapped there": max(v["there"] for v in values),
                    "mapped back": max(v["back"] for v in values),
                    "largest distance of minimisers": max(v["distance"] for v in values),
                }
            )
    return out


def _compare(key: jax.Array, masking: Masking, kind: Kind) -> dict[str, jax.Array]:
    """Both minima from two starts on every support: the loss's minimiser there, and a random one of their own."""
    problem, g = instance(key, kind)
    lam = LAMBDA * group_lasso.critical_lambda(problem, g)
    supports = np.array(list(itertools.product([1.0, 0.0], repeat=len(SIZES))))
    if masking.name == "exponential":  # its mask is never 0, so neither is a minimiser's
        supports = np.ones_like(supports)
    inside = jax.vmap(functools.partial(groups.spread, g))(jnp.asarray(supports))
    fitted = jax.vmap(lambda s: greedy.refit(problem, g, s, tol=1e-4).coefficients)(jnp.asarray(supports))
    one, two = jax.random.split(jax.random.fold_in(key, 1))

    def starts_from(key: jax.Array) -> jax.Array:
        return jnp.concatenate([fitted, jax.random.normal(key, fitted.shape) * inside])

    twice, starts = jnp.asarray(np.concatenate([supports, supports])), starts_from(one)
    found = jax.vmap(lambda w, b: masked.solve(problem, g, masking, lam, w, b))(twice, starts)
    found = jax.tree.map(lambda a: a[jnp.argmin(found.value)], found)
    if masking.penalty.name == "absolute":
        plain = group_lasso.solve(problem, g, lam, tol=1e-10)
    else:
        solve = functools.partial(penalised.solve, problem, g, masking.penalty, masking.factor * lam, "sum")
        plain = jax.vmap(solve)(starts_from(two))
        plain = jax.tree.map(lambda a: a[jnp.argmin(plain.value)], plain)
    w, b = masked.split(masking, g, plain.coefficients)
    there = masked.objective(problem, g, masking, lam, w, b)
    back = penalised.objective(problem, g, masking.penalty, masking.factor * lam, found.coefficients, "sum")
    return {
        "values": jnp.abs(found.value - plain.value) / plain.value,
        "there": jnp.abs(there - plain.value) / plain.value,
        "back": jnp.abs(back - found.value) / found.value,
        "distance": jnp.linalg.norm(found.coefficients - plain.coefficients) / jnp.linalg.norm(plain.coefficients),
    }
