"""A whole network beside the function that it was made from: whether specialising it was worth it."""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from sa_plus_plus import progress
from sa_plus_plus.sparse.compiler.measure import alternated, compiled, normal
from sa_plus_plus.sparse.compiler.planned import Choice

WORTH = 1.1  # as many times as fast, or it is not worth it
_ROUND_SECONDS = 0.05


class Comparison(NamedTuple):
    """A function under `jax.jit` as it was given, its zeros in place, and specialised, measured in turn.

    Attributes:
      jitted_seconds: median of a call of the function under `jax.jit`, with its weights as arguments.
      fast_seconds: median of a call of the specialised network.
      difference: largest difference of their results, relative to the largest of the function's results.
      on_example: whether the inputs were those given; without values they are random, and integers are 0.
      in_float32: whether all results are.
    """

    jitted_seconds: float
    fast_seconds: float
    difference: float
    on_example: bool = True
    in_float32: bool = True

    @property
    def speedup(self) -> float:
        """How many times as fast as the function the network is."""
        return self.jitted_seconds / self.fast_seconds


def compared(fn: Callable[..., Any], network: Any, examples: Sequence[Any]) -> Comparison | None:
    """Measure both; None if the function has side effects or takes random keys without values.

    Args:
      fn: jittable, its weights closed over.
      network: the `Network` made from it, which is compiled now rather than at its first call.
      examples: inputs, or their shapes and dtypes.
    """
    closed = jax.make_jaxpr(fn)(*examples)
    leaves, tree = jax.tree.flatten(examples)
    given = not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    if closed.effects or any(_is_key(leaf) for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)):
        return None
    inputs = [_filled(leaf) for leaf in leaves]
    weights = closed.consts

    @jax.jit  # constants within a program would be compiled into it, for minutes
    def jitted(weights: Any, inputs: Any) -> Any:
        return core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, weights))(*inputs)

    arguments = jax.tree.unflatten(tree, inputs)
    compiled(lower() for lower in (lambda: jitted.lower(weights, inputs), network.lower))
    progress.say("measuring the whole network")
    want, got = jitted(weights, inputs), jax.tree.leaves(network(*arguments))
    calls = lambda: jitted(weights, inputs), lambda: network(*arguments)
    jitted_seconds, fast_seconds = np.median(alternated([_timer(call) for call in calls], _ROUND_SECONDS), 0).tolist()
    in_float32 = all(x.dtype == np.float32 for x in want)
    return Comparison(jitted_seconds, fast_seconds, difference(want, got), given, in_float32)


def difference(want: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest difference of arrays, relative to the largest finite number of the first; NaN equals NaN.

    Args:
      want: arrays; random keys and complex numbers are left out.
      got: likewise.
    """
    pairs = [
        (np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel())
        for a, b in zip(want, got, strict=True)
        if not _is_key(a) and not jnp.issubdtype(a.dtype, jnp.complexfloating)
    ]
    if not pairs:
        return 0.0
    first, second = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    differs = (first != second) & ~(np.isnan(first) & np.isnan(second))
    if not differs.any():
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.max(np.abs(first), initial=0, where=np.isfinite(first))
        return float(np.max(np.abs(first - second)[differs]) / largest)


def notes(whole: Comparison, choices: Sequence[Choice], targets: Sequence[str] = ()) -> list[str]:
    """The lines under a network's table.

    Args:
      whole: the network beside the function that it was made from.
      choices: its layers.
      targets: the instructions that its products run in.
    """
    most = f"{whole.difference:.1e} of the largest result" if whole.difference else "0"
    inputs = "the example" if whole.on_example else "random inputs"
    within = f"; compiled for {', '.join(targets)}" if targets else ""
    lines = [
        "µs of a layer: in a program, with bias, residual, activation; of the whole: a call of jax.jit(fn) and of this"
        + within,
        f"largest difference on {inputs}: {most}",
    ]
    if whole.speedup < WORTH:
        return [*lines, f"not worth it: {whole.speedup:.2f} times as fast; {reason(whole, choices)}"]
    return [*lines, f"{whole.speedup:.2f} times as fast"]


def reason(whole: Comparison, choices: Sequence[Choice]) -> str:
    """Why a network is not much faster: where most of its time goes."""
    pruned = [c for c in choices if c.block is not None]
    if not pruned:
        return "no kernel has blocks of zeros"
    parts = {
        "outside": 0.0,
        "sparse": sum(_seconds(c) for c in pruned if c.sparse),
        "traced": sum(_seconds(c) for c in pruned if not c.sparse),
        "unpruned": sum(_seconds(c) for c in choices if c.block is None),
    }
    parts["outside"] = max(0.0, whole.fast_seconds - sum(parts.values()))
    most = max(parts, key=lambda part: parts[part])
    share = parts[most] / sum(parts.values())
    if most == "outside":
        notes = collections.Counter(c.note for c in choices if np.isnan(c.traced_seconds) and c.note)
        among = ", ".join(f"{note} ({count} times)" for note, count in notes.most_common(3))
        return f"{share:.0%} of the time is outside the layers that could be compiled" + (f": {among}" if among else "")
    if most == "unpruned":
        return f"{share:.0%} of the time is in layers without blocks of zeros"
    weights = [float(np.prod(c.kernel)) for c in pruned]
    kept = sum(c.density * weight for c, weight in zip(pruned, weights, strict=True)) / sum(weights)
    left = f"pruned layers keep {kept:.0%} of their weights in blocks"
    if most == "traced":
        return f"{share:.0%} of the time is in pruned layers that are faster in full, as traced; {left}"
    return f"{share:.0%} of the time is in the pruned layers already; {left}"


def _seconds(choice: Choice) -> float:
    seconds = choice.traced_seconds if choice.runs == "traced" else choice.compiled_seconds
    return 0.0 if np.isnan(seconds) else seconds


def _timer(call: Callable[[], Any]) -> Callable[[int], float]:
    def seconds(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(call())
        return time.perf_counter() - began

    return seconds


def _filled(leaf: Any) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.device_put(normal(leaf.size).reshape(leaf.shape).astype(leaf.dtype))
    return jnp.zeros(leaf.shape, leaf.dtype)


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.extended))
