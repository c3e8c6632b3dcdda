"""Not in the paper: a small GPT on bytes, in bits per byte, against block size and sparsity.

    python -m experiments.reproduce bytes --scale=small
    python -m experiments.reproduce bytes --scale=small --local=path/to/text

The text is the source code of Python's standard library unless `--local` names another. Scale `small` trains two
layers of width 256 on 600 batches of 16 windows of 64 bytes, a minute a run on one core. That is far from convergence.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.reproduce.scales import BASELINES, CONTROLS, NARROW, PAPERS, orders, sweep

NOTE = (
    "With 32 × 32 blocks the attention kernels have 64 each, and the paper's rule prunes none with fewer than 100. So "
    "80, 90 and 95% of the blocks of the other kernels are 53, 60 and 64% of the weights that are pruned with 16 × 16. "
    "The strengths of group LASSO and D-Gating were chosen on Fashion-MNIST. D-Gating's is too large here: "
    "with 32 × 32 blocks its feed-forward weights end below 1e-5, so the sparsity makes no difference."
)


def get_config(scale: str = "small") -> ConfigDict:
    title = "GPT on bytes: bits per byte"
    variants = PAPERS | CONTROLS | BASELINES
    common = {"metric": "bits_per_byte", "lower_is_better": True, "note": NOTE, "compared": orders(variants)}
    if scale == "paper":
        grid: dict[str, Any] = {"blocks": (16, 32), "sparsities": (0.8, 0.9, 0.95), "seeds": (0, 1, 2)}
        return sweep(title, "configs/bytes_gpt.py", variants=variants, **grid, **common)
    changes: dict[str, Any] = {"data.options.context": 64, "data.options.held_out": 0.01, "model_options.layers": 2}
    changes |= {"steps": 600, "eval_every": 600, "checkpoint_every": 600, "log_every": 50, "batch_size": 16}
    changes |= {"optimizer.warmup_steps": 50}
    if scale == "small":
        grid = {"blocks": (16, 32), "sparsities": (0.8, 0.9, 0.95), "seeds": (0, 1, 2), "changes": changes}
        return sweep(title, "configs/bytes_gpt.py", variants=variants, **grid, **common)
    changes |= {"steps": 60, "eval_every": 60, "checkpoint_every": 60, "log_every": 10, "batch_size": 4}
    changes |= {"optimizer.warmup_steps": 5}
    grid = {"blocks": (16,), "sparsities": (0.8,), "seeds": (0,), "changes": changes}
    return sweep(title, "configs/bytes_gpt.py", variants=PAPERS | NARROW, **grid, **common)
