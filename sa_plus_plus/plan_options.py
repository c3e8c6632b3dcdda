"""The options that say which leaves are pruned, checked."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypedDict

import jax
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus import views
from sa_plus_plus.names import named_as_kernel
from sa_plus_plus.plans import OUTPUTS

MIN_BLOCKS = 100  # C.1: layers with fewer blocks stay dense
_NUMBERS = (int, float, Fraction, np.generic, np.ndarray, jax.Array)

Overrides = Mapping[str, Mapping[str, Any]]
Views = Mapping[str, views.Viewable]


class PlanOptions(TypedDict, total=False):
    """Options that say which leaves are pruned, besides `block` and `sparsity`; see `plan`.

    Attributes:
      min_blocks: kernels with fewer blocks stay dense (default 100; paper, C.1).
      where: predicate on the path of a leaf, `Dense_0/kernel`; by default all but embeddings, biases, scales, low-rank
        factors and batch statistics. Depthwise kernels stay dense whatever it says.
      overrides: other `block`, `sparsity`, `min_blocks` or `min_kept` by path or pattern.
      views: how leaves are read as matrices, by path or pattern: `{"*/query/kernel": "d (h k)"}`.
      min_kept: number of blocks that each matrix keeps at least, or `"outputs"` for one in each column of the grid: the
        default for last layers.
    """

    min_blocks: int
    where: Callable[[str], bool]
    overrides: Overrides | None
    views: Views | None
    min_kept: int | str | None


def check_options(
    block: int | Sequence[int | None],
    sparsity: float,
    min_blocks: int = MIN_BLOCKS,
    where: Callable[[str], bool] = named_as_kernel,
    overrides: Overrides | None = None,
    views: Views | None = None,
    min_kept: int | str | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Refuse invalid options of `plan`; return the common ones, and those of the overrides by pattern."""
    if not callable(where):
        raise TypeError(f"where must be a predicate on the path of a leaf, such as lambda path: ..., got {where!r}")
    defaults = {
        "block": blk.as_sides(block),
        "sparsity": _checked_sparsity(sparsity, "sparsity"),
        "min_blocks": _checked_min_blocks(min_blocks, "min_blocks"),
        "min_kept": _checked_min_kept(min_kept, "min_kept"),
    }
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ValueError(f'overrides must be a mapping such as {{"*/kernel": {{"sparsity": 0.5}}}}, got {overrides!r}')
    if views is not None and not isinstance(views, Mapping):
        raise ValueError(f'views must be a mapping such as {{"*/query/kernel": "d (h k)"}}, got {views!r}')
    return defaults, {pattern: _checked_override(pattern, o) for pattern, o in (overrides or {}).items()}


def _checked_sparsity(sparsity: float, name: str) -> float:
    if isinstance(sparsity, bool) or np.ndim(sparsity) or not isinstance(sparsity, _NUMBERS) or not 0 <= sparsity < 1:
        raise ValueError(f"{name} is the share of blocks to remove and must be in [0, 1), got {sparsity!r}")
    # For an array scalar, the intended decimal number: float(np.float32(0.8)) is more than 0.8.
    return float(str(sparsity)) if hasattr(sparsity, "dtype") else float(sparsity)


def _checked_override(pattern: str, override: Any) -> dict[str, Any]:
    if not isinstance(override, Mapping):
        raise ValueError(f'override {pattern!r} must be a mapping such as {{"sparsity": 0.5}}, got {override!r}')
    unknown = set(override) - {"block", "sparsity", "min_blocks", "min_kept"}
    if unknown:
        raise ValueError(
            f"override {pattern!r} may set `block`, `sparsity`, `min_blocks` and `min_kept`, got {sorted(unknown)}"
        )
    checked: dict[str, Any] = {}
    if "block" in override:
        checked["block"] = blk.as_sides(override["block"])
    if "sparsity" in override:
        checked["sparsity"] = _checked_sparsity(override["sparsity"], f"sparsity of override {pattern!r}")
    if "min_blocks" in override:
        checked["min_blocks"] = _checked_min_blocks(override["min_blocks"], f"min_blocks of override {pattern!r}")
    if "min_kept" in override:
        checked["min_kept"] = _checked_min_kept(override["min_kept"], f"min_kept of override {pattern!r}")
    return checked


def _checked_min_blocks(min_blocks: int, name: str) -> int:
    if isinstance(min_blocks, bool) or not isinstance(min_blocks, int | np.integer) or min_blocks < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {min_blocks!r}")
    return int(min_blocks)


def _checked_min_kept(min_kept: int | str | None, name: str) -> int | str | None:
    if min_kept is None or (isinstance(min_kept, str) and min_kept == OUTPUTS):
        return min_kept
    whole = isinstance(min_kept, int | np.integer) and not isinstance(min_kept, bool)
    if not whole or min_kept < 0:  # type: ignore[operator]
        raise ValueError(f'{name} must be a number of blocks of at least 0, or "{OUTPUTS}", got {min_kept!r}')
    return int(min_kept)
