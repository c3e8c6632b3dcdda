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
# # Transformers: prune a small GPT
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sa-plus-plus/sa_plus_plus/blob/main/notebooks/06_transformers.ipynb)
#
# A GPT on bytes is trained, then pruned twice: from its trained weights in a tenth of the steps, and without training. You
# will see bits per byte before and after, and which blocks of attention and feed-forward layers stay.

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
SHORT = os.environ.get("SAPP_SHORT") == "1"  # a tiny network and a few steps, to test the notebook
STEPS, WIDTH, LAYERS = (20, 32, 1) if SHORT else (1500, 256, 4)
PRUNING_STEPS = 20 if SHORT else 150
SPARSITY, BLOCK = (0.5, 8) if SHORT else (0.8, 16)

# %%
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import flags

import sa_plus_plus as sapp
from configs import bytes_gpt
from experiments.outputs import report
from experiments.training import loop, program, trained
from experiments.training.setup import prepare

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # which the threads that read data ask for
print(f"{jax.device_count()} × {jax.devices()[0].device_kind}; every batch is split over all of them")
folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## A GPT on bytes
#
# The text is the source code of Python's standard library, with some files held out; the metric is bits per byte. For
# other text, set `config.data.local` to a text file or folder.

# %%
config = bytes_gpt.get_config()
config.model_options.update({"width": WIDTH, "hidden": 4 * WIDTH, "layers": LAYERS})
config.steps = config.eval_every = STEPS
config.optimizer.warmup_steps = STEPS // 10
config.log_every = max(1, STEPS // 50)
config.sparsifier.update({"block": (BLOCK, BLOCK), "sparsity": SPARSITY, "min_blocks": 4})
if SHORT:
    config.batch_size, config.eval_batch_size, config.data.options.held_out = 8, 64, 0.004


def run(config):
    (outcome,) = loop.train(program.compiled(prepare(config)), [0])
    print(f"{config.sparsifier.name}: {outcome.test['test_bits_per_byte']:.3f} bits per byte, {outcome.steps} steps")
    return outcome


config.sparsifier.name = "dense"
dense = run(config)
report.save_weights(folder / "dense.safetensors", dense)

# %% [markdown]
# ## Pruned from trained weights
#
# SequentialAttention++ in a tenth of the steps, with the schedule for networks that are already trained.

# %%
tuned = config.copy_and_resolve_references()
tuned.init_from, tuned.steps, tuned.eval_every = str(folder / "dense.safetensors"), PRUNING_STEPS, PRUNING_STEPS
tuned.optimizer.warmup_steps = 1
tuned.sparsifier.update({"name": "sequential_attention", "recipe": "finetune"})
pruned = run(tuned)

# %% [markdown]
# ## Without training
#
# Optimal Brain Surgeon on a few training windows.

# %%
config.sparsifier.name = "magnitude"
network = trained.read(config, str(folder / "dense.safetensors"), "the dense network")
calibration = [(batch,) for batch in network.calibration(16 if SHORT else 256)]
options = {"block": BLOCK, "sparsity": SPARSITY, "min_blocks": 4}
shot = sapp.one_shot(network.outputs, network.params, calibration, method="obs", **options)
bits = network.tester()(shot.params)["bits_per_byte"]
print(f"one shot: {bits:.3f} bits per byte")

# %%
fig, ax = plt.subplots(figsize=(8, 3), layout="constrained")
for name, outcome in (("dense", dense), ("SequentialAttention++", pruned)):
    ax.plot([r["step"] for r in outcome.rows], [r["train_bits_per_byte"] for r in outcome.rows], label=name)
ax.axhline(bits, color="black", ls=":", label="one shot, held-out text")
ax.set(xlabel="step", ylabel="bits per byte in training")
ax.legend()
plt.show()

# %% [markdown]
# ## Which blocks stay
#
# The kernels of the first layer. Attention kernels are read as matrices of inputs by heads × head size; an empty column of
# blocks is a part of a head that is never computed.

# %%
leaves = {sapp.path_string(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(pruned.params)}
layers = list(pruned.plan.pruned.values())[:6]
fig, axes = plt.subplots(1, len(layers), figsize=(3 * len(layers), 3.4), layout="constrained", squeeze=False)
for ax, layer in zip(axes[0], layers, strict=True):
    grid = np.asarray(sapp.blocks.sum_of_squares(leaves[layer.path], layer.block, layer.view)) > 0
    ax.imshow(grid.reshape(-1, grid.shape[-1]), cmap="gray", interpolation="nearest")
    ax.set_title("/".join(layer.path.split("/")[-3:-1]), fontsize="small")
plt.show()
