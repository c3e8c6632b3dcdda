"""What a published transformer computes, how far a pruned one is from it, and how that is measured."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.contrib.transformers.directories import Published
from sa_plus_plus.contrib.transformers.encoder import Bert
from sa_plus_plus.contrib.transformers.images import preparation
from sa_plus_plus.contrib.transformers.layers import Layer
from sa_plus_plus.contrib.transformers.pooling import pooled
from sa_plus_plus.contrib.transformers.retrieval import neighbours_kept
from sa_plus_plus.contrib.transformers.transformer import Decoder

Batch = Mapping[str, Any]
NEIGHBOURS = 10


class Computed(NamedTuple):
    """The outcome of a forward pass.

    Attributes:
      output: embeddings or representations `(batch, width)`, those of tokens `(batch, length, width)`, or logits, of
        which the last axis are the classes.
      states: of each layer, `(batch, length, width)`.
      real: bool `(batch, length)`: false for padding.
    """

    output: jax.Array
    states: tuple[jax.Array, ...]
    real: jax.Array


def inputs(published: Published) -> tuple[str, ...]:
    """The names of a network's arguments, in order: `tokens` and, for BERT, `real`, how many are not padding; `image`.

    An image is float32 as the network takes it, or uint8, in pixels.

    Args:
      published: the network.
    """
    if published.image:
        return ("image",)
    return ("tokens", "real") if isinstance(published.model, Bert) else ("tokens",)


def is_pruned(path: str) -> bool:
    """Whether a parameter is a kernel of a transformer layer; embeddings and classifiers stay as they are.

    Args:
      path: of the parameter.
    """
    return re.fullmatch(r"layer\d+/\w+/kernel", path) is not None


def compute(published: Published, params: Any, batch: Batch) -> Computed:
    """A network's output, and the states of its layers.

    Args:
      published: the network.
      params: its parameters.
      batch: its arguments by their names, see `inputs`.
    """

    def is_layer(module: Any, method: str) -> bool:
        return isinstance(module, Layer) and method == "__call__"

    y, real, captured = _apply(published, params, batch, capture_intermediates=is_layer, mutable=["intermediates"])
    found = captured["intermediates"]
    states = tuple(found[f"layer{i + 1}"]["__call__"][0] for i in range(published.model.layers))
    if real is None:
        real = jnp.ones(states[0].shape[:2], bool)
    return Computed(y, states, real)


def output(published: Published, params: Any, batch: Batch) -> jax.Array:
    """The output alone, for inference; arguments as for `compute`."""
    return _apply(published, params, batch)[0]


def _apply(published: Published, params: Any, batch: Batch, **options: Any) -> tuple[jax.Array, Any, Any]:
    model: Any = published.model
    real: Any = None
    if isinstance(model, Bert):
        tokens = batch["tokens"].astype(jnp.int32)
        real = jnp.arange(tokens.shape[1])[None] < batch["real"][:, None]
        result = model.apply({"params": params}, tokens, real=real, **options)
    elif published.image:
        image = batch["image"]
        if image.dtype == jnp.uint8:
            image = preparation(published)(image)
        result = model.apply({"params": params}, image, **options)
    else:
        result = model.apply({"params": params}, batch["tokens"], **options)
    y: Any = None
    y, captured = result if options else (result, None)
    if published.pooling and isinstance(model, Bert):
        y = pooled(y, real, published.pooling, published.normalised)
    return y, real, captured


def has_logits(published: Published) -> bool:
    """Whether the output is logits, rather than embeddings or representations.

    Args:
      published: the network.
    """
    return isinstance(published.model, Decoder) or getattr(published.model, "classes", 0) > 0


def distance(published: Published, student: Computed, teacher: Computed) -> jax.Array:
    """What training makes small: a distance of the outputs, plus the mean over layers of ‖s - t‖² / ‖t‖² of the states.

    For logits that of the outputs is the Kullback-Leibler divergence from the teacher's, else 1 - cosine.

    Args:
      published: the network.
      student: computed by the pruned network.
      teacher: computed by the dense network.
    """
    each = _divergence if has_logits(published) else lambda s, t: 1 - _cosine(s, t)
    of_outputs = _mean(each(student.output, teacher.output), teacher.real)
    of_states = [
        _mean(jnp.sum((s - t) ** 2, -1), teacher.real) / jnp.maximum(_mean(jnp.sum(t**2, -1), teacher.real), 1e-12)
        for s, t in zip(student.states, teacher.states, strict=True)
    ]
    return of_outputs + sum(of_states) / len(of_states)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, -1) / jnp.maximum(norms, 1e-12)


def _divergence(student: jax.Array, teacher: jax.Array) -> jax.Array:
    wanted = jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(student)), -1)


def _mean(values: jax.Array, real: jax.Array) -> jax.Array:
    """The mean over a batch or, of `(batch, length)` values, over the tokens that are real."""
    if values.ndim == 1:
        return jnp.mean(values)
    return jnp.sum(jnp.where(real, values, 0)) / jnp.maximum(jnp.sum(real), 1).astype(values.dtype)


class Measure(NamedTuple):
    """A figure of the dense and of the pruned network."""

    name: str
    dense: float
    pruned: float


def quality(published: Published, dense: Any, pruned: Any, data: Batch, batch: int) -> list[Measure]:
    """How good a pruned network is, beside the dense one.

    Args:
      published: the network.
      dense: its parameters.
      pruned: the pruned network's parameters.
      data: held-out examples: arrays of the network's arguments.
      batch: how many are computed at a time.
    """

    @jax.jit
    def both(dense: Any, pruned: Any, batch: Batch) -> dict[str, jax.Array]:
        a, b = (compute(published, params, batch) for params in (dense, pruned))
        if not has_logits(published):
            cosine = _cosine(b.output, a.output)
            if cosine.ndim == 2:
                return {"cosine": jnp.sum(jnp.where(a.real, cosine, 0), 1) / jnp.sum(a.real, 1)}
            return {"cosine": cosine, "before": a.output, "after": b.output}
        agreed = jnp.argmax(a.output, -1) == jnp.argmax(b.output, -1)
        if not isinstance(published.model, Decoder):
            return {"agreed": agreed}
        return {
            "agreed": jnp.mean(agreed, 1),
            **{name: _surprise(x.output, batch["tokens"]) for name, x in (("dense", a), ("pruned", b))},
        }

    found = in_batches(lambda part: both(dense, pruned, part), data, batch)
    if "dense" in found:
        perplexities = [float(np.exp(np.mean(found[name], dtype=np.float64))) for name in ("dense", "pruned")]
        return [Measure("perplexity", *perplexities), Measure("same next token", 1.0, float(np.mean(found["agreed"])))]
    if "agreed" in found:
        return [Measure("same class", 1.0, float(np.mean(found["agreed"])))]
    measures = [
        Measure("cosine to the dense network", 1.0, float(np.mean(found["cosine"]))),
        Measure("cosine, the lowest twentieth", 1.0, float(np.quantile(found["cosine"], 0.05))),
    ]
    if "before" in found and len(found["before"]) > NEIGHBOURS:
        before, after = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (found["before"], found["after"]))
        kept = neighbours_kept(before, after, NEIGHBOURS)
        measures.append(Measure(f"the {NEIGHBOURS} nearest neighbours that stay", 1.0, kept))
    return measures


def _surprise(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean over positions of -log of the probability of the next token, `(batch,)`."""
    logs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logs, tokens[:, 1:, None].astype(jnp.int32), axis=-1)[..., 0], 1)


def in_batches(fn: Callable[[Batch], Any], data: Batch, batch: int) -> dict[str, np.ndarray]:
    """The results of a function of batches, a dictionary of arrays, for all examples.

    Args:
      fn: called with batches of one size; of the last one, filled up with its last example, results are cut.
      data: arrays of the examples, by name.
      batch: the size.
    """
    count, parts = len(next(iter(data.values()))), []
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        parts.append({name: np.asarray(x)[: count - start] for name, x in fn(gather(data, rows)).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def gather(data: Batch, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Some of the examples.

    Args:
      data: arrays of the examples, by name.
      rows: numbers of those that are wanted.
    """
    return {name: x[rows] for name, x in data.items()}
