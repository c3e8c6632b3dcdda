"""A group LASSO path of 100 lambdas, 10,000 x 2,000 in groups of 10, against celer; float64.

    pip install celer && python -m benchmarks.group_lasso_path

Both solve the same problem at the same lambdas to the same relative duality gap, alternating. Objectives and gaps are
computed afterwards in the same way for both, in NumPy from the coefficients alone. Memory is the increase of the peak
of a process that holds the data, due to one path. celer is not a dependency of this project.
"""

import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import timing
from experiments.outputs import progress
from sa_plus_plus import convex

_ROUNDS = flags.DEFINE_integer("rounds", 3, "Alternating rounds for each setting.", lower_bound=1)
_SETTINGS = flags.DEFINE_list("settings", ["0.05:1e-6"], "ratio of last to first lambda:relative gap, several.")
_MEMORY = flags.DEFINE_enum("memory_of", "", ["", "ours", "celer"], "Internal: measure one contender.")

SAMPLES, FEATURES, SIZE, PLANTED, LAMBDAS = 10_000, 2_000, 10, 20, 100


def main(argv: list[str]) -> None:
    del argv
    jax.config.update("jax_enable_x64", True)
    settings = [tuple(float(v) for v in text.split(":")) for text in _SETTINGS.value]
    if _MEMORY.value:
        print(json.dumps({"mb": memory(_MEMORY.value, *settings[0])}))
        return
    celer_path = contender()
    design, y = data()
    x, target = jnp.asarray(design), jnp.asarray(y)
    fortran = np.asfortranarray(design)  # as celer wants it, made before the clock starts
    groups = convex.groups.equal(FEATURES, SIZE)
    rows = []
    for ratio, tol in settings:
        lams = critical(design, y) * np.geomspace(1, ratio, LAMBDAS)
        found: dict[str, np.ndarray] = {}

        def ours(lams: np.ndarray = lams, tol: float = tol, found: dict = found) -> None:
            path = convex.least_squares_path.solve(x, target, groups, lams, tol=tol)
            found["ours"] = path.coefficients

        def celer(lams: np.ndarray = lams, tol: float = tol, found: dict = found) -> None:
            found["celer"] = celer_path(fortran, y, lams, tol).T

        first = {"ours": seconds(ours), "celer": seconds(celer)}
        times = timing.alternate({"ours": ours, "celer": celer}, _ROUNDS.value, at_least=0, warmup=0)
        reached = {name: certificates(design, y, lams, c) for name, c in found.items()}
        rows.append(
            {
                "last_to_first_lambda": ratio,
                "asked_gap": tol,
                "non_zero_groups_at_the_end": int((found["ours"][-1].reshape(-1, SIZE) != 0).any(1).sum()),
                **{f"{name}_seconds": timing.spread(t) for name, t in times.items()},
                "ours_over_celer": timing.spread(times["ours"] / times["celer"]),
                "first_call_seconds": {name: round(t, 2) for name, t in first.items()},  # with compiling
                **{f"{name}_largest_relative_gap": float(gap.max()) for name, (_, gap) in reached.items()},
                "largest_relative_difference_of_objectives": float(
                    np.max(np.abs(reached["ours"][0] - reached["celer"][0]) / reached["celer"][0])
                ),
            }
        )
        progress.console().print(rows[-1])
    usage = {name: round(memory_in_a_process(name), 1) for name in ("ours", "celer")}
    problem = {"samples": SAMPLES, "features": FEATURES, "group": SIZE, "lambdas": LAMBDAS, "dtype": "float64"}
    content = {
        "problem": problem,
        "rounds": _ROUNDS.value,
        "rows": rows,
        "design_mb": round(SAMPLES * FEATURES * 8 / 2**20, 1),
        "added_peak_mb": usage,
        "celer": version(),
    }
    print(timing.save("group_lasso_path", content))


def data() -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring features correlate by 0.5; 20 of 200 groups are planted; noise has half the signal's deviation."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, FEATURES))
    for j in range(1, FEATURES):
        x[:, j] = 0.5 * x[:, j - 1] + np.sqrt(0.75) * x[:, j]
    beta = np.zeros((FEATURES // SIZE, SIZE))
    beta[rng.choice(len(beta), PLANTED, replace=False)] = rng.standard_normal((PLANTED, SIZE))
    signal = x @ beta.ravel()
    return x, signal + rng.standard_normal(SAMPLES) * signal.std() / 2


def critical(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.linalg.norm((y @ x).reshape(-1, SIZE), axis=1).max() / len(y))


def contender() -> Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]:
    """celer's path; coefficients `(features, lambdas)`. Its objective and tolerance are scaled as ours are."""
    try:
        from celer import celer_path  # noqa: PLC0415
    except ImportError:
        sys.exit("Cannot run: celer, which this compares with, is not installed: pip install celer")

    def solve(x: np.ndarray, y: np.ndarray, lams: np.ndarray, tol: float) -> np.ndarray:
        return celer_path(x, y, "grouplasso", alphas=lams, groups=SIZE, tol=tol, max_iter=200, max_epochs=50_000)[1]

    return solve


def version() -> str:
    import celer  # noqa: PLC0415

    return celer.__version__


def certificates(x: np.ndarray, y: np.ndarray, lams: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Objectives, and duality gaps relative to `||y||^2 / (2 n)`, of coefficients `(lambdas, features)`."""
    n = len(y)
    residual = y[:, None] - x @ beta.T
    slope = np.linalg.norm((residual.T @ x / n).reshape(len(lams), -1, SIZE), axis=2).max(1)
    values = (residual**2).sum(0) / (2 * n) + lams * np.linalg.norm(beta.reshape(len(lams), -1, SIZE), axis=2).sum(1)
    scale = np.minimum(1, lams / slope)
    dual = scale * (y @ residual) / n - scale**2 * (residual**2).sum(0) / (2 * n)
    return values, (values - dual) / (y @ y / (2 * n))


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def memory(name: str, ratio: float, tol: float) -> float:
    """Increase in MB of this process's peak by solving one path; it holds the data in one layout."""
    design, y = data()
    lams = critical(design, y) * np.geomspace(1, ratio, LAMBDAS)
    if name == "celer":
        solve, design = contender(), np.asfortranarray(design)
        before = reset_peak()
        solve(design, y, lams, tol)
        return peak() - before
    x, target = jnp.asarray(design), jnp.asarray(y)
    groups = convex.groups.equal(FEATURES, SIZE)
    jax.block_until_ready((x, target))
    before = reset_peak()
    convex.least_squares_path.solve(x, target, groups, lams, tol=tol)
    return peak() - before


def reset_peak() -> float:
    """Forget this process's peak so far; its memory now, in MB."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    status = pathlib.Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kilobytes) / 1024


def memory_in_a_process(name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.group_lasso_path", f"--memory_of={name}"]
    command.append(f"--settings={_SETTINGS.value[0]}")
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])["mb"]


if __name__ == "__main__":
    app.run(main)
