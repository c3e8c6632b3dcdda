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
# # Theory: pruning as group regularisation
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sa-plus-plus/sa_plus_plus/blob/main/notebooks/07_theory.ipynb)
#
# The convex problems behind the method: the path of the group LASSO, the group that objective (1) chooses first, and
# orthogonal matching pursuit with and without replacement. This takes half a minute.

# %%
import sys

if "google.colab" in sys.modules:  # elsewhere the package is installed already
    import subprocess

    package = "sa_plus_plus @ git+https://github.com/sa-plus-plus/sa_plus_plus"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, "matplotlib"], check=True)


# %% tags=["parameters"]
import os

SHORT = os.environ.get("SAPP_SHORT") == "1"  # smaller, to test the notebook
ROWS, GROUPS, SIZE, PLANTED = (80, 12, 3, 3) if SHORT else (200, 40, 5, 6)
LAMBDAS = 12 if SHORT else 40

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sa_plus_plus import convex

jax.config.update("jax_enable_x64", True)
print(f"{jax.device_count()} × {jax.devices()[0].device_kind}")

# %% [markdown]
# ## A problem with planted groups
#
# Labels depend on a few groups of features, which are correlated with others.

# %%
rng = np.random.default_rng(0)
features = rng.normal(size=(ROWS, GROUPS * SIZE)) @ (
    np.eye(GROUPS * SIZE) + 0.6 * rng.normal(size=(GROUPS * SIZE,) * 2) / (GROUPS * SIZE) ** 0.5
)
truth = np.zeros((GROUPS, SIZE))
planted = rng.choice(GROUPS, PLANTED, replace=False)
truth[planted] = rng.normal(size=(PLANTED, SIZE)) * np.linspace(2, 0.5, PLANTED)[:, None]
labels = features @ truth.ravel() + 0.5 * rng.normal(size=ROWS)
problem = convex.problems.least_squares(jnp.asarray(features), jnp.asarray(labels))
groups = convex.groups.equal(GROUPS * SIZE, size=SIZE)

# %% [markdown]
# ## The group LASSO's path
#
# The path runs downwards from the critical `λ = τ`, where the first group enters. Planted groups are coloured.

# %%
critical = float(convex.group_lasso.critical_lambda(problem, groups))
lambdas = critical * np.geomspace(1, 0.02, LAMBDAS)
solve = jax.jit(lambda lam: convex.group_lasso.solve(problem, groups, lam).coefficients)
norms = np.array([convex.groups.norms(groups, solve(lam)) for lam in lambdas])
fig, ax = plt.subplots(figsize=(9, 4), layout="constrained")
for group in range(GROUPS):
    ours = group in planted
    ax.plot(lambdas / critical, norms[:, group], lw=1.5 if ours else 0.7, color=None if ours else "lightgray")
ax.set(xscale="log", xlabel="λ / τ", ylabel="norm of the group")
ax.invert_xaxis()
plt.show()
first = int(np.argmax(norms[1]))
gradient = convex.groups.norms(groups, convex.problems.gradient_at_zero(problem))
print(f"first group to enter: {first}; group of the largest gradient at 0: {int(np.argmax(gradient))}")

# %% [markdown]
# ## Greedy selection
#
# Orthogonal matching pursuit adds the group with the largest gradient and solves again. OMPR, which replaces groups, starts
# from any support.

# %%
steps = convex.greedy.omp(problem, groups, k=PLANTED)
wrong = convex.greedy.as_support(groups, [g for g in range(GROUPS) if g not in planted][:PLANTED])
replaced = convex.greedy.ompr(problem, groups, support=wrong, rounds=2 * PLANTED)


def members(support):
    return sorted(np.flatnonzero(np.asarray(support)).tolist())


print(f"planted {sorted(planted.tolist())}\nOMP     {members(steps.support)}\nOMPR    {members(replaced.support)}")
fig, ax = plt.subplots(figsize=(9, 2.2), layout="constrained")
found = np.stack([np.isin(np.arange(GROUPS), planted), np.asarray(steps.support), np.asarray(replaced.support)])
ax.imshow(found, cmap="gray_r", aspect="auto", interpolation="nearest")
ax.set(yticks=range(3), yticklabels=["planted", "OMP", "OMPR from a wrong start"], xlabel="group")
plt.show()
