"""The time of a step as it is in a network: not that of calling a program, but what the step adds to one."""

import concurrent.futures
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
TOGETHER, TOGETHER_BYTES = 16, 1 << 28  # as many contenders are one program, if their weights are not larger
_NOISE = 1 << 16  # different numbers


class Contender(NamedTuple):
    """One way to run a step.

    Attributes:
      run: `run(inputs, weights)`, traceable.
      inputs: `inputs(drawn)` makes its inputs, a sequence of arrays or None, of the arrays `drawn(variable)`;
        traceable. The first is an array.
      weights: the tree of arrays that the network would hold for the step.
    """

    run: Callable[[Sequence[Any], Any], Any]
    inputs: Callable[[Callable[[Variable], Any]], Sequence[Any]]
    weights: Any


Timer = Callable[[int], float]  # seconds of so many runs


def normal(size: int) -> np.ndarray:
    """Normal values, float32, which repeat after a while."""
    return np.resize(np.random.default_rng(0).standard_normal(_NOISE, np.float32), size)


def _drawn(noise: Any, value: Variable) -> jax.Array:
    """Normal values of the shape and type of a variable, of `normal(_NOISE)`."""
    size = math.prod(value.shape)
    rows = jnp.broadcast_to(noise, (-(-size // _NOISE), _NOISE))
    return rows.reshape(-1)[:size].reshape(value.shape).astype(value.dtype)


def repeated(run: Callable[[Sequence[Any], Any], Any]) -> Callable[..., Any]:
    """`program(count, inputs, weights)`, which runs a step `count` times, one after another.

    A value of each result goes into the next run's input, and the other operands pass a barrier, so that no compiler
    moves a part out of the loop. The result is the first value of the last run's.
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
        last = lax.fori_loop(0, count, once, (inputs[0], jnp.zeros(y.shape, y.dtype)))[1]
        return last.reshape(-1)[:1].sum(dtype=jnp.float32)

    return program


def together(steps: Sequence[Sequence[Contender]]) -> list[list[Sequence[Contender]]]:
    """Steps, in order, in groups whose contenders become one program, for XLA takes a multiple of the time for many."""
    groups: list[list[Sequence[Contender]]] = []
    room = contenders = 0
    for step in steps:
        size, alone = sum(_bytes(one.weights) for one in step), _bytes(step[0].weights) > SMALL_BYTES
        if alone or size > room or len(step) > contenders:
            groups.append([])
            room, contenders = TOGETHER_BYTES, TOGETHER
        groups[-1].append(step)
        room, contenders = (0, 0) if alone else (room - size, contenders - len(step))  # a call of it is one run
    return groups


def lowered(group: Sequence[Sequence[Contender]]) -> Any:
    """`program(which, count, noise, weights)`, which repeats one of the contenders, ready to be compiled.

    Their inputs are made in it: XLA would copy those of all contenders in each call.
    """
    contenders = [one for step in group for one in step]

    def program(which: Any, count: Any, noise: Any, weights: Sequence[Any]) -> Any:
        def branch(one: Contender, weights: Any) -> Any:
            return repeated(one.run)(count, one.inputs(functools.partial(_drawn, noise)), weights)

        return lax.switch(which, [functools.partial(branch, *pair) for pair in zip(contenders, weights, strict=True)])

    return jax.jit(program).lower(np.int32(0), np.int32(0), normal(_NOISE), [one.weights for one in contenders])


def compiled(programs: Iterable[Any]) -> list[Any]:
    """Lowered programs, compiled by as many threads as there are processors, while the next ones are lowered."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(program.compile) for program in programs]
        for future in progress.each(concurrent.futures.as_completed(futures), "compiling program", len(futures)):
            future.result()  # raises its error
    return [future.result() for future in futures]


def seconds_of(program: Any, group: Sequence[Sequence[Contender]], network_bytes: int) -> Iterator[tuple[float, ...]]:
    """Seconds that a run of each contender of a step takes in a network, for one step after another.

    Contenders take turns, and the fastest round counts.

    Args:
      program: of the group, compiled.
      group: the steps, each with two or more contenders; the first has the weights in full.
      network_bytes: of all weights of the network, in full.
    """
    weights, number = [one.weights for step in group for one in step], itertools.count()
    for step in group:
        size = _bytes(step[0].weights)
        copies = max(1, min(network_bytes, CACHE_BYTES) // size) if size > SMALL_BYTES else 1
        rounds = alternated([_timer(program, next(number), weights, copies) for _ in step])
        yield tuple(rounds.min(0).tolist())  # what else the machine does only adds time


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


def _timer(program: Any, which: int, weights: Sequence[Any], copies: int) -> Timer:
    """The timer of one of a program's contenders.

    The call itself and the making of the inputs are in its time, in that of every contender of a step. Weights larger
    than a core's cache come from further away in a network each time that it runs: here each run takes another copy.
    """
    others = [jax.tree.map(lambda a: jax.device_put(np.array(a)), weights[which]) for _ in range(copies - 1)]
    several = itertools.cycle([weights, *([*weights[:which], other, *weights[which + 1 :]] for other in others)])
    noise, number, one = jax.device_put((normal(_NOISE), np.int32(which), np.int32(1)))

    def timer(count: int) -> float:
        runs, calls = (np.int32(count), 1) if copies == 1 else (one, count)
        began = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(program(number, runs, noise, next(several)))
        return time.perf_counter() - began

    return timer


def _bytes(weights: Any) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(weights))
