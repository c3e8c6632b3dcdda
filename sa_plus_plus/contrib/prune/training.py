"""Pruning of a published transformer: in one go, or step by step while it learns from the dense network."""

import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import sa_plus_plus as sapp
from sa_plus_plus.contrib.prune.data import Arrays, calibration
from sa_plus_plus.contrib.prune.networks import compute, distance, gather, inputs, is_pruned, output
from sa_plus_plus.contrib.transformers.directories import Published
from sa_plus_plus.oneshot.capture import visit_layers
from sa_plus_plus.oneshot.prune import DAMPING, problem_of, solver
from sa_plus_plus.oneshot.uses import Use

CALIBRATION = 512  # examples that are enough for pruning without training
RATE = 1e-3 * 384  # of Adam, times the width
SHOWN_EVERY, SAVED_EVERY = 10.0, 60.0  # seconds


class Options(NamedTuple):
    """How a network is pruned.

    Attributes:
      block: `(b_r, b_c)`, of kernels as `(inputs, outputs)`.
      sparsity: share of the blocks that are removed.
      steps: of training; 0 for none.
      batch: examples of a step.
      rate: the highest learning rate, after a warm-up; 0 for 1e-3 at a width of 384, in inverse proportion to it.
    """

    block: tuple[int, ...]
    sparsity: float
    steps: int
    batch: int
    rate: float = 0.0


def plan(params: Any, options: Options) -> sapp.Plan:
    """Which kernels are pruned: those of the transformer's layers.

    Args:
      params: of the network.
      options: of the run.

    Raises:
      ValueError: for a block or a sparsity that is out of range.
    """
    return sapp.plan(params, block=options.block, sparsity=options.sparsity, min_blocks=1, where=is_pruned)


def sparsifier(options: Options) -> sapp.Sparsifier:
    """The algorithm: SequentialAttention++ or, without steps, the largest blocks.

    Args:
      options: of the run.

    Raises:
      ValueError: for options out of range, or too few steps.
    """
    common: dict[str, Any] = {
        "block": options.block,
        "sparsity": options.sparsity,
        "min_blocks": 1,
        "where": is_pruned,
    }
    if not options.steps:
        return sapp.magnitude(phases=sapp.phases.magnitude(1, recipe="finetune"), **common)
    phases = sapp.phases.finetune(options.steps)
    return sapp.sequential_attention(phases=phases, score="effective", **common)


def by_magnitude(dense: Any, options: Options) -> Any:
    """The network with the largest blocks of each kernel alone, which takes no examples.

    Args:
      dense: its parameters.
      options: of the run.
    """
    sp = sparsifier(options._replace(steps=0))
    return sp.finalize(*sp.init(dense))


def one_shot(
    published: Published, dense: Any, train: Arrays, options: Options, file: pathlib.Path, say: Callable[[str], None]
) -> Any:
    """The network pruned by Optimal Brain Surgeon, `sapp.one_shot`, kernel by kernel.

    Args:
      published: the network.
      dense: its parameters.
      train: examples.
      options: of the run.
      file: where finished kernels are kept. If it is there, they are not computed again.
      say: shows a line of progress.

    Raises:
      ValueError: if the file is damaged.
    """
    names = inputs(published)

    def fn(params: Any, *arguments: Any) -> jax.Array:
        return output(published, params, dict(zip(names, arguments, strict=True)))

    layers, solve = plan(dense, options).pruned, solver("obs", refit=False)
    done: dict[str, np.ndarray] = {path: np.asarray(x) for path, x in sapp.load(file).items()} if file.exists() else {}
    if done:
        say(f"going on after {len(done)} of {len(layers)} kernels")
    clock = _Clock()

    def visit(use: Use, gram: np.ndarray, matrix: np.ndarray, rows: int) -> np.ndarray:
        path = use.layer.path
        if path not in done:
            _, weights = solve(problem_of(use, gram, matrix, DAMPING))(use.layer.kept_each)
            done[path] = weights[: matrix.shape[0], : matrix.shape[1]]
            if clock.due(SHOWN_EVERY) or len(done) == len(layers):
                say(f"{len(done)} of {len(layers)} kernels, {path.removesuffix('/kernel')}")
            if clock.due(SAVED_EVERY):
                sapp.save(file, done)
        return done[path]

    return visit_layers(fn, dense, calibration(train, CALIBRATION, options.batch), layers, visit).params


def trained(
    published: Published, dense: Any, train: Arrays, options: Options, file: pathlib.Path, say: Callable[[str], None]
) -> Any:
    """The network pruned while its layers learn from the dense one; embeddings and classifiers stay as they are.

    Args:
      published: the network.
      dense: its parameters.
      train: examples.
      options: of the run.
      file: where the state is kept about once a minute. If it is there, training goes on from it.
      say: shows a line of progress.

    Raises:
      ValueError: if the file is damaged, or training diverges.
    """
    sp = sparsifier(options)
    rate = options.rate or RATE / published.model.width
    warmup = options.steps // 10  # else Adam's first steps, all of full size, undo what was published
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, options.steps, 0.1 * rate)
    tx = sapp.sparsify(optax.chain(sapp.reset_on(optax.scale_by_adam()), optax.scale_by_learning_rate(schedule)), sp)
    layers = {name: x for name, x in dense.items() if name.startswith("layer")}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, dense: Any, batch: Any) -> Any:
        teacher = compute(published, dense, batch)

        def loss(params: Any) -> jax.Array:
            return distance(published, compute(published, dense | params, batch), teacher)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jax.numpy.array, layers)  # a copy, for it is donated
    state: Any = jax.jit(tx.init)(params)
    start = 0
    if file.exists():
        kept = sapp.load(file, {"params": params, "state": state, "step": 0})
        params, state, start = kept["params"], kept["state"], int(kept["step"])
        say(f"going on from step {start:,} of {options.steps:,}")
    clock, began = _Clock(), 0.0  # the first step is compiled, and tells nothing of the others
    for number in range(start, options.steps):
        params, state, loss = step(params, state, dense, gather(train, _rows(number, options.batch, train)))
        done, value = number + 1, float(loss)
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {done:,}: lower the learning rate, {rate:.2g}")
        if clock.due(SHOWN_EVERY) or done == options.steps or number == start:
            share = float(sp.phases.fraction(done)) * options.sparsity
            line = f"step {done:,} of {options.steps:,}: {share:.1%} pruned, loss {max(value, 0):.4f}"
            each = (time.monotonic() - began) / max(done - start - 1, 1)
            say(f"{line}, {_time(each * (options.steps - done))} left" if began else line)
        began = began or time.monotonic()
        if clock.due(SAVED_EVERY) or done == options.steps:
            sapp.save(file, {"params": params, "state": state, "step": np.int32(done)})
    return dense | params


class _Clock:
    """Says when so many seconds are over, for each number of seconds on its own."""

    def __init__(self) -> None:
        self._began, self._last = time.monotonic(), dict[float, float]()

    def due(self, every: float) -> bool:
        now = time.monotonic()
        if now < self._last.get(every, self._began) + every:
            return False
        self._last[every] = now
        return True


def _rows(step: int, batch: int, train: Arrays) -> np.ndarray:
    """The examples of a step: each epoch takes all in an order of its own, so that the step alone decides."""
    count = len(next(iter(train.values())))
    places = np.arange(step * batch, (step + 1) * batch)
    orders = {epoch: np.random.default_rng((1, epoch)).permutation(count) for epoch in {*(places // count).tolist()}}
    return np.array([orders[place // count][place % count] for place in places.tolist()])


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
