"""ALPS: choose blocks by ADMM with an exact projection onto the largest blocks, then refit by conjugate gradients.

Meng et al., NeurIPS 2024: ALPS, improved optimisation for highly sparse one-shot pruning; here with blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus import select
from sa_plus_plus.oneshot.layers import Problem, Solved, magnitude, refitted, top

FIRST_PENALTY = 0.1  # relative to a Hessian with ones on its diagonal
CHECK_EVERY = 3  # iterations between checks of how much the choice still changes
MOST_LOOKS = 200  # by then the penalty dominates; a few tens are usual
LARGE, LARGE_GROWTH = 1.5e11, 1.3  # above this many operations per solve, the penalty grows faster
ROUNDS = 100  # limit on iterations of conjugate gradients
TOLERANCE = 1e-5  # relative residual of each column


def alps(problem: Problem, kept: int) -> Solved:
    """Mask and weights by ALPS, never worse than the largest blocks with refitted weights.

    ADMM on `min tr((V - W)^T H (V - W)) / 2` with `V = D`, where `D` has `kept` blocks:

        V = (H + ρI)^-1 (H W - U + ρD);  D = the largest blocks of V + U / ρ;  U += ρ (V - D)

    `H` is scaled to ones on its diagonal and `W` to about 1, and `ρ` grows until the choice no longer changes. The
    weights are then solved for with this choice and with the largest blocks, and the better result is returned.
    """
    scale = np.sqrt(np.diag(problem.hessian))
    hessian = jnp.asarray(problem.hessian / np.outer(scale, scale), jnp.float32)
    scaled = problem.weights * scale[:, None]
    unit = 2.0 ** np.frexp(np.abs(scaled).max())[1]  # a power of two, which rounds nothing
    weights = jnp.asarray(scaled / unit, jnp.float32)
    norms = magnitude(problem)
    candidates = [_admm(hessian, weights, problem.block, kept), top(norms, kept)]
    candidates = [problem.covering(mask, norms) for mask in candidates]
    if (candidates[0] == candidates[1]).all():
        candidates.pop()
    found = []
    for mask in candidates:
        solution, converged = _descend(hessian, weights, problem.spread(mask))
        back = np.asarray(solution, np.float64) * (unit / scale[:, None])
        found.append((problem.loss(back), mask, back, bool(converged)))
    _, mask, solution, converged = min(found, key=lambda candidate: candidate[0])
    return mask, solution if converged else refitted(problem, mask)


def _admm(hessian: jax.Array, weights: jax.Array, block: blk.Block, kept: int) -> np.ndarray:
    rows, cols = weights.shape
    large = rows**3 / 3 + 2.0 * rows**2 * cols > LARGE
    penalty, every = FIRST_PENALTY, 1 if large else CHECK_EVERY
    target, mask = _product(hessian, weights), _largest(weights, block, kept)
    sparse, dual = jnp.where(_spread(mask, block), weights, 0), jnp.zeros_like(weights)
    for _ in range(MOST_LOOKS):
        before, now = mask, jnp.float32(penalty)
        sparse, dual, mask = _iterate(hessian, target, sparse, dual, now, kept, block, every)
        changed = int(jnp.sum(mask & ~before))
        if not changed:
            break
        growth = 1.3 if changed >= 0.1 * kept else 1.2 if changed >= 0.005 * kept else 1.1
        penalty *= max(growth, LARGE_GROWTH) if large else growth
    return np.asarray(mask)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _iterate(
    hessian: Any, target: Any, sparse: Any, dual: Any, penalty: Any, kept: Any, block: blk.Block, iterations: int
) -> tuple[Any, Any, Any]:
    """Some iterations of ADMM with one penalty."""
    factor = jnp.linalg.cholesky(hessian + penalty * jnp.eye(len(hessian), dtype=hessian.dtype))
    mask = None
    for _ in range(iterations):
        dense = jax.scipy.linalg.cho_solve((factor, True), target - dual + penalty * sparse)
        shifted = dense + dual / penalty
        mask = _largest(shifted, block, kept)
        sparse = jnp.where(_spread(mask, block), shifted, 0)
        dual = dual + penalty * (dense - sparse)
    return sparse, dual, mask


_product = jax.jit(functools.partial(jnp.matmul, precision="highest"))


def _largest(matrix: jax.Array, block: blk.Block, kept: Any) -> jax.Array:
    return select.top_k(blk.sum_of_squares(matrix, block), kept)


def _spread(mask: jax.Array, block: blk.Block) -> jax.Array:
    return blk.expand_blocks(mask, (mask.shape[0] * block[0], mask.shape[1] * block[1]), block)


@jax.jit
def _descend(hessian: jax.Array, weights: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`H_SS V_S = (H W)_S` for each column by conjugate gradients from `W_S`, and whether all columns converged.

    The Hessian has ones on its diagonal, so nothing is gained by a diagonal preconditioner.
    """

    def times(x: jax.Array) -> jax.Array:
        return jnp.where(mask, jnp.matmul(hessian, x, precision="highest"), 0)

    def square(a: jax.Array) -> jax.Array:
        return jnp.sum(a * a, 0, keepdims=True)

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)

    start, target = jnp.where(mask, weights, 0), times(weights)
    wanted = TOLERANCE**2 * square(target)

    def unfinished(state: Any) -> jax.Array:
        return (state[0] < ROUNDS) & jnp.any(square(state[2]) > wanted)

    def step(state: Any) -> Any:
        i, x, residual, direction = state
        image, size = times(direction), square(residual)
        length = ratio(size, jnp.sum(direction * image, 0, keepdims=True))
        x, residual = x + length * direction, residual - length * image
        return i + 1, x, residual, residual + ratio(square(residual), size) * direction

    residual = times(weights - start)
    end = jax.lax.while_loop(unfinished, step, (jnp.int32(0), start, residual, residual))
    return end[1], jnp.all(square(times(weights - end[1])) <= 4 * wanted)  # not what the rounds have summed up
