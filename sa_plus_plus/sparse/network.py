"""A whole network made fast: products with pruned kernels in their sparse form where that is faster."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.checks import occupied
from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.convolution import block_sparse_conv
from sa_plus_plus.sparse.matmul import Implementation, block_sparse_matmul, chosen
from sa_plus_plus.sparse.tracing import Call, Constant, Layer, Linear, Traced, Variable, trace

BLOCKS = (128, 64, 32, 20, 16, 10, 8, 5, 4)  # sides that are looked for
_INLINE = 1024  # numbers of a constant that are compiled into the program rather than handed to it
_ROUNDS, _ROUND_SECONDS = 5, 0.01  # of measuring


class Choice(NamedTuple):
    """What became of one dense layer or convolution.

    Attributes:
      layer: what it is.
      kernel: the kernel's shape.
      rows: how many rows of activations its matrix is multiplied with.
      block: in which blocks it is pruned; None where it is not.
      density: share of those blocks that are not zero.
      dense_seconds: time it takes in full, NaN where it was not measured.
      sparse_seconds: time it takes by its blocks.
      sparse: which of them the network does.
    """

    layer: str
    kernel: tuple[int, ...]
    rows: int
    block: blk.Block | None
    density: float
    dense_seconds: float
    sparse_seconds: float
    sparse: bool


class Network:
    """A network for inputs of one shape; call it like the function that it was made from.

    Attributes:
      choices: one for each dense layer and convolution, in order.
      weights: what `fn` takes first.
      fn: `fn(weights, *inputs)`, pure: to be jitted with others, or exported.
    """

    def __init__(
        self,
        traced: Traced[Call | Linear],
        forms: Sequence[BlockSparse | None],
        choices: Sequence[Choice],
        implementation: Implementation | None,
    ):
        # Without weights, so that a kernel is not kept in full beside its blocks.
        steps = [_without_weights(step) for step in traced.steps]
        self._program = Traced(traced.inputs, steps, traced.outputs, traced.input_tree, traced.tree)
        self.choices = tuple(choices)
        self.weights = [_needs(step, form) for step, form in zip(traced.steps, forms, strict=True)]
        self.fn = functools.partial(_run, self._program, implementation)
        # Flat, so that a call does not take the weights' tree apart again.
        self._arrays, structure = jax.tree.flatten(self.weights)
        self._jitted = jax.jit(lambda arrays, *inputs: self.fn(jax.tree.unflatten(structure, arrays), *inputs))

    def __call__(self, *inputs: Any) -> Any:
        leaves, tree = jax.tree.flatten(inputs)
        if tree != self._program.input_tree:
            raise ValueError(f"this network was made for arguments like {self._program.input_tree}, got {tree}")
        got = [(x.shape, x.dtype) if isinstance(x, jax.Array) else _shape_and_type(x) for x in leaves]
        want = [(v.shape, v.dtype) for v in self._program.inputs]
        if got != want:
            raise ValueError(
                f"this network was made for {_shapes(want)}, got {_shapes(got)}: make another for these, "
                "or pad them to that shape"
            )
        return self._jitted(self._arrays, *inputs)

    def __str__(self) -> str:
        head = ("layer", "kernel", "rows", "block", "kept", "dense µs", "sparse µs", "runs")
        table = [head, *(_cells(choice) for choice in self.choices)]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def specialize(
    fn: Callable[..., Any],
    *examples: Any,
    block: int | Sequence[int] | None = None,
    choose: Literal["measured", "all", "none"] = "measured",
    implementation: Implementation | None = None,
) -> Network:
    """A fast inference function from a network and its pruned weights, without a change to the model.

        fast = sapp.specialize(lambda x: model.apply(variables, x), example)
        y = fast(x)

    The function is traced with its weights as constants. What depends on them alone is computed now; scales and shifts
    of channels after a dense layer or convolution in float32 or float64, batch normalisation among them, and ReLU are
    folded into it; and each kernel of which blocks are zero, whatever it is called in the model, is multiplied by its
    blocks where that is faster here than in full: `print(fast)` shows which. Results are the network's up to rounding,
    for finite inputs. It is for inference: custom derivatives are lost.

    Layers are products `x @ kernel`, and convolutions of channels that come last, wherever the function or what it
    calls does them, but not within loops and branches (`scan`, `while`, `cond`), and not with several axes of outputs,
    as in the queries, keys and values of flax's attention. These run as they were traced.

    Args:
      fn: jittable, the weights closed over, dropout off and averages running: the network as it serves.
      examples: inputs, or their shapes and dtypes. The result takes inputs of these shapes alone.
      block: `(b_r, b_c)` in which kernels were pruned, or one integer for a square; by default found out.
      choose: `"measured"`: both forms of each pruned layer are timed on this machine, some seconds for a large network.
        `"all"`: every pruned layer by its blocks. `"none"`: folding alone.
      implementation: as `block_sparse_matmul` takes it. Functions to be exported by `jax.export` need `"xla"`.

    Raises:
      TypeError: under `jax.jit`, where weights have no values to look at.
      ValueError: for an unknown `choose` or `implementation`.
    """
    if choose not in ("measured", "all", "none"):
        raise ValueError(f"choose must be measured, all or none, got {choose!r}")
    chosen(implementation, np.dtype(np.float32))  # refuses an unknown one
    sides = [(b, b) for b in BLOCKS] if block is None else [blk.as_block(block)]
    traced = trace(fn, *examples)
    measured: dict[Any, tuple[float, float]] = {}
    forms, choices = [], []
    for step in traced.steps:
        form, choice = (
            _decide(step, sides, choose, implementation, measured) if isinstance(step, Linear) else (None, None)
        )
        forms.append(form)
        choices += [choice] if choice else []
    return Network(traced, forms, choices, implementation)


def _decide(
    step: Linear,
    sides: list[blk.Block],
    choose: str,
    implementation: Implementation | None,
    measured: dict[Any, tuple[float, float]],
) -> tuple[BlockSparse | None, Choice]:
    """The sparse form of a layer's kernel if it is to run by that, and the reasons."""
    kernel, layer = np.asarray(step.kernel), step.layer
    block, density = _pruned_in(kernel, sides) if _can_be_sparse(layer) else (None, 1.0)
    rows = int(np.prod(layer.output.shape[:-1]))
    about = (_described(layer), kernel.shape, rows, block, density)
    if block is None or choose == "none":
        return None, Choice(*about, float("nan"), float("nan"), False)
    w = BlockSparse.fromdense(kernel, block)
    if choose == "all":
        return w, Choice(*about, float("nan"), float("nan"), True)
    key = (*about[:4], round(density, 2), layer.x.shape, layer.relu)
    if key not in measured:
        measured[key] = _measure(step, w, implementation)
    dense, sparse = measured[key]
    return w if sparse < dense else None, Choice(*about, dense, sparse, sparse < dense)


def _pruned_in(kernel: np.ndarray, sides: list[blk.Block]) -> tuple[blk.Block | None, float]:
    """The largest block of which about as few are not zero as of any other, and their share; None if none is zero."""
    rows, cols = blk.matrix_shape(kernel.shape)
    nonzero = kernel != 0
    shares = {}
    for b_r, b_c in sides:
        if b_r <= rows or b_c <= cols:  # else it is the whole kernel
            shares[b_r, b_c] = float(occupied(nonzero, (b_r, b_c)).mean())
    least = min(shares.values(), default=1.0)
    if least == 1:
        return None, 1.0
    return next((block, share) for block, share in shares.items() if share <= 1.1 * least)


def _can_be_sparse(layer: Layer) -> bool:
    kernel = layer.kernel
    if not layer.x.dtype == kernel.dtype == layer.output.dtype or not 2 <= kernel.ndim <= 5 or not kernel.size:
        return False
    if not layer.is_convolution:
        return True
    options = layer.call.options
    numbers, plain = options["dimension_numbers"], (1, 1)
    order = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    dilated = (options["lhs_dilation"], options["rhs_dilation"]) != (plain, plain)
    return order and not dilated and options["feature_group_count"] == 1


def _sparse(layer: Layer, x: Any, w: BlockSparse, bias: Any, implementation: Implementation | None) -> Any:
    if layer.is_convolution:
        strides, padding = layer.call.options["window_strides"], layer.call.options["padding"]
        return block_sparse_conv(
            x, w, strides=strides, padding=padding, bias=bias, relu=layer.relu, implementation=implementation
        )
    lead = x.shape[: x.ndim - w.ndim + 1]
    x = x.reshape(*lead, blk.matrix_shape(w.shape)[0])
    return block_sparse_matmul(x, w, bias=bias, relu=layer.relu, implementation=implementation)


def _measure(step: Linear, w: BlockSparse, implementation: Implementation | None) -> tuple[float, float]:
    """Seconds of the layer in full and by its blocks, measured in turn."""
    layer, bias = step.layer, step.bias
    x = jax.random.normal(jax.random.key(0), layer.x.shape).astype(layer.x.dtype)
    calls = [
        functools.partial(jax.jit(layer.dense), x, step.kernel, bias),
        functools.partial(jax.jit(lambda x, w, bias: _sparse(layer, x, w, bias, implementation)), x, w, bias),
    ]
    seconds: list[list[float]] = [[], []]
    repeats = [1, 1]
    for i, call in enumerate(calls):
        jax.block_until_ready(call())
        repeats[i] = max(1, round(_ROUND_SECONDS / _timed(call, 1)))
    for _ in range(_ROUNDS):
        for call, n, taken in zip(calls, repeats, seconds, strict=True):
            taken.append(_timed(call, n))
    dense, sparse = (float(np.median(taken)) for taken in seconds)
    return dense, sparse


def _timed(call: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - started) / repeats


def _needs(step: Call | Linear, form: BlockSparse | None) -> Any:
    """The arrays that a step takes besides its variables."""
    if isinstance(step, Linear):
        return (step.kernel if form is None else form, step.bias)
    return [value.full for value in step.inputs if isinstance(value, Constant) and not _small(value)]


def _without_weights(step: Call | Linear) -> Call | Layer:
    """What is to be done with the arrays of `_needs`."""
    if isinstance(step, Linear):
        return step.layer
    values = (v if isinstance(v, Variable) or _small(v) else Constant(None, v.shape) for v in step.inputs)
    return step._replace(inputs=tuple(values))


def _shape_and_type(x: Any) -> tuple[tuple[int, ...], Any]:
    """Of what is not an array of JAX's: as it will be when it is made one."""
    return np.shape(x), jax.dtypes.canonicalize_dtype(jnp.result_type(x))


def _small(constant: Constant) -> bool:
    return int(np.prod(constant.shape)) <= _INLINE


def _run(
    program: Traced[Call | Layer], implementation: Implementation | None, weights: Sequence[Any], *inputs: Any
) -> Any:
    values: dict[Variable, Any] = dict(zip(program.inputs, jax.tree.leaves(inputs), strict=True))
    for step, given in zip(program.steps, weights, strict=True):
        if isinstance(step, Layer):
            kernel, bias = given
            if isinstance(kernel, BlockSparse):
                values[step.output] = _sparse(step, values[step.x], kernel, bias, implementation)
            else:
                values[step.output] = step.dense(values[step.x], kernel, bias)
        else:
            rest = iter(given)
            arguments = [
                values[v] if isinstance(v, Variable) else jnp.asarray(v.full) if _small(v) else next(rest)
                for v in step.inputs
            ]
            values |= dict(zip(step.outputs, step.run(*arguments), strict=True))
    results = [values[v] if isinstance(v, Variable) else v.full for v in program.outputs]
    return jax.tree.unflatten(program.tree, results)


def _described(layer: Layer) -> str:
    if not layer.is_convolution:
        return "dense"
    options = layer.call.options
    window = "×".join(str(n) for n in layer.kernel.shape[:-2])
    strides = "×".join(map(str, options["window_strides"]))
    return f"convolution {window}" + (f", strides {strides}" if set(options["window_strides"]) != {1} else "")


def _cells(choice: Choice) -> tuple[str, ...]:
    block = "-" if choice.block is None else "×".join(map(str, choice.block))
    times = [
        "-" if np.isnan(seconds) else f"{1e6 * seconds:,.0f}"
        for seconds in (choice.dense_seconds, choice.sparse_seconds)
    ]
    kernel, rows = "×".join(map(str, choice.kernel)), f"{choice.rows:,}"
    return choice.layer, kernel, rows, block, f"{choice.density:.1%}", *times, "sparse" if choice.sparse else "dense"


def _shapes(shapes: Sequence[tuple[tuple[int, ...], Any]]) -> str:
    return ", ".join(f"{np.dtype(dtype).name}{list(shape)}" for shape, dtype in shapes)
