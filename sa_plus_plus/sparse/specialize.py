"""Fast inference for whole networks: layers run in the compiled kernel where that is faster, pruned ones by blocks."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import jax
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus import progress
from sa_plus_plus.planning import Plan
from sa_plus_plus.sparse.arguments import batches_of, shape_and_type, shapes
from sa_plus_plus.sparse.comparison import Comparison, compared
from sa_plus_plus.sparse.compiler.attention import Attention
from sa_plus_plus.sparse.compiler.autotune import Autotuner, Mode, Precision, input_types
from sa_plus_plus.sparse.compiler.calibration import errors_of, ranges_of
from sa_plus_plus.sparse.compiler.executor import assemble
from sa_plus_plus.sparse.compiler.frontend import layers_fused
from sa_plus_plus.sparse.compiler.infer_blocks import planned_blocks
from sa_plus_plus.sparse.compiler.ir import Layer, Traced, Variable
from sa_plus_plus.sparse.compiler.passes.fuse_attention import fuse_attention
from sa_plus_plus.sparse.compiler.passes.fuse_normalization import expanded, fuse_normalizations, without_calls
from sa_plus_plus.sparse.compiler.passes.look_up import fuse_look_up
from sa_plus_plus.sparse.compiler.passes.pooling import fuse_pooling
from sa_plus_plus.sparse.compiler.planned import PlannedStep
from sa_plus_plus.sparse.compiler.unsupported import weights_among
from sa_plus_plus.sparse.network import Network
from sa_plus_plus.sparse.ops import native
from sa_plus_plus.sparse.ops.matmul import Implementation, chosen

MOST_DIFFERENCE = 0.05  # of the largest result, that rounding explains, in layers of bfloat16 too


def specialize(
    fn: Callable[..., Any],
    *examples: Any,
    block: int | Sequence[int] | None = None,
    plan: Plan | None = None,
    mode: Mode = "autotune",
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
    addition of another value of the same shape, and an activation function. On CPUs layers run in the package's
    compiled kernel where that is faster than as traced: pruned ones by their nonzero blocks, the rest in full. On other
    platforms pruned layers are multiplied by their blocks where that is faster. `print(fast)` shows the choice for each
    layer, and at last whether it was worth it. Results equal the network's up to rounding, for finite inputs. It is for
    inference: custom derivatives are lost.

    Layers are products of a value and a constant, with any contracted axes, and convolutions over one or two axes, in
    any order of axes, in the function or in functions that it calls. A batched product with up to 64 constant kernels,
    as in mixtures of experts, is one layer per kernel; a `scan` of up to 128 steps over constant kernels is unrolled.
    Products within `while`, `cond` and other loops are not layers; convolutions with dilation or transposition run as
    traced. The table lists them with the reason. Depthwise convolutions, which may be dilated, run in full in the
    compiled kernel, in float32 whatever the precision; other convolutions with groups run by their blocks.

    Attention, `softmax(q kᵀ * scale + bias) v`, is one step in the compiled kernel if it is written as two products
    with a softmax as in `jax.nn.softmax` between them, in float32 or bfloat16: in any order of axes, with masks and
    biases, at least 8 queries and keys, up to three axes of heads and a depth of up to 512. It cannot be
    differentiated. So is layer normalisation and RMS normalisation over the last axis, in float32 or with float32
    between bfloat16, however it is written.

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
      mode: `"autotune"`: each layer is timed on this machine both as traced and otherwise, and then the whole network
        beside `jax.jit(fn)`, some seconds for a large network. `"always"`: every layer in the compiled kernel, or every
        pruned layer by its blocks, without timing. `"never"`: only folding.
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
      UserWarning: if there are no layers, because the weights are among the arguments or because there are no kernels;
        if results in float32 differ from those of `fn` by more than rounding explains, with `mode="autotune"`.
    """
    options: dict[str, Any] = {
        "block": block,
        "plan": plan,
        "mode": mode,
        "implementation": implementation,
        "precision": precision,
    }
    with progress.doing("specialize"):
        network = specialized(fn, examples, calibration=calibration, microbatch=microbatch, **options)
        if mode == "autotune":
            network.whole = compared(fn, network, examples)
    if network.whole is not None and precision is None:
        _warn_of_difference(network.whole)
    return network


def specialized(
    fn: Callable[..., Any],
    examples: tuple[Any, ...],
    *,
    block: int | Sequence[int] | None = None,
    plan: Plan | None = None,
    mode: Mode = "autotune",
    implementation: Implementation | None = None,
    precision: Precision | None = None,
    calibration: Iterable[Any] | None = None,
    microbatch: int | None = None,
) -> Network:
    """`specialize` without measuring the whole network."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    compiled = implementation in (None, "native") and jax.default_backend() == "cpu"
    compiled = compiled and native.unavailable_reason() is None
    _check_precision(precision, calibration, implementation, compiled)
    chosen(implementation, np.dtype(np.float32))  # refuses an unknown one
    if block is not None and plan is not None:
        raise ValueError(f"give block or plan, not both: got block={block!r}")
    sides = [] if block is None else [blk.as_block(block)]
    pieces, examples = _pieces(examples, microbatch)
    progress.say("tracing")
    traced = layers_fused(fn, *examples)
    if pieces > 1 and (odd := [v.shape for v in traced.outputs if v.shape[:1] != (microbatch,)]):
        raise ValueError(f"with microbatch={microbatch} every output needs the batch as its first axis, got {odd[0]}")
    _check_plan(traced, plan)
    batches = None if calibration is None else batches_of(traced, calibration, pieces)
    compiled = compiled and mode != "never"
    traced = fuse_normalizations(fuse_attention(traced)) if compiled else traced
    tuner = Autotuner(
        mode,
        implementation,
        input_types(traced.layers, precision) if compiled else {},
        lambda kernel: planned_blocks(plan, kernel.shape) if plan is not None else sides,
    )
    planned = tuner.plan(traced.steps)
    if any(p.x_type is not None or isinstance(p.step, Attention) for p in planned):  # it needs the compiled kernel
        planned = [p._replace(step=fuse_look_up(fuse_pooling(without_calls(p.step)))) for p in planned]
    else:
        planned = [p._replace(step=step) for p in planned for step in expanded(p.step)]
    if not traced.layers:
        _warn(traced, any(p.choices for p in planned))
    traced = traced._replace(steps=[p.step for p in planned])
    ranges = ranges_of(traced, batches) if batches and precision == "int8" else {}
    program, weights = assemble(traced, planned, ranges, implementation, pieces)
    if batches:
        errors = errors_of(traced, program, weights, batches)
        planned = [_with_error(p, errors) for p in planned]
    return Network(program, weights, [choice for p in planned for choice in p.choices])


def _with_error(planned: PlannedStep, errors: Mapping[Variable, float]) -> PlannedStep:
    if not isinstance(planned.step, Layer):
        return planned
    error = errors[planned.step.spec.output]
    return planned._replace(choices=tuple(choice._replace(error=error) for choice in planned.choices))


def _pieces(examples: tuple[Any, ...], microbatch: int | None) -> tuple[int, tuple[Any, ...]]:
    """The number of pieces of a batch, and the shapes and dtypes of one piece."""
    if microbatch is None:
        return 1, examples
    inputs = [shape_and_type(x) for x in jax.tree.leaves(examples)]
    batch = inputs[0][0][0] if inputs and inputs[0][0] else 0
    if isinstance(microbatch, bool) or not isinstance(microbatch, int | np.integer) or microbatch < 1:
        raise ValueError(f"microbatch must be a positive integer, got {microbatch!r}")
    if not batch or any(shape[:1] != (batch,) for shape, _ in inputs) or batch % microbatch:
        raise ValueError(
            f"microbatch={microbatch} must divide the batch, the first axis of every input; got {shapes(inputs)}"
        )
    cut = [jax.ShapeDtypeStruct((microbatch, *shape[1:]), dtype) for shape, dtype in inputs]
    return batch // microbatch, jax.tree.unflatten(jax.tree.structure(examples), cut)


def _check_plan(traced: Traced, plan: Plan | None) -> None:
    """Refuse a plan that has no kernel of this network."""
    shapes = [layer.spec.kernel.shape for layer in traced.layers]
    if plan is None or any(planned_blocks(plan, shape) for shape in shapes):
        return
    pruned = ", ".join(f"{path} {layer.shape}" for path, layer in plan.pruned.items())
    raise ValueError(
        f"the plan matches no kernel of this network: it prunes {pruned}, but the network has kernels of shapes "
        f"{', '.join(map(str, shapes)) or 'none'}; give the plan of these parameters, or block="
    )


def _warn(traced: Traced, listed: bool) -> None:
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
    warnings.warn(text, UserWarning, stacklevel=4)


def _warn_of_difference(whole: Comparison) -> None:
    """Warn if results in float32 are not those of the function; in other types rounding may explain that."""
    if not whole.in_float32 or whole.difference <= MOST_DIFFERENCE or np.isinf(whole.difference):
        return
    inputs = "the example" if whole.on_example else "random inputs"
    warnings.warn(
        f"specialize: on {inputs} the largest difference from jax.jit(fn) is {whole.difference:.1e} of the largest "
        "result. Either the function amplifies rounding that much, or this is an error of the library: compare both on "
        'your data, run it by mode="never", and report it',
        UserWarning,
        stacklevel=3,
    )


def _check_precision(precision: Any, calibration: Any, implementation: Any, compiled: bool) -> None:
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))} or None, got {precision!r}")
    if precision == "int8" and calibration is None:
        raise ValueError(
            "int8 needs calibration data to choose the scale of each layer's inputs: give calibration=[batch, ...], "
            "some batches of typical inputs"
        )
    if precision in ("bfloat16", "int8") and not compiled:
        why = native.unavailable_reason() or f"implementation={implementation!r}, on {jax.default_backend()}"
        raise RuntimeError(f"precision={precision!r} needs the compiled kernel for CPUs, and it is not used: {why}")
