"""ONNX Runtime and OpenVINO on all cores, configured to serve one request at a time."""

import functools
import importlib.util
import io
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

ENGINES = ("onnxruntime", "openvino")
PRECISIONS = ("float32", "bfloat16", "int8")
Run = Callable[[np.ndarray], np.ndarray]


class Engines(NamedTuple):
    """The available contenders, by names such as `onnxruntime float32` or `onnxruntime int8 dynamic`.

    Attributes:
      runs: each computes a batch of the shape of the example and returns its result, float32.
      missing: why an engine that was asked for is not among them.
      calls: the same for the example itself.
    """

    runs: dict[str, Callable[[np.ndarray], np.ndarray]]
    missing: dict[str, str]
    calls: dict[str, Callable[[], np.ndarray]]


def contenders(
    model: nn.Module,
    variables: Any,
    x: np.ndarray,
    *,
    engines: Sequence[str] = ENGINES,
    precisions: Sequence[str] = PRECISIONS,
    calibration: Sequence[np.ndarray] = (),
) -> Engines:
    """The network in every engine and precision, for the batch `x`.

    In int8, weights have a scale for each output channel. `int8` has fixed ranges of activations, found by the
    calibration; `int8 dynamic` finds them anew for each input, in networks without convolutions. Activations are signed
    or not as is faster: OpenVINO's dense layers took half the time with signed ones, ONNX Runtime's twice the time, and
    convolutions are faster with unsigned ones in both.

    Args:
      model: a flax linen module.
      variables: what it is applied to.
      x: a batch as the model takes it.
      engines: some of `ENGINES`.
      precisions: some of `PRECISIONS`.
      calibration: batches of the shape of `x`; by default `x` itself.
    """
    names, missing = available(engines, precisions)
    if not names:
        return Engines({}, missing, {})
    from experiments.engines import graphs  # noqa: PLC0415 - needs onnx, which is optional

    try:
        graph = graphs.graph(model, variables, x)
    except ValueError as error:
        return Engines({}, missing | dict.fromkeys(names, str(error)), {})
    convolutions = any(node.op_type == "Conv" for node in graph.model.graph.node)
    if convolutions:
        missing |= {name: "slow for convolutions" for name in names if name.endswith("dynamic")}
    forms = _Forms(graph.model, [graph.layout(batch) for batch in calibration or [x]], convolutions)
    make = {"onnxruntime": _onnxruntime, "openvino": _openvino}
    inner = {n: make[n.split()[0]](forms, n.split(maxsplit=1)[1]) for n in names if n not in missing}
    runs: dict[str, Run] = {name: functools.partial(_with_layout, run, graph.layout) for name, run in inner.items()}
    laid_out = graph.layout(x)
    return Engines(runs, missing, {name: functools.partial(run, laid_out) for name, run in inner.items()})


def available(engines: Sequence[str], precisions: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The contenders that this machine can run, and why it cannot run the others."""
    names = [f"{engine} {p}" for engine in engines for precision in precisions for p in _FORMS[engine][precision]]
    missing = {name: reason for name in names if (reason := _not_here(name))}
    return [name for name in names if name not in missing], missing


def _with_layout(run: Run, layout: Run, x: np.ndarray) -> np.ndarray:
    return run(layout(x))


_FORMS = {  # the forms of a precision in each engine
    "onnxruntime": {"float32": ["float32"], "bfloat16": ["bfloat16"], "int8": ["int8", "int8 dynamic"]},
    "openvino": {"float32": ["float32"], "bfloat16": ["bfloat16"], "int8": ["int8"]},
}


def precision(name: str) -> str:
    """The precision in a contender's name."""
    return name.split()[1]


def fastest(seconds: dict[str, np.ndarray], wanted: str) -> str | None:
    """The engine of this precision with the lowest median; None if there is none."""
    names = [name for name in seconds if name.split()[0] in ENGINES and precision(name) == wanted]
    return min(names, key=lambda name: float(np.median(seconds[name])), default=None)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _not_here(name: str) -> str | None:
    """Why this machine cannot run a contender."""
    engine, kind = name.split()[0], precision(name)
    needed = [engine, "onnx", *(["onnxruntime"] if kind == "int8" else [])]  # the latter quantizes for both
    absent = [package for package in dict.fromkeys(needed) if not installed(package)]
    if absent:
        return f"{' and '.join(absent)} not installed"
    if name == "onnxruntime bfloat16":
        return "not on CPUs"
    if name == "openvino bfloat16" and "BF16" not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "not on this processor"
    return None


class _Forms:
    """A graph as it is and quantized, serialised; each is created on first use."""

    def __init__(self, model: Any, calibration: list[np.ndarray], convolutions: bool):
        self._model, self._calibration, self.convolutions = model, calibration, convolutions
        # Without convolutions only products with weights are quantized: the rest is little work and loses much.
        self._types = None if convolutions else ["MatMul", "Gemm"]

    @functools.cached_property
    def full(self) -> bytes:
        return self._model.SerializeToString()

    @functools.cached_property
    def unsigned(self) -> bytes:
        """Activations of 0 to 255 with a zero point."""
        return self._static("QUInt8")

    @functools.cached_property
    def symmetric(self) -> bytes:
        """Activations of -127 to 127 around zero."""
        return self._static("QInt8", ActivationSymmetric=True)

    @functools.cached_property
    def dynamic(self) -> bytes:
        from onnxruntime import quantization  # noqa: PLC0415 - optional

        return self._quantized(quantization.quantize_dynamic)

    def _static(self, activations: str, **extra: bool) -> bytes:
        from onnxruntime import quantization  # noqa: PLC0415 - optional

        name, batches = self._model.graph.input[0].name, iter(self._calibration)

        class Reader(quantization.CalibrationDataReader):
            def get_next(self) -> dict[str, np.ndarray] | None:
                batch = next(batches, None)
                return None if batch is None else {name: batch}

        quantize = functools.partial(
            quantization.quantize_static,
            calibration_data_reader=Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType[activations],
        )
        return self._quantized(quantize, **extra)

    def _quantized(self, quantize: Callable[..., None], **extra: bool) -> bytes:
        from onnxruntime.quantization import QuantType, quant_pre_process  # noqa: PLC0415 - optional

        with tempfile.TemporaryDirectory() as folder:  # files are what it takes
            given, prepared, result = (pathlib.Path(folder, f"{name}.onnx") for name in ("given", "prepared", "result"))
            given.write_bytes(self.full)
            quant_pre_process(given, prepared, skip_symbolic_shape=True)
            quantize(
                prepared,
                result,
                op_types_to_quantize=self._types,
                per_channel=True,
                reduce_range=_saturates(),
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True, **extra},
            )
            return result.read_bytes()


@functools.cache
def _saturates() -> bool:
    """Whether the engines sum pairs of 8-bit products in 16 bits, which overflow unless weights have 7 bits.

    Both do on x86 processors without VNNI, and ONNX Runtime's page on quantization says to use `reduce_range` there.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":  # what OpenVINO computes with is limited to this
        return True
    cpus = pathlib.Path("/proc/cpuinfo")
    flags = set(cpus.read_text().split()) if cpus.exists() else set()
    return "avx2" in flags and not flags & {"avx_vnni", "avx512_vnni"}


def _onnxruntime(forms: _Forms, form: str) -> Run:
    import onnxruntime  # noqa: PLC0415 - optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    content = {"float32": "full", "int8": "unsigned", "int8 dynamic": "dynamic"}[form]
    session = onnxruntime.InferenceSession(getattr(forms, content), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def _openvino(forms: _Forms, form: str) -> Run:
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads()}
    if form == "int8":  # what is not in int8 is by default in whatever is fastest
        content = forms.unsigned if forms.convolutions else forms.symmetric
    else:
        content, options["INFERENCE_PRECISION_HINT"] = forms.full, {"float32": "f32", "bfloat16": "bf16"}[form]
    model = _core().read_model(io.BytesIO(content))
    request = _core().compile_model(model, "CPU", options).create_infer_request()
    return lambda x: request.infer({0: x})[0]


@functools.cache
def _core() -> Any:
    # Else reading a model reports it to the makers, from a fork of this process, which JAX's threads do not survive.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino  # noqa: PLC0415 - optional

    return openvino.Core()


def threads() -> int:
    """As many as JAX has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
