"""A checkpoint: its arrays, the plan by which they were pruned if that is known, and how others are written like it."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import LeafPlan, Plan
from sa_plus_plus.views import View

PLAN = "sa_plus_plus.plan"  # key of the plan in the metadata of safetensors


class Checkpoint(NamedTuple):
    """What a file or a directory holds.

    Attributes:
      path: of it.
      format: a word for it.
      params: its arrays, in a tree as it has them, in full.
      write: `write(output, params, plan)`: other arrays of the same names in the same format, completely or not at all.
      planned: the layers that were pruned, by path, where it has a record of that.
    """

    path: pathlib.Path
    format: str
    params: Any
    write: Callable[[pathlib.Path, Any, Plan], None]
    planned: Mapping[str, LeafPlan] = {}

    @property
    def plan(self) -> Plan | None:
        """The plan by which it was pruned, where that is known."""
        return Plan(tuple(self.planned.values())) if self.planned else None


def record(plan: Plan) -> str:
    """A plan as JSON, for the metadata of a file.

    Args:
      plan: of its arrays.
    """
    layers = {
        path: {
            "shape": layer.shape,
            "block": layer.block,
            "kept": layer.kept,
            "sparsity": layer.sparsity,
            "view": layer.view,
        }
        for path, layer in plan.pruned.items()
    }
    return json.dumps(layers, sort_keys=True)


def recorded(path: pathlib.Path, text: str | None) -> dict[str, LeafPlan]:
    """The layers in such a record.

    Args:
      path: of its file.
      text: the record; None for a file without.

    Raises:
      ValueError: if it is damaged.
    """
    if text is None:
        return {}
    try:
        return {name: _layer(name, **layer) for name, layer in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: the plan in its metadata, {PLAN!r}, cannot be read: {error}") from error


def _layer(
    path: str, shape: list[int], block: list[int], kept: int, sparsity: float, view: list[list[int]] | None
) -> LeafPlan:
    sides, read = tuple(shape), View(*(tuple(axes) for axes in view)) if view else None
    height, width = block
    grid = blk.grid_shape(sides, (height, width), read)
    return LeafPlan(path, sides, (height, width), grid, int(kept), float(sparsity), "", read)
