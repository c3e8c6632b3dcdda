"""The report of a run: result.json, metrics.jsonl, the pruned weights, a picture, and a table on the screen."""

import os
import pathlib
import platform
import warnings
from collections.abc import Sequence
from typing import Any

import flax
import jax
import matplotlib
import ml_collections
import numpy as np
import optax

import sa_plus_plus as sapp
from experiments.training.loop import Outcome
from sa_plus_plus.checks import occupied
from sa_plus_plus.files import write_atomically

if "MPLBACKEND" not in os.environ:  # a notebook has one of its own
    matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator


def versions() -> dict[str, str]:
    """Versions of Python and the libraries, and the device."""
    packages = {"jax": jax, "flax": flax, "optax": optax, "numpy": np, "sa_plus_plus": sapp}
    return {
        "python": platform.python_version(),
        **{name: module.__version__ for name, module in packages.items()},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def kernel_leaves(outcome: Outcome) -> dict[str, np.ndarray]:
    """The network's arrays by path."""
    leaves = jax.tree_util.tree_leaves_with_path(outcome.params)
    return {sapp.path_string(path): np.asarray(leaf) for path, leaf in leaves}


def layer_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Per kernel: shape, block, blocks and zeros, counted in the pruned network's own weights."""
    leaves, rows = kernel_leaves(outcome), []
    for layer in outcome.plan.leaves:
        if not layer.is_kernel:
            continue
        weights = leaves[layer.path]
        alive = occupied(weights, layer.block, layer.view)
        rows.append(
            {
                "path": layer.path,
                "shape": list(layer.shape),
                "block": list(layer.block),
                "blocks": layer.blocks,
                "kept": int(alive.sum()),
                "weights": layer.weights,
                "nonzero": int(np.count_nonzero(weights)),
                "skip_reason": layer.skip_reason,
            }
        )
    return rows


def real_sparsity(layers: list[dict[str, Any]]) -> float:
    """Share of zeros among the weights of all kernels."""
    return 1 - sum(row["nonzero"] for row in layers) / sum(row["weights"] for row in layers)


def kept_weights(outcome: Outcome) -> int:
    """Parameters of the whole network without the zeros of its kernels; embeddings, biases and all else count."""
    zeros = sum(row["weights"] - row["nonzero"] for row in layer_rows(outcome))
    return sum(leaf.size for leaf in jax.tree.leaves(outcome.params)) - zeros


def result(config: ml_collections.ConfigDict, outcome: Outcome, metric: str) -> dict[str, Any]:
    """The content of `result.json`."""
    layers = layer_rows(outcome)
    return {
        "algorithm": config.sparsifier.name,
        "block": list(config.sparsifier.block),
        "target_sparsity": config.sparsifier.sparsity if config.sparsifier.name != "dense" else 0.0,
        "real_sparsity": real_sparsity(layers),
        "kept_weights": kept_weights(outcome),
        "metric_name": f"test_{metric}",
        "metric": outcome.test[f"test_{metric}"],
        "loss": outcome.test["test_loss"],
        "diverged": outcome.diverged,
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "compile_seconds": outcome.compile_seconds,
        "seed": outcome.seed,
        "layers": layers,
        "versions": versions(),
        "config": config.to_dict(),
    }


def reorderings(outcome: Outcome) -> list[dict[str, Any]]:
    """The content of `orders.json`: which unit came to which place, and what that gained, for each reordering."""
    return [each._asdict() for each in outcome.reorderings]


def chosen_features(outcome: Outcome, names: Sequence[str]) -> list[dict[str, Any]]:
    """The inputs that the network uses, sorted by the norm of their rows of the pruned kernel, largest first.

    Args:
      outcome: of a network whose first kernel alone is pruned, in whole rows.
      names: of all inputs.
    """
    (layer,) = outcome.plan.pruned.values()
    norms = np.linalg.norm(sapp.blocks.matrices(kernel_leaves(outcome)[layer.path], layer.view), axis=-1)
    order = np.argsort(-norms, kind="stable")[: np.count_nonzero(norms)]
    return [{"name": names[i], "index": int(i), "norm": float(norms[i])} for i in order]


def save_weights(path: pathlib.Path, outcome: Outcome) -> None:
    """The pruned network by its kept blocks: with `sapp.load`, the variables that its model is applied to."""
    with warnings.catch_warnings():
        if outcome.diverged:  # it ended before its schedule did, and the run says so
            warnings.simplefilter("ignore", UserWarning)
        exported = sapp.export(outcome.params, outcome.plan)
    sapp.save(path, {"params": exported, **outcome.model_state})


def plot_run(path: pathlib.Path, outcome: Outcome, rows: list[dict[str, Any]], metric: str, title: str) -> None:
    """Plot test metric and sparsity against step, with shaded phases."""
    fig, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    outcome.phases.shade(ax)
    steps = np.arange(outcome.phases.total_steps + 1)
    due = outcome.plan.sparsity * np.asarray(outcome.phases.fraction(steps))
    ax.step(steps, due, where="post", color="black", lw=0.8, label="sparsity of all kernels: due")
    ax.plot([r["step"] for r in rows], [r["sparsity"] for r in rows], "k.", ms=3, label="measured")
    step_axis(ax, outcome.phases.total_steps)
    ax.set(ylabel="sparsity", ylim=(0, 1.02), title=title)
    tested = [row for row in rows if f"test_{metric}" in row]
    right = ax.twinx()  # metrics have scales of their own
    right.plot([r["step"] for r in tested], [r[f"test_{metric}"] for r in tested], color="#1f4e9c")
    right.set_ylabel(f"test {metric}", color="#1f4e9c")
    fig.legend(loc="outside lower center", fontsize="small", ncols=6)
    save_figure(path, fig)


def step_axis(ax: Any, total_steps: int) -> None:
    """An axis of a run's steps, with integer ticks."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set(xlabel="step", xlim=(0, total_steps))


def save_figure(path: pathlib.Path, fig: Any) -> None:
    write_atomically(path, lambda file: fig.savefig(file, format="png", dpi=120))
    plt.close(fig)
