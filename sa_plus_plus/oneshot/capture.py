"""Layer by layer through a network: the inputs of each matrix, once the matrices before it are pruned.

Memory holds the activations between two layers for all calibration batches, and one `X^T X` at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.oneshot.uses import Use, uses_of
from sa_plus_plus.planning import LeafPlan, Plan, map_layers, path_string
from sa_plus_plus.sparse.arguments import batches_of
from sa_plus_plus.sparse.compiler.frontend import layers_with_origins
from sa_plus_plus.sparse.compiler.ir import Call, Constant, Layer, Traced, Variable, variables
from sa_plus_plus.sparse.ops.convolution import patches

CHUNK_BYTES = 1 << 26  # memory for the inputs that are multiplied at once
Visit = Callable[[Use, np.ndarray, np.ndarray, int], np.ndarray]
Values = dict[Variable, Any]


def visit_layers(fn: Callable[..., Any], params: Any, calibration: Iterable[Any], plan: Plan, visit: Visit) -> Any:
    """Replace each pruned matrix, in the order in which the network uses them, given all earlier replacements.

    Args:
      fn: `fn(params, *inputs)`, jittable.
      params: tree of arrays.
      calibration: batches, each an array or a tuple of arguments, all of one shape.
      plan: what is pruned.
      visit: `visit(use, gram, matrix, rows) -> matrix`: `gram` is `X^T X` in float64, `(inputs, inputs)`, over all
        uses of the matrix; the matrix is `(inputs, outputs)` in float64; `rows` is the number of rows of `X`.

    Returns:
      The parameters with the matrices replaced.

    Raises:
      ValueError: for calibration data that are empty, of several shapes or not finite; a leaf that is not finite, not
        reached, or not used as the kernel of a product; or inputs of a layer that are not finite, or all zero.
    """
    batches = [b if isinstance(b, tuple) else (b,) for b in calibration]
    if not batches:
        raise ValueError("calibration has no batches: give some of typical inputs")
    matrices = _matrices(params, plan)
    traced = layers_with_origins(fn, params, plan.pruned, *batches[0])
    held = [dict(zip(traced.inputs, jax.tree.leaves(b), strict=True)) for b in batches_of(traced, batches)]
    last = {value: number for number, step in enumerate(traced.steps) for value in variables(step)}
    kernels: dict[int, Any] = {}
    position = 0
    for (path, number), uses in uses_of(traced, plan.pruned).items():
        for values in held:
            _run(traced, kernels, values, position, uses[0].step, last)
        position = uses[0].step
        gram, rows = _gram(traced, kernels, held, uses, last)
        _check(path, gram)
        old = matrices[path][number]
        new = visit(uses[0], gram, uses[0].oriented(old).astype(np.float64), rows)
        matrices[path][number] = uses[0].oriented(new).astype(old.dtype)
        for use in uses:
            own = use.kernel(use.oriented(matrices[path][number]), np.shape(traced.steps[use.step].original))
            kernels[use.step] = jnp.asarray(own)
    return _replaced(params, plan, matrices)


def _matrices(params: Any, plan: Plan) -> dict[str, np.ndarray]:
    """`(matrices, rows, cols)` of each pruned leaf, copied."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        if (layer := plan.pruned.get(path_string(keys))) is not None:
            values = np.array(leaf)
            if bad := values.size - int(np.isfinite(values.astype(np.float32)).sum()):
                raise ValueError(f"{layer.path} holds {bad} NaN or infinite values of {values.size}")
            read = blk.matrices(values, layer.view)
            found[layer.path] = read.reshape(-1, *read.shape[-2:]).copy()
    return found


def _replaced(params: Any, plan: Plan, matrices: dict[str, np.ndarray]) -> Any:
    def one(layer: LeafPlan | None, leaf: Any) -> Any:
        if layer is None:
            return leaf
        read = matrices[layer.path].reshape(*layer.stack, *matrices[layer.path].shape[1:])
        return jnp.asarray(blk.from_matrices(read, layer.shape, layer.view))

    return map_layers(one, params, plan.pruned)


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
    traced: Traced, kernels: dict[int, Any], held: Sequence[Values], uses: Sequence[Use], last: Any
) -> tuple[np.ndarray, int]:
    """`X^T X` over all batches and uses, in the order of the matrix's inputs, and the number of rows of `X`."""
    size, rows = len(uses[0].inputs), 0
    gram = np.zeros((size, size))
    for values in held:
        ahead, position = dict(values), uses[0].step
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


def _check(path: str, gram: np.ndarray) -> None:
    if not np.isfinite(gram).all():
        raise ValueError(f"what {path} is multiplied with is not finite on the calibration data")
    if not np.diag(gram).any():
        raise ValueError(
            f"{path} is not reached by the calibration data: all that it is multiplied with is zero on them. Give "
            "examples that reach it, or leave it out by `where`"
        )
