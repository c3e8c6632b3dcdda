"""The cells of a sweep: what each trains, where its results are, and the command that trains it alone."""

import importlib
import itertools
import pathlib
import re
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from experiments.outputs import workdir
from experiments.utils import registry

TABLES = ("table1", "table2", "table3", "table4")  # of the paper
SWEEPS = (*TABLES, "bytes", "cifar10")
DENSE, NARROW, CAPPED = "dense", "narrow", "narrow, capped"


class Sweep(NamedTuple):
    """A table: what is varied, and its scale.

    Attributes:
      name: one of `SWEEPS`.
      scale: `paper`, `small` or `smoke`.
      options: what `configs/reproduce/<name>.py` says; see `configs/reproduce/scales.py`.
      local: where the data are, for data sets that are read from files.
    """

    name: str
    scale: str
    options: Mapping[str, Any]
    local: str = ""

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.scale}"


class Cell(NamedTuple):
    """One run: a variant, a block size, a sparsity and a seed; the dense network has neither block nor sparsity."""

    sweep: Sweep
    variant: str
    block: int
    sparsity: float
    seed: int

    @property
    def folder(self) -> pathlib.Path:
        """Below the sweeps' directory."""
        about = "" if self.variant == DENSE else f"-{self.block}x{self.block}-{self.sparsity:g}"
        name = re.sub(r"[^A-Za-z0-9+=]+", "_", self.variant).strip("_")
        return pathlib.Path(self.sweep.folder, f"{name}{about}-seed{self.seed}")

    @property
    def changes(self) -> dict[str, Any]:
        """The cell's changes to the sweep's config, flat."""
        options = self.sweep.options
        changes = dict(options["changes"]) | {"seed": self.seed}
        if self.sweep.local:
            changes["data.local"] = self.sweep.local
        if self.variant == DENSE:
            return changes | {"sparsifier.name": DENSE}
        own = options["variants"][self.variant]
        return changes | own | {"sparsifier.block": (self.block, self.block), "sparsifier.sparsity": self.sparsity}

    def config(self) -> ml_collections.ConfigDict:
        """The config of its run."""
        module = self.sweep.options["file"].removesuffix(".py").replace("/", ".")
        config = importlib.import_module(module).get_config()
        config.update_from_flattened_dict(self.changes)
        return config

    def command(self, directory: pathlib.Path) -> str:
        """The command that trains it alone, into the same place."""
        changes = [f"--config.{key}={value}" for key, value in self.changes.items()]
        words = [f"--config={self.sweep.options['file']}", *changes, f"--workdir={directory / self.folder}"]
        return shlex.join(["python", "-m", "experiments.main", *words])


def sweep(name: str, scale: str, local: str = "", seeds: int = 0) -> Sweep:
    """A sweep by its name.

    Args:
      name: one of `SWEEPS`.
      scale: one of those of `configs/reproduce/scales.py`.
      local: where the data are; ignored by sweeps on data that need no files.
      seeds: how many instead of the sweep's own; 0 for these.

    Raises:
      ValueError: for an unknown sweep or scale.
    """
    registry.check(name, SWEEPS, "the table")
    registry.check(scale, importlib.import_module("configs.reproduce.scales").SCALES, "--scale")
    options = importlib.import_module(f"configs.reproduce.{name}").get_config(scale).to_dict()
    if seeds:
        options["seeds"] = tuple(range(seeds))
    return Sweep(name, scale, options, local if options["files"] else "")


def cells_of(sweep: Sweep) -> list[Cell]:
    """All cells of a sweep; those that differ only in the seed are adjacent, since they share one program."""
    options = sweep.options
    dense = [(0, 0.0, DENSE)] if options["dense"] else []
    grid = [*dense, *itertools.product(options["blocks"], options["sparsities"], options["variants"])]
    return [Cell(sweep, variant, block, s, seed) for block, s, variant in grid for seed in options["seeds"]]


def result_of(cell: Cell, directory: pathlib.Path) -> dict[str, Any] | None:
    """The result of a cell's run; None if it is not done, or its `result.json` is damaged: it is done again then."""
    return workdir.result_of(directory / cell.folder)


def check(cells: list[Cell], directory: pathlib.Path) -> None:
    """Refuse a directory whose runs have other settings; one whose config is damaged will fail when it is its turn.

    Raises:
      ValueError: naming a run and the keys that differ.
    """
    for cell in cells:
        try:
            differing = workdir.differing_keys(directory / cell.folder, cell.config())
        except workdir.DamagedConfig:
            continue
        if differing:
            raise ValueError(
                f"{directory / cell.folder} holds a run with another config ({'; '.join(differing)}): choose another "
                "--directory"
            )
