"""Fast inference for whole networks: layers run in the compiled kernel where that is faster, pruned ones by blocks."""

import functools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

import sa_plus_plus.serve as serve
import sa_plus_plus.sparse.lowering as lowering
import sa_plus_plus.sparse.native as native
from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import Plan
from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.attention import Attention
from sa_plus_plus.sparse.calibration import batch_of, batches_of, errors_of, ranges_of, shape_and_type, shapes
from sa_plus_plus.sparse.forms import BFLOAT16, FLOAT32, UINT8
from sa_plus_plus.sparse.fusing import with_attention
from sa_plus_plus.sparse.inference import instead
from sa_plus_plus.sparse.matmul import Implementation, chosen
from sa_plus_plus.sparse.overlooked import overlooked, weights_among
from sa_plus_plus.sparse.patterns import planned_blocks, pruned_in
from sa_plus_plus.sparse.program import Program, assembled, by_blocks, described, run
from sa_plus_plus.sparse.steps import Call, Linear, Traced, Variable
from sa_plus_plus.sparse.tracing import trace
from sa_plus_plus.sparse.windows import window_of

Precision = Literal["float32", "bfloat16", "int8"]
_ROUNDS, _ROUND_SECONDS = 5, 0.01  # rounds of measurement, and the least duration of one
_NAMES = {FLOAT32: "float32", BFLOAT16: "bfloat16", UINT8: "int8"}


class Choice(NamedTuple):
    """The outcome for one product or convolution with a constant kernel, or for one attention.

    Attributes:
      layer: what it is.
      kernel: the kernel's shape; for a product `(contracted, outputs)`. Of attention, which has none: the number of
        heads in the batch, of queries and of keys, and the depth.
      rows: number of rows of activations that its matrix is multiplied with; 0 if it is not a layer.
      block: the blocks in which it is pruned; None if it is not.
      density: share of those blocks that are not zero; NaN for a kernel that was not examined.
      traced_seconds: time as traced, NaN if it was not measured.
      compiled_seconds: time in the compiled kernel, or by its blocks in another implementation.
      runs: how the network runs it: `"sparse"`, by its blocks; `"dense"`, in full in the compiled kernel; `"fused"`,
        attention in the compiled kernel; `"traced"`.
      precision: in which it computes.
      error: root mean square error of its result in low precision on the calibration data, including the effect of all
        previous layers, relative to that of the result; NaN without calibration data.
      note: why it runs as traced, if there was no alternative, or in another precision than was requested.
    """

    layer: str
    kernel: tuple[int, ...]
    rows: int
    block: blk.Block | None
    density: float
    traced_seconds: float = float("nan")
    compiled_seconds: float = float("nan")
    runs: str = "traced"
    precision: str = ""
    error: float = float("nan")
    note: str = ""

    @property
    def sparse(self) -> bool:
        """Whether it is multiplied by its blocks."""
        return self.runs == "sparse"


class Network:
    """A network for inputs of one shape; call it like the function that it was made from.

    Attributes:
      choices: one for each dense layer, convolution, other operation with a constant kernel, and attention, in order.
      weights: the first argument of `fn`.
      fn: `fn(weights, *inputs)`, pure: can be jitted with other functions, or exported.
    """

    def __init__(self, program: Program, weights: Sequence[Any], choices: Sequence[Choice]):
        self._program = program
        self.choices = tuple(choices)
        self.weights = weights
        self.fn = functools.partial(run, program)
        self._wanted = [(batch_of(v.shape, program.pieces), v.dtype) for v in program.traced.inputs]
        # Flat, so that a call does not flatten the weights' tree again.
        self._arrays, structure = jax.tree.flatten(self.weights)
        self._jitted = jax.jit(lambda arrays, *inputs: self.fn(jax.tree.unflatten(structure, arrays), *inputs))

    def __call__(self, *inputs: Any) -> Any:
        traced = self._program.traced
        leaves, tree = jax.tree.flatten(inputs)
        if tree != traced.input_tree:
            raise ValueError(f"this network was made for arguments like {traced.input_tree}, got {tree}")
        got = [(x.shape, x.dtype) if isinstance(x, jax.Array) else shape_and_type(x) for x in leaves]
        want = self._wanted
        if got != want:
            raise ValueError(f"this network was made for {shapes(want)}, got {shapes(got)}: {instead(want, got)}")
        return self._jitted(self._arrays, *inputs)

    @property
    def examples(self) -> tuple[Any, ...]:
        """Shapes and dtypes of its arguments."""
        return jax.tree.unflatten(self._program.traced.input_tree, [jax.ShapeDtypeStruct(*v) for v in self._wanted])

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write it to one file, which `sapp.serve.load` reads without the model's code: `sapp.serve.save(path, self)`.

            >>> import os, tempfile, jax.numpy as jnp, sa_plus_plus as sapp
            >>> network = sapp.specialize(lambda x: x @ (2 * jnp.eye(3)), jnp.ones(3))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     size = network.save(os.path.join(folder, "network"))
            ...     print(sapp.serve.load(os.path.join(folder, "network"))(jnp.ones(3)))
            [2. 2. 2.]

        Args:
          path: of the file.

        Returns:
          The file's size in bytes.

        Raises:
          ValueError: if arguments or results are pytrees that `jax.export` cannot write.
          ImportError: without `safetensors` or `flatbuffers`.
        """
        return serve.save(path, self)

    def __reduce__(self) -> Any:
        """The pickle is the file that `save` writes; it unpickles as a `sapp.serve.Loaded`."""
        return serve.reduced(self)

    def __deepcopy__(self, memo: Any) -> "Network":
        return Network(self._program, jax.tree.map(lambda a: a, self.weights), self.choices)

    def __str__(self) -> str:
        table = [_HEAD, *(_cells(choice) for choice in self.choices)]
        used = [i for i in range(len(_HEAD)) if len({row[i] for row in table[1:]} - {"", "-"}) or i < 5]
        widths = [max(len(row[i]) for row in table) for i in used]
        lines = ["  ".join(row[i].ljust(w) for i, w in zip(used, widths, strict=True)).rstrip() for row in table]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def specialize(
    fn: Callable[..., Any],
    *examples: Any,
    block: int | Sequence[int] | None = None,
    plan: Plan | None = None,
    choose: Literal["measured", "all", "none"] = "measured",
    implementation: Implementation | None = None,
    precision: Precision | None = None,
    calibration: Iterable[Any] | None = None,
    microbatch: int | None = None,
) -> Network:
    """Make a fast inference function from a network and its pruned weights, without changing the model.

        fast = sapp.specialize(lambda x: model.apply(variables, x), example)
        y = fast(x)

    The function is traced with its weights as constants, and constant expressions are folded. Each dense layer or
    convolution in float32 or float64 absorbs scales and shifts of channels, such as those of batch normalisation, the
    addition of another value of the same shape, and ReLU. On CPUs layers run in the package's compiled kernel where
    that is faster than as traced: pruned ones by their nonzero blocks, the rest in full. On other platforms pruned
    layers are multiplied by their blocks where that is faster. `print(fast)` shows the choice for each layer. Results
    equal the network's up to rounding, for finite inputs. It is for inference: custom derivatives are lost.

    Layers are products of a value and a constant, with any contracted axes, and convolutions over one or two axes, in
    any order of axes, in the function or in functions that it calls. A batched product with up to 64 constant kernels,
    as in mixtures of experts, is one layer per kernel; a `scan` of up to 128 steps over constant kernels is unrolled.
    Products within `while`, `cond` and other loops are not layers; convolutions with groups, dilation or transposition
    run as traced. The table lists them with the reason.

    Attention, `softmax(q kᵀ * scale + bias) v`, is one step in the compiled kernel if it is written as two products
    with a softmax as in `jax.nn.softmax` between them, in float32 or bfloat16: in any order of axes, with masks and
    biases, at least 8 queries and keys, up to three axes of heads and a depth of up to 512. It cannot be
    differentiated.

    In `"int8"`, the kernels of layers are rounded to 8 bits with one scale per output, and their inputs with one scale
    per tensor, from the minimum and maximum over the calibration data. Sums are exact, in 32 bits. The first and the
    last layer, where rounding costs the most accuracy, are in bfloat16 if the processor multiplies that faster,
    otherwise in float32. In `"bfloat16"`, kernels and activations are rounded to bfloat16, and sums are in float32.

    Args:
      fn: jittable inference function with the weights closed over, dropout off, and batch normalisation on running
        averages.
      examples: inputs, or their shapes and dtypes. The result takes only inputs of these shapes.
      block: `(b_r, b_c)` in which kernels were pruned, or one integer for a square; by default inferred from the
        positions of zeros.
      plan: `sp.plan(params)`, to take blocks from instead. A traced kernel has no path, so it is matched by the size of
        its matrix, or of its transpose if it is 2-D; among several matches, the block size with the fewest nonzero
        blocks is taken. Kernels without a match are treated as without a plan.
      choose: `"measured"`: both forms of each layer are timed on this machine, some seconds for a large network.
        `"all"`: every layer in the compiled kernel, or every pruned layer by its blocks, without timing. `"none"`:
        only folding.
      implementation: as in `block_sparse_matmul`. Functions that are exported for platforms other than the CPU need
        `"xla"`.
      precision: of layers that are float32 in the network: `"float32"`, `"bfloat16"` or `"int8"`; the
        latter two need the compiled kernel. None: as in the network.
      calibration: a list of some batches of typical inputs, each an array or a tuple of arguments of the shapes of
        `examples`; an array, or a tuple of all arguments, alone is one batch. `"int8"` needs them; otherwise they are
        used only to measure errors.
      microbatch: how many examples go through the whole network at a time, so that activations stay in the caches: 32
        images through a pruned ResNet-50 take little more than half the time. The batch must be the
        first axis of every input and output, and no example may depend on another. None: the whole batch at once.

    Raises:
      TypeError: under `jax.jit`, where no weight values are available.
      ValueError: for an unknown option, a plan that matches no kernel, int8 without calibration data, calibration
        data that are empty, of wrong shapes or not finite, or a microbatch that does not divide the batch.
      RuntimeError: if the requested precision needs the compiled kernel and there is none.

    Warns:
      UserWarning: if there are no layers, because the weights are among the arguments or because there are no kernels.
    """
    if choose not in ("measured", "all", "none"):
        raise ValueError(f"choose must be measured, all or none, got {choose!r}")
    compiles = implementation in (None, "native") and native.missing() is None and jax.default_backend() == "cpu"
    _check_precision(precision, calibration, implementation, compiles)
    chosen(implementation, np.dtype(np.float32))  # refuses an unknown one
    if block is not None and plan is not None:
        raise ValueError(f"give block or plan, not both: got block={block!r}")
    sides = [] if block is None else [blk.as_block(block)]
    pieces, examples = _pieces(examples, microbatch)
    traced = trace(fn, *examples)
    if pieces > 1 and (odd := [v.shape for v in traced.outputs if v.shape[:1] != (microbatch,)]):
        raise ValueError(f"with microbatch={microbatch} every output needs the batch as its first axis, got {odd[0]}")
    measured: dict[Any, tuple[float, float]] = {}
    attention: dict[int, Choice] = {}  # by number of the step
    if compiles and choose != "none":
        traced, attention = _with_attention(traced, choose, measured)
    batches = None if calibration is None else batches_of(traced, calibration, pieces)
    ranges = ranges_of(traced, batches) if batches and precision == "int8" else {}
    types = _types(traced, precision) if compiles and choose != "none" else {}
    forms: list[Any] = []
    choices: list[list[Choice]] = []
    planned = _planned(traced, plan)
    for i, step in enumerate(traced.steps):
        if isinstance(step, Linear):
            form, choice = _decide(step, sides or planned.get(i, []), choose, implementation, types.get(i), measured)
            forms.append(form)
            choices.append([choice])
        else:
            forms.append(None)
            choices.append([attention[i]] if i in attention else [_left_out(*product) for product in overlooked(step)])
    if not any(isinstance(step, Linear) for step in traced.steps):
        _warn(traced, any(choices))
    program, weights = assembled(traced, forms, ranges, implementation)
    program = program._replace(pieces=pieces)
    if batches:
        errors = errors_of(traced, program, weights, batches)
        for step, row in zip(traced.steps, choices, strict=True):
            if isinstance(step, Linear):
                row[:] = [choice._replace(error=errors[step.layer.output]) for choice in row]
    return Network(program, weights, [choice for row in choices for choice in row])


def _pieces(examples: tuple[Any, ...], microbatch: int | None) -> tuple[int, tuple[Any, ...]]:
    """The number of pieces of a batch, and the shapes and dtypes of one piece."""
    if microbatch is None:
        return 1, examples
    given = [shape_and_type(x) for x in jax.tree.leaves(examples)]
    batch = given[0][0][0] if given and given[0][0] else 0
    if isinstance(microbatch, bool) or not isinstance(microbatch, int | np.integer) or microbatch < 1:
        raise ValueError(f"microbatch must be a positive integer, got {microbatch!r}")
    if not batch or any(shape[:1] != (batch,) for shape, _ in given) or batch % microbatch:
        raise ValueError(
            f"microbatch={microbatch} must divide the batch, the first axis of every input; got {shapes(given)}"
        )
    cut = [jax.ShapeDtypeStruct((microbatch, *shape[1:]), dtype) for shape, dtype in given]
    return batch // microbatch, jax.tree.unflatten(jax.tree.structure(examples), cut)


def _planned(traced: Traced[Call | Linear], plan: Plan | None) -> dict[int, list[blk.Block]]:
    """By layer number: the blocks of the plan's kernels of its size."""
    if plan is None:
        return {}
    layers = {i: step.layer.kernel.shape for i, step in enumerate(traced.steps) if isinstance(step, Linear)}
    planned = {i: blocks for i, shape in layers.items() if (blocks := planned_blocks(plan, shape))}
    if not planned:
        pruned = ", ".join(f"{path} {layer.shape}" for path, layer in plan.pruned.items())
        raise ValueError(
            f"the plan matches no kernel of this network: it prunes {pruned}, but the network has kernels of shapes "
            f"{', '.join(map(str, layers.values())) or 'none'}; give the plan of these parameters, or block="
        )
    return planned


def _left_out(operation: str, kernel: tuple[int, ...], note: str) -> Choice:
    return Choice(operation, kernel, 0, None, float("nan"), note=note)


def _warn(traced: Traced[Call | Linear], listed: bool) -> None:
    """Warn if there are no layers, and say what to do if weights are among the arguments."""
    if weights_among(traced):
        text = (
            "specialize found no layers, for the kernels are among the arguments: close over the weights, "
            "`specialize(lambda x: f(weights, x), x)`"
        )
    elif not listed:
        text = "specialize found no products with constant kernels: the network runs as it was traced"
    else:
        return
    warnings.warn(text, UserWarning, stacklevel=3)


def _check_precision(precision: Any, calibration: Any, implementation: Any, compiles: bool) -> None:
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))} or None, got {precision!r}")
    if precision == "int8" and calibration is None:
        raise ValueError(
            "int8 needs calibration data to choose the scale of each layer's inputs: give calibration=[batch, ...], "
            "some batches of typical inputs"
        )
    if precision in ("bfloat16", "int8") and not compiles:
        why = native.missing() or f"implementation={implementation!r}, on {jax.default_backend()}"
        raise RuntimeError(f"precision={precision!r} needs the compiled kernel for CPUs, and it is not used: {why}")


def _types(traced: Traced[Call | Linear], precision: Precision | None) -> dict[int, np.dtype]:
    """By step number: the input type of a layer that can run in the compiled kernel."""
    layers = [i for i, step in enumerate(traced.steps) if isinstance(step, Linear)]
    outer = lowering.outer_type() if precision == "int8" else FLOAT32  # where rounding costs the most
    types = {}
    for i in layers:
        layer = traced.steps[i].layer  # type: ignore[union-attr]
        dtype = np.dtype(layer.kernel.dtype)
        if isinstance(window_of(layer), str) or not dtype == layer.x.dtype == layer.output.dtype:
            continue
        if dtype == BFLOAT16:
            types[i] = BFLOAT16
        elif dtype == FLOAT32 and precision == "int8" and i in (layers[0], layers[-1]):
            types[i] = outer
        elif dtype == FLOAT32:
            types[i] = {"bfloat16": BFLOAT16, "int8": UINT8}.get(precision or "", FLOAT32)
    return types


def _decide(
    step: Linear,
    sides: Sequence[blk.Block],
    choose: str,
    implementation: Implementation | None,
    dtype: np.dtype | None,
    measured: dict[Any, tuple[float, float]],
) -> tuple[lowering.Packed | BlockSparse | None, Choice]:
    """The packed kernel of a layer, None if it runs as traced; and the reasons."""
    layer, window = step.layer, window_of(step.layer)
    kernel = np.asarray(step.kernel)
    block, density = pruned_in(kernel, sides)
    about = (described(layer), kernel.shape, layer.rows, block, density)
    choice = Choice(*about, precision=np.dtype(layer.kernel.dtype).name)
    form: lowering.Packed | BlockSparse | None = None
    if isinstance(window, str):
        return None, choice._replace(note=window)
    if dtype is not None:
        form = lowering.packed(step, window, dtype, block)
        if form.dtype != dtype:
            dtype, choice = form.dtype, choice._replace(note="in int8 its sums could be beyond 32 bits")
    elif len(types := {np.dtype(a.dtype).name for a in (layer.x, layer.kernel, layer.output)}) > 1:
        choice = choice._replace(note=f"of more than one type: {', '.join(sorted(types))}")
    elif kernel.ndim == 3:
        choice = choice._replace(note="a convolution over one axis, for which there is only the compiled kernel")
    elif block is not None:
        form = BlockSparse.fromdense(kernel, block)
    if choose == "none" or form is None:
        return None, choice
    runs = "dense" if block is None else "sparse"
    precision = choice.precision if dtype is None else _NAMES[dtype]
    if choose == "all":
        return form, choice._replace(runs=runs, precision=precision)
    key = (*about[:4], round(density, 2), layer.x.shape, layer.activation, layer.residual is None, precision)
    if key not in measured:
        measured[key] = _measure(step, form, implementation)
    slow, fast = measured[key]
    choice = choice._replace(traced_seconds=slow, compiled_seconds=fast)
    return (form, choice._replace(runs=runs, precision=precision)) if fast < slow else (None, choice)


def _with_attention(
    traced: Traced[Call | Linear], choose: str, measured: dict[Any, tuple[float, float]]
) -> tuple[Traced[Any], dict[int, Choice]]:
    """The network with attention as one step where that is faster; and by number of a step the reasons."""
    steps: list[Any] = []
    choices = {}
    for step in with_attention(traced):
        if not isinstance(step, Attention):
            steps.append(step)
            continue
        dtype = np.dtype(step.outputs[0].dtype).name
        choice = Choice("attention", step.shape, 0, None, float("nan"), runs="fused", precision=dtype)
        if choose == "measured":
            key = (step.axes, dtype, step.seen, *(v.shape for v in step.inputs))
            if key not in measured:
                inputs = [_noise(v) if isinstance(v, Variable) else v.full for v in step.inputs]
                measured[key] = _alternated(
                    [functools.partial(jax.jit(run), *inputs) for run in (step.traced, step.run)]
                )
            slow, fast = measured[key]
            runs = "fused" if fast < slow else "traced"
            choice = choice._replace(traced_seconds=slow, compiled_seconds=fast, runs=runs)
        choices[len(steps)] = choice
        steps += [step._replace(calls=())] if choice.runs == "fused" else step.calls
    return traced._replace(steps=steps), choices


def _measure(step: Linear, form: Any, implementation: Implementation | None) -> tuple[float, float]:
    """Seconds of the layer as traced and in the given form, measured alternately."""
    layer = step.layer
    residual = None if layer.residual is None else _noise(layer.residual)
    x: Any = _noise(layer.x)
    contenders = [(jax.jit(layer.dense), (x, step.kernel, step.bias, residual))]
    if isinstance(form, lowering.Packed):
        # As the layer before would leave its input.
        (held, added), compiled, weights = lowering.alone(step, form, x, residual)
        contenders.append((jax.jit(compiled.run), (held, added, *weights)))
    else:
        run = functools.partial(by_blocks, layer, implementation=implementation)
        contenders.append((jax.jit(run), (x, form, step.bias, residual)))
    return _alternated([functools.partial(run, *arguments) for run, arguments in contenders])


def _alternated(calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
    """Seconds of two calls, measured alternately."""
    seconds: list[list[float]] = [[], []]
    repeats = [1, 1]
    for i, call in enumerate(calls):
        jax.block_until_ready(call())
        repeats[i] = max(1, round(_ROUND_SECONDS / _timed(call, 1)))
    for _ in range(_ROUNDS):
        for call, n, taken in zip(calls, repeats, seconds, strict=True):
            taken.append(_timed(call, n))
    traced, compiled_seconds = (float(np.median(taken)) for taken in seconds)
    return traced, compiled_seconds


def _noise(value: Variable) -> jax.Array:
    return jax.random.normal(jax.random.key(0), value.shape).astype(value.dtype)


def _timed(call: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - started) / repeats


_HEAD = ("layer", "kernel", "rows", "block", "kept", "traced µs", "compiled µs", "runs", "precision", "error", "note")


def _cells(choice: Choice) -> tuple[str, ...]:
    block = "-" if choice.block is None else "×".join(map(str, choice.block))
    times = [
        "-" if np.isnan(seconds) else f"{1e6 * seconds:,.0f}"
        for seconds in (choice.traced_seconds, choice.compiled_seconds)
    ]
    kernel, rows = "×".join(map(str, choice.kernel)), f"{choice.rows:,}" if choice.rows else "-"
    kept = "-" if np.isnan(choice.density) else f"{choice.density:.1%}"
    error = "-" if np.isnan(choice.error) else f"{choice.error:.2g}"
    return (
        choice.layer,
        kernel,
        rows,
        block,
        kept,
        *times,
        choice.runs,
        choice.precision,
        error,
        choice.note,
    )
