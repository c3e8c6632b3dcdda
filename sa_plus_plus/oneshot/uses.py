"""The steps of a traced network that multiply by each matrix of a pruned leaf."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import LeafPlan
from sa_plus_plus.sparse.compiler.conv_geometry import Window, window_of
from sa_plus_plus.sparse.compiler.ir import Layer, Traced, leaves_of
from sa_plus_plus.sparse.compiler.unsupported import MOST_STEPS


class Use(NamedTuple):
    """A layer's kernel as a matrix of a leaf: `kernel.reshape(-1, N)[i, j] = matrix[inputs[i], outputs[j]]`.

    Attributes:
      step: its number in the program.
      layer: plan of the leaf.
      stack: which of the leaf's matrices, in row-major order.
      inputs: `(K,)` for each row of the traced kernel, its row in the matrix; its column if `transposed`.
      outputs: `(N,)` likewise for columns.
      transposed: whether the matrix's columns are contracted.
      window: the layer as a convolution.
    """

    step: int
    layer: LeafPlan
    stack: int
    inputs: np.ndarray
    outputs: np.ndarray
    transposed: bool
    window: Window

    @property
    def name(self) -> str:
        """Of the matrix, for messages: its leaf's path, and its place in a stack."""
        return matrix_name(self.layer, self.stack)

    def oriented(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix of the leaf with its inputs as rows."""
        return matrix.T if self.transposed else matrix

    def kernel(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The traced kernel, of `shape`, from a matrix whose rows are inputs."""
        return matrix[np.ix_(self.inputs, self.outputs)].reshape(shape)


def uses_of(traced: Traced, layers: Mapping[str, LeafPlan]) -> dict[tuple[str, int], list[Use]]:
    """The uses of each matrix, by its leaf's path and its number, in order of first use.

    Args:
      traced: by `layer_tracer`.
      layers: the pruned leaves by path.

    Raises:
      ValueError: naming all matrices that are not used, of which a product takes only a part, or which products take
        both as they are and transposed, so that their inputs are not of one kind.
    """
    places = {path: _places(layer) for path, layer in layers.items()}
    found: dict[tuple[str, int], list[Use]] = {}
    refused: dict[str, str] = {}  # by path
    for number, step in enumerate(traced.steps):
        if isinstance(step, Layer) and step.origin is not None:
            use = _use(number, step, layers[step.origin.path], places[step.origin.path])
            if isinstance(use, str):
                refused.setdefault(step.origin.path, use)
            else:
                found.setdefault((use.layer.path, use.stack), []).append(use)
    for (path, _), uses in found.items():
        if len({use.transposed for use in uses}) > 1:
            refused.setdefault(
                path,
                f"{uses[0].name} is multiplied both as it is and transposed, as in a tied autoencoder: its inputs are "
                "the rows in one product, the columns in the other",
            )
    others = other_uses_of(traced)
    for path, layer in layers.items():
        if missing := [i for i in range(int(np.prod(layer.stack))) if (path, i) not in found]:
            which = matrix_name(layer, missing[0]) + (f" and {len(missing) - 1} more" if missing[1:] else "")
            indirectly = ", but uses values computed from it" if path in others else ""
            refused.setdefault(
                path,
                f"no product or convolution with {which} was found: the function has none, or only in `while`, `cond` "
                f"or a loop of more than {MOST_STEPS} steps{indirectly}",
            )
    if refused:
        which = "it" if len(refused) == 1 else f"these {len(refused)} leaves"
        raise ValueError(". ".join([*refused.values(), f"Leave {which} out by `where`, or prune in training"]))
    return found


def other_uses_of(traced: Traced) -> dict[str, int]:
    """By a leaf's path: the first step that takes something computed from it other than a kernel."""
    found: dict[str, int] = {}
    for number, step in enumerate(traced.steps):
        if not isinstance(step, Layer) or step.origin is None:
            found = dict.fromkeys(leaves_of(step), number) | found
    return found


def matrix_name(layer: LeafPlan, number: int) -> str:
    """One of a leaf's matrices, for messages."""
    place = ", ".join(map(str, np.unravel_index(number, layer.stack)))
    return f"matrix {place} of {layer.path}" if layer.stack else layer.path


def _places(layer: LeafPlan) -> np.ndarray:
    """By position in the flattened leaf: position in the flattened stack of its matrices."""
    read = blk.matrices(np.arange(layer.weights).reshape(layer.shape), layer.view).ravel()
    places = np.empty(layer.weights, np.int64)
    places[read] = np.arange(layer.weights)
    return places


def _use(number: int, step: Layer, layer: LeafPlan, places: np.ndarray) -> Use | str:
    """A layer's kernel as a matrix of a leaf, or why it is none."""
    assert step.origin is not None
    window = window_of(step.spec)
    if isinstance(window, str):
        return f"{layer.path} is {window}, which has no one matrix of inputs"
    rows, cols = blk.matrix_shape(layer.shape, layer.view)
    kernel = np.asarray(step.origin.positions).reshape(-1, step.spec.kernel.shape[-1])
    stack, rest = np.divmod(places[kernel], rows * cols)
    row, col = np.divmod(rest, cols)
    for transposed, (along, across) in ((False, (row, col)), (True, (col, row))):
        inputs, outputs = along[:, 0], across[0]
        whole = (len(inputs), len(outputs)) == ((cols, rows) if transposed else (rows, cols))
        if whole and (stack == stack[0, 0]).all() and (along == inputs[:, None]).all() and (across == outputs).all():
            return Use(number, layer, int(stack[0, 0]), inputs, outputs, transposed, window)
    return (
        f"{layer.path}, of shape {layer.shape}, is multiplied as a kernel of shape {step.spec.kernel.shape} whose "
        f"inputs are not the rows or the columns of its matrix {rows}×{cols}: a product takes a part of it, or it has "
        "another view (`sapp.views_of(fn, params, *inputs)`)"
    )
