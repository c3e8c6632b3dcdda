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
# # Smaller and faster
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sa-plus-plus/sa_plus_plus/blob/main/notebooks/05_smaller_and_faster.ipynb)
#
# This notebook makes a trained network faster and a tenth of the size. The network is pruned without training, stored by
# its kept blocks, specialised in three precisions, compared with dense engines, and saved for serving without the model's
# code.

# %%
import os
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    source = "https://github.com/sa-plus-plus/sa_plus_plus"
    subprocess.run(["git", "clone", "--depth=1", source], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "-e", "sa_plus_plus[experiments,engines]"], check=True
    )
    os.chdir("sa_plus_plus")
elif not os.path.isdir("configs"):  # Jupyter starts beside the notebook
    os.chdir("..")
sys.path.insert(0, os.getcwd())  # the experiments run from a clone's root


# %% tags=["parameters"]
SHORT = os.environ.get("SAPP_SHORT") == "1"  # small and without engines, to test the notebook
WIDTH, HIDDEN, LAYERS, ROWS = (64, 256, 1, 32) if SHORT else (768, 3072, 4, 128)
SPARSITIES = (0.9,) if SHORT else (0.5, 0.8, 0.9, 0.95)
BLOCK, ROUNDS = (8 if SHORT else 16), (2 if SHORT else 7)

# %%
import tempfile

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np

import sa_plus_plus as sapp
from experiments.engines import runtimes
from sa_plus_plus.timing import alternate

print(f"{jax.device_count()} × {jax.devices()[0].device_kind}")


# %% [markdown]
# ## A network
#
# The feed-forward layers of a transformer, in flax. Random weights stand in for trained ones; the inputs lie near a
# subspace, as activations do.


# %%
class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(nn.LayerNorm()(x))))
        return x


keys = jax.random.split(jax.random.key(0), 4)
inputs = jax.random.normal(keys[0], (4 * ROWS, WIDTH // 8)) @ jax.random.normal(keys[1], (WIDTH // 8, WIDTH))
inputs += 0.1 * jax.random.normal(keys[2], inputs.shape)
model, x = FeedForward(), inputs[:ROWS]
variables = model.init(keys[3], x)

# %% [markdown]
# ## Prune it without training
#
# From a few hundred inputs, `one_shot` chooses the blocks whose removal changes each layer's outputs least, and adjusts
# the remaining weights.

# %%
calibration = [inputs[ROWS : 2 * ROWS], inputs[2 * ROWS : 3 * ROWS]]
pruned = {}
for sparsity in SPARSITIES:
    pruned[sparsity] = sapp.one_shot(
        model.apply, variables, calibration, block=BLOCK, sparsity=sparsity, method="wanda", refit=True
    )
chosen = pruned[SPARSITIES[-1]]
print(chosen)

# %% [markdown]
# ## Smaller
#
# The file holds only the kept blocks, with checksums; `storage` can round them.

# %%
folder, sizes = tempfile.mkdtemp(), {"dense": sum(leaf.nbytes for leaf in jax.tree.leaves(variables))}
exported = sapp.export(chosen.params, chosen.plan)
for storage in ("exact", "bfloat16", "int8"):
    saved = sapp.save(f"{folder}/{storage}.safetensors", exported, storage=storage)
    sizes[storage] = saved.bytes
back = sapp.todense(sapp.load(f"{folder}/exact.safetensors"))
jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, chosen.params))  # bit for bit
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.bar(sizes.keys(), [size / 1e6 for size in sizes.values()])
ax.set(ylabel="MB", title=f"{SPARSITIES[-1]:.0%} of the blocks removed, by storage")
plt.show()

# %% [markdown]
# ## Faster
#
# `specialize` makes a function for inputs of one shape. For int8 it needs typical inputs, to choose scales.

# %%
native = sapp.sparse.native.unavailable_reason() is None and jax.default_backend() == "cpu"
precisions = ("float32", "bfloat16", "int8") if native else ("float32",)


def specialised(params, precision):
    return sapp.specialize(lambda x: model.apply(params, x), x, precision=precision, calibration=calibration)


print(specialised(chosen.params, "float32"))

# %%
whole = jax.jit(model.apply)
calls = {"dense, JAX": lambda: jax.block_until_ready(whole(variables, x))}
if not SHORT and jax.default_backend() == "cpu":
    dense = runtimes.contenders(model, variables, np.asarray(x), engines=list(runtimes.ENGINES), precisions=precisions)
    calls |= dense.calls
    print(dense.missing)
for precision in precisions:
    for sparsity, network in pruned.items():
        fast = specialised(network.params, precision)
        calls[f"{sparsity:.0%}, {precision}"] = lambda fast=fast: jax.block_until_ready(fast(x))
seconds = alternate(calls, ROUNDS, at_least=0.02 if SHORT else 0.2)  # all take turns
milliseconds = {name: 1e3 * np.median(taken) for name, taken in seconds.items()}
fig, ax = plt.subplots(figsize=(8, 0.4 * len(calls) + 1), layout="constrained")
ax.barh(list(milliseconds), list(milliseconds.values()))
ax.invert_yaxis()
ax.set(xlabel=f"milliseconds for {ROWS} rows")
plt.show()

# %% [markdown]
# ## Serve it
#
# Save the network to one file, which another process can load without the model's code.

# %%
fast = specialised(chosen.params, "float32")
print(f"{fast.save(f'{folder}/network') / 1e6:.1f} MB")
loaded = sapp.serve.load(f"{folder}/network")
np.testing.assert_allclose(loaded(x), fast(x), rtol=1e-5, atol=1e-5)
