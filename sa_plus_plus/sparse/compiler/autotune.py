"""How each step of a network runs: as traced, or in the compiled kernel or by blocks where that is measured faster."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.compiler.attention import Attention
from sa_plus_plus.sparse.compiler.conv_geometry import window_of
from sa_plus_plus.sparse.compiler.depthwise import DepthwiseKernel, depthwise_of, lower_depthwise, pack_depthwise
from sa_plus_plus.sparse.compiler.executor import run_by_blocks
from sa_plus_plus.sparse.compiler.infer_blocks import pruned_in
from sa_plus_plus.sparse.compiler.ir import Layer, Step, Variable
from sa_plus_plus.sparse.compiler.lowering import lower_alone, pack_kernel
from sa_plus_plus.sparse.compiler.planned import Choice, PackedKernel, PlannedStep
from sa_plus_plus.sparse.compiler.quantization import BFLOAT16, FLOAT32, UINT8, fallback_type
from sa_plus_plus.sparse.compiler.unsupported import unsupported
from sa_plus_plus.sparse.ops.matmul import Implementation
from sa_plus_plus.timing import alternate

Mode = Literal["autotune", "always", "never"]
Precision = Literal["float32", "bfloat16", "int8"]
_ROUNDS, _ROUND_SECONDS = 5, 0.01  # rounds of measurement, and the least duration of one
_NAMES = {FLOAT32: "float32", BFLOAT16: "bfloat16", UINT8: "int8"}


class Autotuner:
    """Plans steps; equal layers are measured once.

    Attributes:
      mode: whether steps are measured.
      implementation: of layers that do not run in the compiled kernel.
      types: by result: in which type a layer's input goes into the compiled kernel; without those that do not.
      candidates: of a layer's kernel: blocks in which it may be pruned; none for those that its zeros suggest.
    """

    def __init__(
        self,
        mode: Mode,
        implementation: Implementation | None,
        types: Mapping[Variable, np.dtype],
        candidates: Callable[[jax.ShapeDtypeStruct], Sequence[blk.Block]],
    ):
        self.mode, self.implementation, self.types, self.candidates = mode, implementation, types, candidates
        self._measured: dict[Any, tuple[float, float]] = {}  # seconds as traced and otherwise

    def plan(self, step: Step) -> list[PlannedStep]:
        """How an operation, a layer or attention runs; attention that runs as traced becomes its operations."""
        if isinstance(step, Layer):
            return [self._layer(step)]
        if isinstance(step, Attention):
            return self._attention(step)
        rows = [Choice(name, kernel, 0, None, float("nan"), note=note) for name, kernel, note in unsupported(step)]
        return [PlannedStep(step, choices=tuple(rows))]

    def _layer(self, layer: Layer) -> PlannedStep:
        spec, window, dtype = layer.spec, window_of(layer.spec), self.types.get(layer.spec.output)
        kernel = np.asarray(layer.kernel)
        block, density = pruned_in(kernel, self.candidates(spec.kernel))
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
        if self.mode == "never" or packed is None:
            return PlannedStep(layer, choices=(choice,))
        runs = "dense" if block is None or depthwise else "sparse"
        fast = choice._replace(runs=runs, precision=choice.precision if dtype is None else _NAMES[dtype])
        if self.mode == "autotune":
            shapes = spec.x.shape, spec.activation, spec.residual is None, fast.precision
            seconds = self._seconds((*about[:4], round(density, 2), *shapes), lambda: self._contenders(layer, packed))
            choice, fast = (c._replace(traced_seconds=seconds[0], compiled_seconds=seconds[1]) for c in (choice, fast))
            if seconds[0] <= seconds[1]:
                return PlannedStep(layer, choices=(choice,))
        return PlannedStep(layer, packed, (fast,))

    def _contenders(
        self, layer: Layer, packed: PackedKernel | DepthwiseKernel | BlockSparse
    ) -> list[Callable[[], Any]]:
        """Calls of a layer as traced and with its packed kernel."""
        spec = layer.spec
        x: Any = _noise(spec.x)
        residual = None if spec.residual is None else _noise(spec.residual)
        traced = functools.partial(jax.jit(spec.run), x, layer.kernel, layer.bias, residual)
        if isinstance(packed, PackedKernel):
            encoded, compiled, weights = lower_alone(layer, packed, x, residual)
            return [traced, functools.partial(jax.jit(compiled.run), *encoded, *weights)]
        if isinstance(packed, DepthwiseKernel):
            depthwise, arrays = lower_depthwise(layer, packed)
            return [traced, functools.partial(jax.jit(depthwise.run), x, residual, *arrays)]
        by_blocks = jax.jit(functools.partial(run_by_blocks, spec, implementation=self.implementation))
        return [traced, functools.partial(by_blocks, x, packed, layer.bias, residual)]

    def _attention(self, step: Attention) -> list[PlannedStep]:
        dtype = np.dtype(step.outputs[0].dtype).name
        choice = Choice("attention", step.shape, 0, None, float("nan"), runs="fused", precision=dtype)
        if self.mode == "autotune":

            def contenders() -> list[Callable[[], Any]]:
                inputs = [_noise(v) if isinstance(v, Variable) else v.full for v in step.inputs]
                return [functools.partial(jax.jit(run), *inputs) for run in (step.traced, step.run)]

            key = (step.axes, dtype, step.visible, *(v.shape for v in step.inputs))
            slow, fast = self._seconds(key, contenders)
            runs = "fused" if fast < slow else "traced"
            choice = choice._replace(traced_seconds=slow, compiled_seconds=fast, runs=runs)
        if choice.runs == "fused":
            return [PlannedStep(step._replace(calls=()), choices=(choice,))]
        first, *rest = step.calls
        return [PlannedStep(first, choices=(choice,)), *map(PlannedStep, rest)]

    def _seconds(self, key: Any, contenders: Callable[[], Sequence[Callable[[], Any]]]) -> tuple[float, float]:
        if key not in self._measured:
            calls = {number: functools.partial(_done, call) for number, call in enumerate(contenders())}
            traced, other = alternate(calls, _ROUNDS, _ROUND_SECONDS, warmup=1).values()
            self._measured[key] = float(np.median(traced)), float(np.median(other))
        return self._measured[key]


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


def _done(call: Callable[[], Any]) -> None:
    jax.block_until_ready(call())


def _noise(value: Variable) -> jax.Array:
    return jax.random.normal(jax.random.key(0), value.shape).astype(value.dtype)
