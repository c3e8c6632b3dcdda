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
# # ResNet-50 on ImageNet, on a TPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sa-plus-plus/sa_plus_plus/blob/main/notebooks/03_imagenet_on_tpu.ipynb)
#
# One cell of the paper's Table 1: a ResNet-50 with 90% of its 8 × 8 blocks removed, trained for 90 epochs. Choose a TPU
# runtime, and set below where the data are and where checkpoints go. The short form trains a small network on a few
# generated images, to test the notebook.

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
DATA_DIR = "gs://your-bucket/tensorflow_datasets"  # where TensorFlow Datasets has prepared imagenet2012
# A small network on drawn images, until you name your bucket.
SHORT = os.environ.get("SAPP_SHORT") == "1" or "your-bucket" in DATA_DIR
WORKDIR = "/content/drive/MyDrive/sapp/resnet50_block8"  # survives a disconnected runtime
CHANGES = ["--config.sparsifier.sparsity=0.9", "--config.batch_size=1024"]

# %%
import json
import pathlib
import subprocess
import tempfile

import jax
import numpy as np
from IPython.display import Image, display

print(f"{jax.device_count()} × {jax.devices()[0].device_kind}; every batch is split over all of them")
if "google.colab" in sys.modules and not SHORT:
    from google.colab import auth, drive

    auth.authenticate_user()  # for the bucket
    drive.mount("/content/drive")

# %% [markdown]
# ## What will be pruned
#
# This prints the plan of the network and its schedule, and needs no data. Layers with fewer than 100 blocks stay dense, as in the
# paper.


# %%
def command(module, *arguments):
    """Run a command of the project, and show what it prints."""
    line = [sys.executable, "-m", module, *arguments]
    plain = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "CLICOLOR_FORCE")}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=plain)
    for text in process.stdout:
        print(text, end="")
    if process.wait():
        raise RuntimeError(f"exit status {process.returncode}")


if not SHORT:
    command("experiments.inspect", "--config=configs/resnet50_block8.py", CHANGES[0])

# %% [markdown]
# ## Data
#
# The data are ImageNet, prepared in a bucket by TensorFlow Datasets with
# `tfds.builder("imagenet2012", file_format="array_record")`; see the project's page on experiments. The short form
# generates some images of ten classes.

# %%
config, data = "configs/resnet50_block8.py", [f"--config.data.options.data_dir={DATA_DIR}"]
if SHORT:
    from PIL import Image as Picture

    folder, rng = pathlib.Path(tempfile.mkdtemp()), np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for label in range(10):
            name = f"class{label}"
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (48, 56, 3), np.uint8) + np.uint8(15 * label)
                Picture.fromarray(pixels).save(folder / part / name / f"{i}.JPEG")
    config, data = "configs/imagenette_block8.py", [f"--config.data.local={folder}", "--config.data.options.size=32"]
    WORKDIR = tempfile.mkdtemp()
    CHANGES = ["--config.model=ResNet20", "--config.steps=60", "--config.batch_size=8", "--config.eval_batch_size=8"]
    CHANGES += ["--config.eval_every=60", "--config.log_every=10", "--config.optimizer.warmup_steps=2"]
    CHANGES += ["--config.optimizer.learning_rate=0.02", "--config.sparsifier.min_blocks=20"]

# %% [markdown]
# ## Train and prune
#
# If the runtime is disconnected, run the same cell again: it resumes from the newest checkpoint and ends with the same
# network. TensorBoard files are in the work directory too.

# %%
command("experiments.main", f"--config={config}", *data, *CHANGES, f"--workdir={WORKDIR}")

# %%
result = json.loads(pathlib.Path(WORKDIR, "result.json").read_text())
print(f"{result['algorithm']}: top-1 {100 * result['metric']:.2f}%, {result['real_sparsity']:.2%} of all kernels zero")
print("Table 1 has 69.56% for SequentialAttention++ and 67.74% for ACDC, at 8 × 8 blocks and 90%; dense 76.90%")
display(Image(filename=f"{WORKDIR}/run.png"))

# %% [markdown]
# To run all cells, resumable and shared by any number of machines:
#
# ```bash
# python -m experiments.reproduce table1 --scale=paper --directory=... --plan
# ```
