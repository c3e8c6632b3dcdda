"""How each step of a network runs: as traced, or in the compiled kernel or by blocks where that is measured faster."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus import progress
from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.compiler.attention import Attention
from sa_plus_plus.sparse.compiler.conv_geometry import window_of
from sa_plus_plus.sparse.compiler.depthwise import DepthwiseKernel, depthwise_of, lower_depthwise, pack_depthwise
from sa_plus_plus.sparse.compiler.executor import run_by_blocks
from sa_plus_plus.sparse.compiler.infer_blocks import pruned_in
from sa_plus_plus.sparse.compiler.ir import Call, Layer, Step, Variable
from sa_plus_plus.sparse.compiler.lowering import lower_alone, pack_kernel
from sa_plus_plus.sparse.compiler.measure import Contender, compiled, lowered, noise, seconds_of
from sa_plus_plus.sparse.compiler.planned import Choice, PackedKernel, PlannedStep
from sa_plus_plus.sparse.compiler.quantization import BFLOAT16, FLOAT32, UINT8, fallback_type
from sa_plus_plus.sparse.compiler.unsupported import unsupported
from sa_plus_plus.sparse.ops.matmul import Implementation

Mode = Literal["autotune", "always", "never"]
Precision = Literal["float32", "bfloat16", "int8"]
_NAMES = {FLOAT32: "float32", BFLOAT16: "bfloat16", UINT8: "int8"}


class Candidates(NamedTuple):
    """The ways in which a step can run; each begins with the step's report.

    Attributes:
      traced: as traced.
      fast: in the compiled kernel or by blocks; None if there is no such way.
      key: equal for steps that take equally long.
      contenders: makes what is measured, both ways.
    """

    traced: Sequence[PlannedStep]
    fast: Sequence[PlannedStep] | None = None
    key: Any = None
    contenders: Callable[[], Sequence[Contender]] | None = None


class Autotuner:
    """Plans steps; equal layers are measured once.

    Attributes:
      mode: whether steps are measured.
      implementation: of layers that do not run in the compiled kernel.
      types: by result: in which type a layer's input goes into the compiled kernel; without those that do not.
      blocks: of a layer's kernel: those in which it may be pruned; none for those that its zeros suggest.
    """

    def __init__(
        self,
        mode: Mode,
        implementation: Implementation | None,
        types: Mapping[Variable, np.dtype],
        blocks: Callable[[jax.ShapeDtypeStruct], Sequence[blk.Block]],
    ):
        self.mode, self.implementation, self.types, self.blocks = mode, implementation, types, blocks

    def plan(self, steps: Sequence[Step]) -> list[PlannedStep]:
        """How operations, layers and attention run; attention that runs as traced becomes its operations."""
        each = [self._candidates(step) for step in progress.each(steps, "reading step")]
        kernels = [step.spec.kernel for step in steps if isinstance(step, Layer)]
        network_bytes = sum(math.prod(kernel.shape) * np.dtype(kernel.dtype).itemsize for kernel in kernels)
        seconds = measured(each, network_bytes) if self.mode == "autotune" else {}
        return [planned for candidates in each for planned in chosen(candidates, seconds)]

    def _candidates(self, step: Step) -> Candidates:
        if isinstance(step, Layer):
            return self._layer(step)
        if isinstance(step, Attention):
            return self._attention(step)
        if not isinstance(step, Call):
            return Candidates([PlannedStep(step)])
        rows = [Choice(name, kernel, 0, None, float("nan"), note=note) for name, kernel, note in unsupported(step)]
        return Candidates([PlannedStep(step, choices=tuple(rows))])

    def _layer(self, layer: Layer) -> Candidates:
        spec, window, dtype = layer.spec, window_of(layer.spec), self.types.get(layer.spec.output)
        kernel = np.asarray(layer.kernel)
        block, density = pruned_in(kernel, self.blocks(spec.kernel))
        about = (spec.description, kernel.shape, spec.rows, block, density)
        choice = Choice(*about, precision=np.dtype(spec.kernel.dtype).name)
        packed: PackedKernel | DepthwiseKernel | BlockSparse | None = None
        if (depthwise := depthwise_of(spec)) is not None and dtype is not None:
            packed = pack_depthwise(layer, depthwise)
        elif isinstance(window, str):
            choice = choice._replace(note=window)
        elif dtype is not None:
            packed = pack_kernel(layer, window, dtype, block)
            if packed.dtype != dtype:
                dtype, choice = packed.dtype, choice._replace(note="in int8 its sums could be beyond 32 bits")
        elif len(types := {np.dtype(a.dtype).name for a in (spec.x, spec.kernel, spec.output)}) > 1:
            choice = choice._replace(note=f"of more than one type: {', '.join(sorted(types))}")
        elif kernel.ndim == 3 or (spec.conv and spec.conv["feature_group_count"] > 1):
            what = "over one axis" if kernel.ndim == 3 else "with groups"
            choice = choice._replace(note=f"a convolution {what}, for which there is only the compiled kernel")
        elif block is not None:
            packed = BlockSparse.fromdense(kernel, block)
        traced = [PlannedStep(layer, choices=(choice,))]
        if self.mode == "never" or packed is None:
            return Candidates(traced)
        in_full = isinstance(packed, PackedKernel) and packed.w.layout.density == 1
        runs = "dense" if block is None or depthwise or in_full else "sparse"
        fast = choice._replace(runs=runs, precision=choice.precision if dtype is None else _NAMES[dtype])
        shapes = spec.x.shape, spec.activation, spec.residual is None, layer.shift is None, fast.precision
        key = (*about[:4], _density_class(density), *shapes)
        return Candidates(
            traced, [PlannedStep(layer, packed, (fast,))], key, lambda: self._layer_contenders(layer, packed)
        )

    def _layer_contenders(self, layer: Layer, packed: PackedKernel | DepthwiseKernel | BlockSparse) -> list[Contender]:
        """A layer as traced and with its packed kernel."""
        spec = layer.spec

        def inputs() -> Sequence[Any]:
            return [noise(spec.x), None if spec.residual is None else noise(spec.residual)]

        def as_traced(inputs: Sequence[Any], weights: Any) -> Any:
            (x, residual), (kernel, bias) = inputs, weights
            return spec.run(x, kernel, bias, residual)

        def by_blocks(inputs: Sequence[Any], weights: Any) -> Any:
            (x, residual), (w, bias) = inputs, weights
            return run_by_blocks(spec, x, w, bias, residual, self.implementation)

        traced = Contender(as_traced, inputs, (jnp.asarray(layer.kernel), layer.bias))
        if isinstance(packed, DepthwiseKernel):
            depthwise, arrays = lower_depthwise(layer, packed)
            return [traced, Contender(lambda inputs, weights: depthwise.run(*inputs, *weights), inputs, arrays)]
        if not isinstance(packed, PackedKernel):
            return [traced, Contender(by_blocks, inputs, (packed, layer.bias))]
        compiled, weights, encoded = lower_alone(layer, packed)

        def in_kernel(inputs: Sequence[Any], weights: Any) -> Any:
            return compiled.run(*inputs, *weights)

        return [traced, Contender(in_kernel, lambda: encoded(*inputs()), weights)]

    def _attention(self, step: Attention) -> Candidates:
        dtype = np.dtype(step.outputs[0].dtype).name
        choice = Choice("attention", step.shape, 0, None, float("nan"), precision=dtype)
        first, *rest = step.calls
        traced = [PlannedStep(first, choices=(choice,)), *map(PlannedStep, rest)]
        fast = [PlannedStep(step._replace(calls=()), choices=(choice._replace(runs="fused"),))]

        def inputs() -> Sequence[Any]:
            return [noise(v) if isinstance(v, Variable) else v.full for v in step.inputs]

        def as_traced(inputs: Sequence[Any], _: Any) -> Any:
            return step.traced(*inputs)

        def fused(inputs: Sequence[Any], _: Any) -> Any:
            return step.run(*inputs)

        def contenders() -> Sequence[Contender]:
            return [Contender(as_traced, inputs, ()), Contender(fused, inputs, ())]

        return Candidates(traced, fast, (step.axes, dtype, step.visible, *(v.shape for v in step.inputs)), contenders)


def measured(each: Sequence[Candidates], network_bytes: int) -> dict[Any, tuple[float, ...]]:
    """By key, seconds as traced and otherwise, of a network's steps; compiling is over before the first is timed."""
    contenders: dict[Any, Sequence[Contender]] = {}
    for candidates in each:
        if candidates.contenders is not None and candidates.key not in contenders:
            contenders[candidates.key] = candidates.contenders()
    programs = iter(compiled(lowered(one) for pair in contenders.values() for one in pair))
    return {
        key: seconds_of([next(programs) for _ in pair], pair, network_bytes)
        for key, pair in progress.each(contenders.items(), "measuring layer", len(contenders))
    }


def chosen(candidates: Candidates, seconds: Mapping[Any, Sequence[float]]) -> Sequence[PlannedStep]:
    """The faster way to run a step, with the times in its report; the other one than as traced without times."""
    if candidates.fast is None or candidates.key not in seconds:
        return candidates.traced if candidates.fast is None else candidates.fast
    traced, fast = seconds[candidates.key]
    first, *rest = candidates.traced if traced <= fast else candidates.fast
    choices = tuple(c._replace(traced_seconds=traced, compiled_seconds=fast) for c in first.choices)
    return [first._replace(choices=choices), *rest]


def _density_class(density: float) -> int:
    """Equal for shares of blocks that differ by up to a seventh: kernels of one size then take about as long."""
    return round(5 * math.log2(density)) if density else -1000


def input_types(layers: Sequence[Layer], precision: Precision | None) -> dict[Variable, np.dtype]:
    """By result: the type in which a layer that can run in the compiled kernel takes its input."""
    outer = fallback_type() if precision == "int8" else FLOAT32  # where rounding costs the most
    types: dict[Variable, np.dtype] = {}
    for i, spec in enumerate(layer.spec for layer in layers):
        dtype = np.dtype(spec.kernel.dtype)
        depthwise = depthwise_of(spec) is not None
        if (isinstance(window_of(spec), str) and not depthwise) or not dtype == spec.x.dtype == spec.output.dtype:
            continue
        if depthwise:
            types |= {spec.output: FLOAT32} if dtype == FLOAT32 else {}
        elif dtype == BFLOAT16:
            types[spec.output] = BFLOAT16
        elif dtype == FLOAT32 and precision == "int8" and i in (0, len(layers) - 1):
            types[spec.output] = outer
        elif dtype == FLOAT32:
            types[spec.output] = {"bfloat16": BFLOAT16, "int8": UINT8}.get(precision or "", FLOAT32)
    return types
