"""The time of a step as it is in a network: not that of calling a program, but what the step adds to one."""

import concurrent.futures
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sa_plus_plus import progress
from sa_plus_plus.sparse.compiler.ir import Variable

ROUND_SECONDS = 0.01  # a step is repeated for at least so long
ROUNDS, CLEAR_ROUNDS, CLEAR = 5, 3, 1.5  # fewer rounds if in each of them one takes so many times as long
SMALL_BYTES = 1 << 20  # weights that stay in a core's cache while the rest of the network runs
CACHE_BYTES = 1 << 26  # more than the caches hold


class Contender(NamedTuple):
    """One way to run a step.

    Attributes:
      run: `run(inputs, weights)`, traceable.
      inputs: makes its inputs, a sequence of arrays or None; the first is an array.
      weights: the tree of arrays that the network would hold for the step.
    """

    run: Callable[[Sequence[Any], Any], Any]
    inputs: Callable[[], Sequence[Any]]
    weights: Any


Timer = Callable[[int], float]  # seconds of so many runs


def noise(value: Variable) -> jax.Array:
    """Normal values of the shape and type of a variable."""
    some = np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    return jnp.asarray(np.resize(some, value.shape), value.dtype)


def repeated(run: Callable[[Sequence[Any], Any], Any]) -> Callable[..., Any]:
    """`program(count, inputs, weights)`, which runs a step `count` times, one after another.

    A value of each result goes into the next run's input, and the other operands pass a barrier, so that no compiler
    moves a part out of the loop.
    """

    def program(count: Any, inputs: Sequence[Any], weights: Any) -> Any:
        def once(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            x, y = state
            if x.size and y.size:
                entry = jnp.clip(y.reshape(-1)[:1], 0, 1).astype(x.dtype)  # at most 1, so that nothing grows
                x = lax.dynamic_update_slice(x, entry.reshape((1,) * x.ndim), (0,) * x.ndim)
            operands = lax.optimization_barrier(((x, *inputs[1:]), weights))
            return x, jax.tree.leaves(run(*operands))[0]

        y = jax.tree.leaves(jax.eval_shape(run, inputs, weights))[0]
        return lax.fori_loop(0, count, once, (inputs[0], jnp.zeros(y.shape, y.dtype)))[1].reshape(-1)[:1]

    return program


def lowered(contender: Contender) -> Any:
    """The program that repeats a step, ready to be compiled."""
    return jax.jit(repeated(contender.run)).lower(np.int32(0), jax.eval_shape(contender.inputs), contender.weights)


def compiled(programs: Iterable[Any]) -> list[Any]:
    """Lowered programs, compiled by as many threads as there are processors, while the next ones are lowered."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(program.compile) for program in programs]
        for future in progress.each(concurrent.futures.as_completed(futures), "compiling program", len(futures)):
            future.result()  # raises its error
    return [future.result() for future in futures]


def seconds_of(programs: Sequence[Any], contenders: Sequence[Contender], network_bytes: int) -> tuple[float, ...]:
    """Seconds that a run of each contender takes in a network, in the fastest round; they take turns.

    Args:
      programs: of the contenders, compiled; the first has the weights in full.
      contenders: two or more.
      network_bytes: of all weights of the network, in full.
    """
    size = sum(a.nbytes for a in jax.tree.leaves(contenders[0].weights))
    copies = max(1, min(network_bytes, CACHE_BYTES) // size) if size > SMALL_BYTES else 1
    rounds = alternated([_timer(*pair, copies) for pair in zip(programs, contenders, strict=True)])
    return tuple(rounds.min(0).tolist())  # what else the machine does only adds time


def alternated(timers: Sequence[Timer], round_seconds: float = ROUND_SECONDS) -> np.ndarray:
    """`(rounds, timers)`: seconds of a run by each timer, in rounds in which they take turns.

    Args:
      timers: two or more.
      round_seconds: the least duration of a round.
    """
    counts, rounds = [_count(timer, round_seconds) for timer in timers], []
    for number in range(1, ROUNDS + 1):
        seconds = []
        for timer, count in zip(timers, counts, strict=True):
            if count > 1:
                timer(1)  # threads of the one before may still be waiting for work
            seconds.append(timer(count) / count)
        rounds.append(seconds)
        if number == CLEAR_ROUNDS and _clear(np.array(rounds)):
            break
    return np.array(rounds)


def _clear(rounds: np.ndarray) -> bool:
    """Whether the same one is far ahead in every round."""
    first, second = np.sort(rounds, 1)[:, :2].T
    return bool((second > CLEAR * first).all() and np.ptp(rounds.argmin(1)) == 0)


def _count(timer: Timer, round_seconds: float) -> int:
    """How many runs last for a round."""
    timer(1)
    count = 1
    for _ in range(2):  # the first time tells that of a call rather than that of a run
        count = math.ceil(count * round_seconds / max(timer(count), 1e-9))
        if count == 1:
            break
    return count


def _timer(program: Any, contender: Contender, copies: int) -> Timer:
    """The timer of a compiled program. Weights larger than a core's cache come from further away in a network each
    time that it runs: here each run takes another copy."""
    inputs = contender.inputs()
    weights = [contender.weights]
    weights += [jax.tree.map(lambda a: jnp.asarray(np.array(a)), contender.weights) for _ in range(copies - 1)]
    several, one = itertools.cycle(weights), jnp.int32(1)

    def timer(count: int) -> float:
        runs, calls = (jnp.int32(count), 1) if copies == 1 else (one, count)
        began = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(program(runs, inputs, next(several)))
        return time.perf_counter() - began

    return timer
