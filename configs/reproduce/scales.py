"""What the sweeps share: how large they are at each scale, and the algorithms beside the paper's."""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

SCALES = ("paper", "small", "smoke")
PAPERS = {
    "SA++": {"sparsifier.name": "sequential_attention"},
    "ACDC": {"sparsifier.name": "acdc"},
    "PowerPropagation": {"sparsifier.name": "powerpropagation"},
    "magnitude": {"sparsifier.name": "magnitude"},
}
NARROW = {"narrow": {"sparsifier.name": "narrow"}}  # the dense network with as many weights as the pruned ones
CAPPED = {"narrow, capped": {"sparsifier.name": "narrow", "sparsifier.narrow.cut": "cap"}}
RECOMMENDED = "SA++, effective norm, one rise"  # docs/choosing.md
CONTROLS = {
    "gradual magnitude": {"sparsifier.name": "gradual_magnitude"},
    "gradual magnitude, long sparse phase": {"sparsifier.name": "gradual_magnitude", "sparsifier.recipe": "gradual"},
    RECOMMENDED: {
        "sparsifier.name": "sequential_attention",
        "sparsifier.recipe": "finetune",
        "sparsifier.sequential_attention.score": "effective",
    },
    "random": {"sparsifier.name": "random"},
    **NARROW,
}
BASELINES = {
    "RigL": {"sparsifier.name": "rigl"},
    "SET": {"sparsifier.name": "sparse_evolutionary"},
    "movement": {"sparsifier.name": "movement"},
    "group LASSO": {"sparsifier.name": "group_lasso"},
    "D-Gating": {"sparsifier.name": "d_gating"},
}


def orders(variants: Iterable[str]) -> dict[str, list[str]]:
    """The comparisons of a table: SA++ and the recommended recipe with all others, then ACDC > magnitude > random."""
    others = [name for name in variants if name not in ("SA++", RECOMMENDED)]
    return {"SA++": others, RECOMMENDED: ["SA++", *others], "ACDC": ["magnitude"], "magnitude": ["random"]}


def sweep(title: str, file: str, **options: Any) -> ConfigDict:
    """A sweep.

    Args:
      title: of its table.
      file: the config that each cell changes.
      options: `variants`, by name what each changes in the config; `blocks`, `sparsities`, `seeds`; `changes`, those of
        all cells; `dense`, whether the dense network is trained too; `metric`, which output of the test is shown, and
        `percent`, whether in percent; `lower_is_better`, of that metric; `compared`, the other variants that a variant
        is compared with, seed by seed, by default the first with all others; `files`, whether the data are read from
        files; `paper`, its table in `experiments/sweeps/paper.json`; `note`, what its page says besides.
    """
    defaults: dict[str, Any] = {"changes": {}, "dense": True, "percent": False, "paper": "", "note": ""}
    defaults |= {"metric": "accuracy", "files": True, "lower_is_better": False, "compared": {}}
    return ConfigDict({"title": title, "file": file, **defaults, **options}, convert_dict=False)


def mnist(title: str, extra: Mapping[str, Any] | None = None, **options: Any) -> ConfigDict:
    """A minute's worth of the same: LeNet-300-100 on a few digits, with `extra` changes to its config."""
    changes = {"steps": 60, "eval_every": 60, "checkpoint_every": 60, "dense_twin": False, **(extra or {})}
    common = {"blocks": (4, 8), "sparsities": (0.8,), "seeds": (0, 1), "changes": changes, "percent": True}
    return sweep(title, "configs/mnist.py", **common | options)


def fashion(title: str, **options: Any) -> ConfigDict:
    """LeNet-300-100 on Fashion-MNIST in 4,000 steps: seconds a run, and a random mask is points behind."""
    changes = {"steps": 4000, "eval_every": 4000, "checkpoint_every": 4000, "dense_twin": False, "log_every": 200}
    common = {"seeds": (0, 1, 2, 3, 4), "changes": changes, "percent": True}
    return sweep(title, "configs/fashion_mnist.py", **common | options)
