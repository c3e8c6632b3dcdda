"""Table 2 and Figure 5: click prediction, validation loss and AUC against block size and sparsity.

    python -m experiments.reproduce table2 --scale=paper --local=path/to/criteo
    python -m experiments.reproduce table2 --scale=small

At scale `paper` Criteo's log; at scale `small` click data with planted features, which need no files.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.reproduce.scales import CONTROLS, NARROW, PAPERS, orders, sweep


def get_config(scale: str = "small") -> ConfigDict:
    grid: dict[str, Any] = {
        "blocks": (1, 5, 10, 20),
        "sparsities": (0.9, 0.95, 0.97, 0.98, 0.99),
        "metric": "loss",
        "lower_is_better": True,
        "paper": "table2",
        "files": scale == "paper",
    }
    if scale == "paper":
        title = "Click network on Criteo: validation loss"
        return sweep(title, "configs/criteo_block10.py", variants=PAPERS, seeds=(0, 1, 2), **grid)
    title = "Click network on planted features: validation loss"
    if scale == "small":
        grid |= {"blocks": (5, 10, 20), "changes": {"dense_twin": False}}
        return sweep(
            title,
            "configs/planted.py",
            variants=PAPERS | CONTROLS,
            compared=orders(PAPERS | CONTROLS),
            seeds=(0, 1, 2),
            **grid,
        )
    changes: dict[str, Any] = {"steps": 40, "eval_every": 40, "checkpoint_every": 40, "dense_twin": False}
    changes |= {"data.options.rows": 30_000, "data.options.held_out": 10_000}
    grid |= {"blocks": (10,), "sparsities": (0.9,), "seeds": (0,), "changes": changes}
    return sweep(title, "configs/planted.py", variants=PAPERS | NARROW, **grid)
