# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Click prediction on Criteo
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sa-plus-plus/sa_plus_plus/blob/main/notebooks/04_criteo.ipynb)
#
# One cell of the paper's Table 2: a network on 39 embeddings whose first layer is pruned. The log of the display advertising
# challenge has to be downloaded by hand; without it the notebook generates rows in the same format, to show every step.

# %%
import os
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    source = "https://github.com/sa-plus-plus/sa_plus_plus"
    subprocess.run(["git", "clone", "--depth=1", source], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "sa_plus_plus[experiments]"], check=True)
    os.chdir("sa_plus_plus")
elif not os.path.isdir("configs"):  # Jupyter starts beside the notebook
    os.chdir("..")
sys.path.insert(0, os.getcwd())  # the experiments run from a clone's root


# %% tags=["parameters"]
SHORT = os.environ.get("SAPP_SHORT") == "1"  # few steps on made-up rows, to test the notebook
LOG = ""  # path of Kaggle's train.txt (or .gz, .zst); empty: made-up rows
BLOCK, SPARSITY, SEEDS = 10, 0.9, 1 if SHORT else 3
ROWS = 2500 if SHORT else 60_000  # made up, where there is no log

# %%
import json
import pathlib
import subprocess
import tempfile

import jax
import numpy as np
from IPython.display import Image, display

print(f"{jax.device_count()} × {jax.devices()[0].device_kind}; every batch is split over all of them")
folder = pathlib.Path(tempfile.mkdtemp())


def command(module, *arguments):
    """Run a command of the project, and show what it prints."""
    line = [sys.executable, "-m", module, *map(str, arguments)]
    plain = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=plain)
    for text in process.stdout:
        print(text, end="")
    if process.wait():
        raise RuntimeError(f"exit status {process.returncode}")


# %% [markdown]
# ## The log
#
# A row is a label, 13 numbers and 26 categories, separated by tabs; any of them may be missing. In the generated rows the
# click depends on two of the categories and one number.

# %%
log = pathlib.Path(LOG) if LOG else folder / "made_up.txt"
if not LOG:
    rng = np.random.default_rng(0)
    numbers, categories = rng.integers(0, 50, (ROWS, 13)), rng.integers(0, 30, (ROWS, 26))
    logit = 1.5 * (categories[:, 0] % 3 - 1) + (categories[:, 5] % 2) + 0.02 * numbers[:, 2] - 1.5
    labels = rng.random(ROWS) < 1 / (1 + np.exp(-logit))
    with log.open("w") as file:
        for label, row, words in zip(labels, numbers, categories, strict=True):
            cells = [str(int(label)), *map(str, row), *(f"{word * 2654435761 % 2**32:08x}" for word in words)]
            file.write("\t".join(cells) + "\n")

# %% [markdown]
# ## Prepare it once
#
# Columns are memory-mapped, numbers are bucketised, rare categories share one id, and malformed lines are counted.

# %%
prepared = folder / "criteo"
few = ["--minimum_count", 2, "--numeric_minimum_count", 2] if not LOG else []
command("experiments.data.criteo", "prepare", "--input", log, "--output", prepared, *few)

# %% [markdown]
# ## Train and compare
#
# The paper's four algorithms and the controls, each on its own schedule, over seeds.

# %%
config = f"configs/criteo_block{BLOCK}.py" if LOG else "configs/criteo_sample.py"
changes = [f"--config.sparsifier.sparsity={SPARSITY}", f"--config.sparsifier.block=({BLOCK},{BLOCK})"]
algorithms = "all"
if SHORT:
    changes += ["--config.steps=80", "--config.eval_every=40", "--config.log_every=10", "--config.dense_twin=False"]
    algorithms = "dense,sequential_attention"
workdir = folder / "compare"
flags = [f"--config={config}", f"--config.data.local={prepared}", *changes]
command("experiments.compare", *flags, f"--algorithms={algorithms}", f"--seeds={SEEDS}", f"--workdir={workdir}")

# %%
for name, row in json.loads((workdir / "compare.json").read_text())["algorithms"].items():
    print(f"{name:22} loss {np.mean(row['loss']):.4f}  AUC {np.mean(row['metric']):.4f}")
print(
    "Table 2, 10 × 10 blocks, 90%: magnitude 0.4693, PowerPropagation 0.4572, ACDC 0.4580, SequentialAttention++ 0.4535"
)
display(Image(filename=workdir / "compare.png"))
