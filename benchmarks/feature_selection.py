"""Selecting the best 50 pixels: every algorithm and three simpler methods, on MNIST and Fashion-MNIST.

    python -m benchmarks.feature_selection --data=mnist --local=path/to/its/files
    python -m benchmarks.feature_selection --data=fashion_mnist --local=path/to/its/files

Features are chosen on the training part; then a new network, configs/feature_selection.py without pruning, is trained
on these features alone and judged by its accuracy on the test part. Each algorithm has its own schedule, except that
Sequential Attention has that of the config; `sequential_attention_cycles` has that of SequentialAttention++. The
simpler methods are scikit-learn's estimate of the mutual information of each feature with the label, the group LASSO of
multinomial regression (a group is a feature's coefficients of all classes; the features of largest norm at the first
lambda of the path with enough features), and all features. The first two use a part of the training rows. Results are
written after each method; the same command resumes from there.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from matplotlib import pyplot as plt
from sklearn.feature_selection import mutual_info_classif

from benchmarks import timing
from configs import feature_selection
from experiments import cli, data, tasks
from experiments.data.sources import in_memory
from experiments.outputs import progress, report
from experiments.training import factories, loop, program
from experiments.training.setup import prepare
from sa_plus_plus import convex

_DATA = flags.DEFINE_enum("data", "mnist", ["mnist", "fashion_mnist"], "Data set.")
_LOCAL = flags.DEFINE_string("local", "", "Directory with its four files; empty for TensorFlow Datasets.")
_FEATURES = flags.DEFINE_integer("features", 50, "Number of features to keep.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds of the networks, of the order of the data and of the random masks.")
_EPOCHS = flags.DEFINE_float("epochs", 20.0, "Length of each run, of selection and of training afterwards.")
_METHODS = flags.DEFINE_list("methods", ["all"], "Names of algorithms, mutual_information, group_lasso, all_features.")
_NAME = flags.DEFINE_string("name", "feature_selection", "Write benchmarks/results/<name>.json and .png.")

INFORMATION_ROWS, LASSO_ROWS = 5_000, 10_000
LAMBDAS = 40  # on the group LASSO's path, down to a hundredth of the one at which all is zero

Chosen = Sequence[int]


CYCLES = "sequential_attention_cycles"


def config_of(name: str) -> ml_collections.ConfigDict:
    config = feature_selection.get_config(_DATA.value)
    config.data.local = _LOCAL.value
    config.features, config.epochs = _FEATURES.value, _EPOCHS.value
    config.sparsifier.name = name.removesuffix("_cycles")
    if name != "sequential_attention":
        config.sparsifier.schedule = ()
    config.eval_every = config.log_every = 10**9  # the last step is measured all the same
    return config


def by_algorithm(name: str, dataset: data.Dataset) -> list[Chosen]:
    """The features that an algorithm keeps, one list per seed."""
    run = program.compiled(prepare(config_of(name), dataset=dataset), _SEEDS.value)
    outcomes = loop.train(run, range(_SEEDS.value))
    return [[row["index"] for row in report.chosen_features(o, dataset.features)] for o in outcomes]


def by_mutual_information(dataset: data.Dataset) -> list[Chosen]:
    """The features that are individually most informative about the label."""
    x, label = some_rows(dataset, INFORMATION_ROWS)
    return [best(mutual_info_classif(x, label, random_state=0))]


def by_group_lasso(dataset: data.Dataset) -> list[Chosen]:
    x, label = some_rows(dataset, LASSO_ROWS)
    problem = convex.problems.multinomial(jnp.asarray(x - x.mean(0)), jnp.asarray(label), dataset.classes)
    groups = convex.groups.of_blocks(problem.origin.shape, (dataset.classes, 1))
    start = problem.origin
    for lam in convex.group_lasso.lambda_grid(problem, groups, LAMBDAS):
        start = convex.group_lasso.solve(problem, groups, lam, start, tol=1e-3).coefficients
        norms = np.asarray(convex.groups.norms(groups, start))
        if np.count_nonzero(norms) >= _FEATURES.value:
            return [best(norms)]
    raise RuntimeError(f"no lambda of the path gives {_FEATURES.value} features")


def all_features(dataset: data.Dataset) -> list[Chosen]:
    return [range(len(dataset.features))]


ALGORITHMS = [*(name for name in factories.NAMES if name != "dense"), CYCLES]
METHODS: dict[str, Callable[[data.Dataset], list[Chosen]]] = {
    **{name: functools.partial(by_algorithm, name) for name in ALGORITHMS},
    "mutual_information": by_mutual_information,
    "group_lasso": by_group_lasso,
    "all_features": all_features,
}


def best(scores: np.ndarray) -> Chosen:
    return [int(i) for i in np.argsort(-scores, kind="stable")[: _FEATURES.value]]


def some_rows(dataset: data.Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features, as networks see them, and labels of this many random training rows."""
    rows = np.random.default_rng(0).permutation(len(dataset.train))[:count]
    batch = dataset.train.gather(rows)
    x = flat(batch)
    return x.astype(np.float32) / (255 if x.dtype == np.uint8 else 1), batch["label"]


def flat(batch: data.Batch) -> np.ndarray:
    """`(rows, features)`."""
    x = batch["row" if "row" in batch else "image"]
    return x.reshape(len(x), -1)


def restricted(dataset: data.Dataset, features: Chosen) -> data.Dataset:
    """The same examples with these features only, as rows of a table."""

    def part(source: data.Source) -> data.Arrays:
        arrays = in_memory(source).arrays
        rows = np.take(flat(arrays), list(features), axis=1)  # row by row in memory, as they are gathered
        return data.Arrays({"row": rows, "label": arrays["label"]})

    names = tuple(dataset.features[i] for i in features)
    return data.Dataset(part(dataset.train), part(dataset.test), dataset.classes, columns=names)


def retrained(dataset: data.Dataset, chosen: list[Chosen]) -> list[float]:
    """Test accuracy of new networks on only the chosen features, one per seed; a single choice serves all seeds."""
    seeds = list(range(_SEEDS.value))
    groups = [(features, [seed]) for features, seed in zip(chosen, seeds, strict=False)]
    outcomes: list[loop.Outcome] = []
    for features, group in groups if len(chosen) > 1 else [(chosen[0], seeds)]:
        setup = prepare(config_of("dense"), dataset=restricted(dataset, features))
        outcomes += loop.train(program.compiled(setup, len(group)), group)
    return [round(o.test["test_accuracy"], 4) for o in outcomes]


def measured() -> list[dict[str, Any]]:
    """The rows of earlier calls of the same length and seeds."""
    path = timing.RESULTS / f"{_NAME.value}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found["rows"] if found.get("settings") == settings() else []


def settings() -> dict[str, Any]:
    return {"features": _FEATURES.value, "seeds": _SEEDS.value, "epochs": _EPOCHS.value}


def cells(row: dict[str, Any]) -> dict[str, str]:
    accuracy = row["accuracy"]
    shown = f"{np.mean(accuracy):.4f} ± {np.std(accuracy, ddof=min(1, len(accuracy) - 1)):.4f}"
    return {"data": row["data"], "chosen by": row["method"], "test accuracy": shown, "s": f"{row['seconds']:.0f}"}


def plot(rows: list[dict[str, Any]]) -> Any:
    """Plot accuracy by method, one point per seed and one panel per data set."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    fig, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = sorted((row for row in rows if row["data"] == name), key=lambda row: np.mean(row["accuracy"]))
        for i, row in enumerate(mine):
            axis.plot(row["accuracy"], [i] * len(row["accuracy"]), "o", color="C0", alpha=0.5)
            axis.plot([np.mean(row["accuracy"])] * 2, [i - 0.3, i + 0.3], color="C0")
        axis.set_yticks(range(len(mine)), [row["method"].replace("_", " ") for row in mine], fontsize="small")
        axis.locator_params(axis="x", nbins=5)
        axis.set(xlabel="test accuracy of a fresh network", title=f"{name}, {_FEATURES.value} features")
    return fig


def measure(name: str, dataset: data.Dataset) -> dict[str, Any]:
    """One row of the table; `seconds` is the selection time per seed, compilation included."""
    started = time.perf_counter()
    chosen = METHODS[name](dataset)
    seconds = round((time.perf_counter() - started) / len(chosen), 1)
    row = {"data": _DATA.value, "method": name, "accuracy": retrained(dataset, chosen), "seconds": seconds}
    return row if name == "all_features" else row | {"features": [" ".join(map(str, one)) for one in chosen]}


def main(argv: list[str]) -> None:
    del argv
    cli.cache_compilations(timing.RESULTS.parent.parent / "runs")
    console, dataset, rows = progress.console(), tasks.dataset_of(config_of("dense").data), measured()
    for name in METHODS if _METHODS.value == ["all"] else _METHODS.value:
        if any((row["data"], row["method"]) == (_DATA.value, name) for row in rows):
            continue
        rows.append(measure(name, dataset))
        console.print(*cells(rows[-1]).values(), highlight=False)
        timing.save(_NAME.value, {"settings": settings(), "rows": rows})
    report.save_figure(timing.RESULTS / f"{_NAME.value}.png", plot(rows))
    console.print(progress.table("Feature selection", [cells(row) for row in rows]))


if __name__ == "__main__":
    app.run(main)
