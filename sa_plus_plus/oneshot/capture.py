"""Layer by layer through a network: the inputs of each matrix, once the matrices before it are pruned.

Memory holds the activations between two layers for all calibration batches, and one `X^T X` at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus import progress
from sa_plus_plus.oneshot.uses import Use, other_uses_of, uses_of
from sa_plus_plus.planning import LeafPlan, map_layers, path_string
from sa_plus_plus.sparse.arguments import batches_of, listed
from sa_plus_plus.sparse.compiler.frontend import layer_tracer
from sa_plus_plus.sparse.compiler.ir import Call, Constant, Layer, Traced, Variable, leaves_of, variables
from sa_plus_plus.sparse.ops.convolution import patches

CHUNK_BYTES = 1 << 26  # memory for the inputs that are multiplied at once
Visit = Callable[[Use, np.ndarray, np.ndarray, int], np.ndarray]
Values = dict[Variable, Any]
Layers = Mapping[str, LeafPlan]


class Visited(NamedTuple):
    """The outcome of `visit_layers`.

    Attributes:
      params: with the matrices replaced.
      ahead: leaves whose inputs were computed before all that leads to them was replaced: the leaf is used in several
        places.
      unreached: the first use of each matrix whose inputs are all zero.
    """

    params: Any
    ahead: frozenset[str]
    unreached: list[Use]


def visit_layers(fn: Callable[..., Any], params: Any, calibration: Any, layers: Layers, visit: Visit) -> Visited:
    """Replace each pruned matrix, in the order in which the network uses them, given all earlier replacements.

    A matrix is replaced before the first step that takes it or its leaf in any way, so that no step ever runs with a
    replaced product and a trained lookup of the same leaf.

    Args:
      fn: `fn(params, *inputs)`, jittable.
      params: tree of arrays.
      calibration: batches, each an array or a tuple of arguments, all of one shape; an array or a mapping is one batch.
      layers: the pruned leaves, by path.
      visit: `visit(use, gram, matrix, rows) -> matrix`: `gram` is `X^T X` in float64, `(inputs, inputs)`, over all
        uses of the matrix; the matrix is `(inputs, outputs)` in float64; `rows` is the number of rows of `X`.

    Raises:
      ValueError: for calibration data that are empty, of several shapes or not finite; a leaf that is not finite, or
        not used as the kernel of a product; or inputs of a layer that are not finite.
    """
    batches = [b if isinstance(b, tuple) else (b,) for b in listed(calibration)]
    if not batches:
        raise ValueError("calibration has no batches: give some of typical inputs")
    matrices = matrices_of(params, layers)
    progress.say("tracing")
    trace = layer_tracer(fn, params, layers, *batches[0])
    traced = trace(params)
    batch_values = [dict(zip(traced.inputs, jax.tree.leaves(b), strict=True)) for b in batches_of(traced, batches)]
    last = {value: number for number, step in enumerate(traced.steps) for value in variables(step)}
    kernels: dict[int, Any] = {}
    position, replaced, unreached = 0, set[str](), list[Use]()
    all_uses, others = uses_of(traced, layers), other_uses_of(traced)
    first = {key: min(uses[0].step, others.get(key[0], uses[0].step)) for key, uses in all_uses.items()}
    for (path, number), start in progress.each(sorted(first.items(), key=lambda item: item[1]), "layer"):
        uses = all_uses[path, number]
        if replaced & frozenset[str]().union(*map(leaves_of, traced.steps[position:start])):
            traced = trace(_replaced(params, layers, matrices))  # recompute values that depend on replaced leaves
            replaced.clear()
        for values in batch_values:
            _run(traced, kernels, values, position, start, last)
        position = start
        gram, rows = _gram(traced, kernels, batch_values, uses, last, start)
        if not np.isfinite(gram).all():
            raise ValueError(f"the inputs of {uses[0].name} are not finite on the calibration data")
        if not np.diag(gram).any():
            unreached.append(uses[0])
        old = matrices[path][number]
        new = visit(uses[0], gram, uses[0].oriented(old).astype(np.float64), rows)
        matrices[path][number] = uses[0].oriented(new).astype(old.dtype)
        if path in others:
            replaced.add(path)
        for use in uses:
            original = traced.steps[use.step].original
            kernel = use.kernel(use.oriented(matrices[path][number]), np.shape(original))
            kernels[use.step] = jnp.asarray(kernel, original.dtype)
    ahead = frozenset(key[0] for key, uses in all_uses.items() if first[key] < uses[0].step or uses[1:])
    return Visited(_replaced(params, layers, matrices), ahead, unreached)


def matrices_of(params: Any, layers: Layers) -> dict[str, np.ndarray]:
    """`(matrices, rows, cols)` of each pruned leaf, copied."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        if (layer := layers.get(path_string(keys))) is not None:
            values = np.array(leaf)
            if bad := values.size - int(np.isfinite(values.astype(np.float32)).sum()):
                raise ValueError(f"{layer.path} holds {bad} NaN or infinite values of {values.size}")
            read = blk.matrices(values, layer.view)
            found[layer.path] = read.reshape(-1, *read.shape[-2:]).copy()
    return found


def _replaced(params: Any, layers: Layers, matrices: dict[str, np.ndarray]) -> Any:
    def one(layer: LeafPlan | None, leaf: Any) -> Any:
        if layer is None:
            return leaf
        read = matrices[layer.path].reshape(*layer.stack, *matrices[layer.path].shape[1:])
        return jnp.asarray(blk.from_matrices(read, layer.shape, layer.view))

    return map_layers(one, params, dict(layers))


def _run(traced: Traced, kernels: dict[int, Any], values: Values, start: int, stop: int, last: Any) -> None:
    """Run the steps `[start, stop)` on the values of one batch, dropping those that no later step takes."""
    for number in range(start, stop):
        step = traced.steps[number]
        values |= {value: array for value, array in _results(step, kernels.get(number), values) if value in last}
        for value in variables(step):
            if last[value] == number:
                values.pop(value, None)


def _results(step: Call | Layer, kernel: Any, values: Values) -> list[tuple[Variable, Any]]:
    if isinstance(step, Layer):
        y = step.spec.run(values[step.spec.x], step.original if kernel is None else kernel, None)
        return [(step.spec.output, y)]
    arguments = [v.full if isinstance(v, Constant) else values[v] for v in step.inputs]
    return list(zip(step.outputs, step.run(*arguments), strict=True))


def _gram(
    traced: Traced, kernels: dict[int, Any], batch_values: Sequence[Values], uses: Sequence[Use], last: Any, start: int
) -> tuple[np.ndarray, int]:
    """`X^T X` over all batches and uses, in the order of the matrix's inputs, and the number of rows of `X`.

    `batch_values` are the values before the step `start`, by batch; they stay as they are.
    """
    size, rows = len(uses[0].inputs), 0
    gram = np.zeros((size, size))
    for values in batch_values:
        ahead, position = dict(values), start
        for use in uses:
            _run(traced, kernels, ahead, position, use.step, last)
            position, order = use.step, np.argsort(use.inputs)
            for piece in _rows(ahead[traced.steps[use.step].spec.x], use):
                wide = np.asarray(piece, np.float64)[:, order]
                gram += wide.T @ wide
                rows += len(wide)
    return gram, rows


def _rows(x: Any, use: Use) -> Iterator[Any]:
    """The rows that a layer's matrix is multiplied with, `(rows, K)`, in pieces of bounded size."""
    window = use.window
    size = window.kernel[0] * window.kernel[1] * window.kernel[2]
    if window.kernel[:2] == (1, 1) and window.strides == (1, 1) and not any(map(any, window.padding)):
        flat = jnp.reshape(x, (-1, size))
        step = max(1, CHUNK_BYTES // (8 * size))
        yield from (flat[i : i + step] for i in range(0, len(flat), step))
        return
    images = jnp.pad(jnp.reshape(x, window.image), ((0, 0), *window.padding, (0, 0)))
    positions = images.shape[1] * images.shape[2] // (window.strides[0] * window.strides[1])
    step = max(1, CHUNK_BYTES // (8 * size * positions))
    for i in range(0, len(images), step):
        yield patches(images[i : i + step], window.kernel[:2], window.strides).reshape(-1, size)
