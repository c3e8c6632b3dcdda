"""Calibration of a network: the range of each value, and the error of low precision."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.compiler.executor import Program, assemble, evaluate
from sa_plus_plus.sparse.compiler.ir import Traced, Variable
from sa_plus_plus.sparse.compiler.planned import PlannedStep


def ranges_of(traced: Traced, batches: Sequence[Any]) -> dict[Variable, tuple[float, float]]:
    """Minimum and maximum of each value that layers take or return, over the calibration data."""
    program, weights = _plain(traced)
    layers = [layer.spec for layer in traced.layers]
    wanted = list(
        dict.fromkeys(v for layer in layers for v in (layer.x, layer.output, layer.residual) if v is not None)
    )
    if not wanted:
        return {}

    @jax.jit
    def ends(weights: Any, *inputs: Any) -> Any:
        values = evaluate(program, weights, inputs)
        arrays = [values.get(v).astype(jnp.float32) for v in wanted]
        return jnp.stack([jnp.stack([a.min(initial=0), a.max(initial=0)]) for a in arrays])  # ranges include 0

    extremes = np.stack([np.asarray(ends(weights, *batch)) for batch in batches])
    if not np.isfinite(extremes).all():
        bad = wanted[int(np.argmin(np.isfinite(extremes).all((0, 2))))]
        layer = next(layer for layer in layers if bad in (layer.x, layer.output, layer.residual))
        raise ValueError(f"the network's values on the calibration data are not finite, at {layer.description}")
    return {
        v: (float(low), float(high))
        for v, low, high in zip(wanted, extremes[:, :, 0].min(0), extremes[:, :, 1].max(0), strict=True)
    }


def errors_of(traced: Traced, program: Program, weights: Any, batches: Sequence[Any]) -> dict[Variable, float]:
    """Relative error of each layer's result against full precision, over the calibration data."""
    plain, full = _plain(traced)
    outputs = [layer.spec.output for layer in traced.layers]

    @jax.jit
    def squares(full: Any, weights: Any, *inputs: Any) -> Any:
        want, got = evaluate(plain, full, inputs), evaluate(program, weights, inputs)
        pairs = [(want.get(v).astype(jnp.float32), got.get(v).astype(jnp.float32)) for v in outputs]
        return jnp.stack([jnp.stack([jnp.sum((a - b) ** 2), jnp.sum(a**2)]) for a, b in pairs])

    if not outputs:
        return {}
    each = [np.asarray(squares(full, weights, *batch), np.float64) for batch in batches]
    off, size = np.moveaxis(np.sum(each, 0), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {v: float(np.sqrt(a / b)) for v, a, b in zip(outputs, off, size, strict=True)}


def _plain(traced: Traced) -> tuple[Program, list[Any]]:
    return assemble(traced, [PlannedStep(step) for step in traced.steps], {})
