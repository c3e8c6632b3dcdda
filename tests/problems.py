"""A small network of plain arrays, and a training run on it, for tests of whole runs."""

import functools
import re
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sa_plus_plus as sapp

STEPS = 60
NAMES = tuple(sapp.ALGORITHMS)
# Made of the parts of another (parametrisation, score, what a step does), they differ in when blocks are chosen.
SAME_PARTS = {"acdc": "magnitude", "gradual_magnitude": "magnitude", "sparse_evolutionary": "rigl"}
KINDS = tuple(name for name in NAMES if name not in SAME_PARTS)


@functools.partial(jax.jit, static_argnames="dtype")
def network(seed=0, dtype=jnp.float32):
    """A convolution and a ragged matrix with more than 100 blocks of 2 x 2, a small matrix, and biases."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"conv": (3, 3, 4, 16), "wide": (16, 39), "head": (39, 8)}
    kernels = {n: jax.random.normal(k, s) / 4 for (n, s), k in zip(shapes.items(), keys, strict=True)}
    tree = {name: {"kernel": k.astype(dtype), "bias": jnp.zeros(k.shape[-1], dtype)} for name, k in kernels.items()}
    return tree


@functools.cache
def batch(step, dtype=jnp.float32):
    """Inputs `(8, 36)` and targets `(8, 8)`, another batch each step."""
    x = np.random.default_rng(step).standard_normal((8, 36), np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(np.sin(3 * x[:, :8]), dtype)


def loss(params, data):
    x, target = data
    for name in ("conv", "wide", "head"):
        kernel = params[name]["kernel"].reshape(-1, params[name]["kernel"].shape[-1])
        x = jnp.tanh(jnp.matmul(x, kernel) + params[name]["bias"][None])
    return jnp.mean(jnp.square(x - target))


def sparsifier(name, steps=STEPS, **options):
    """An algorithm by name, with its own schedule."""
    phases = getattr(sapp.phases, name)(steps)
    if name != "dense":
        options = {
            "block": (2, 2),
            "sparsity": 0.8,
            **({"mask_every": 4} if name in ("rigl", "sparse_evolutionary") else {}),
            **options,
        }
    return getattr(sapp, name)(phases=phases, **options)


@functools.cache
def algorithm(name):
    """`(sp, jitted step that donates its run)`: the same objects each time, so that tests share one compilation."""
    sp = sparsifier(name)
    return sp, jax.jit(functools.partial(step, sp), donate_argnums=0)


def optimizer():
    rate = optax.cosine_decay_schedule(0.1, STEPS, alpha=0.2)
    momentum = sapp.reset_on(optax.trace(0.9))
    return optax.chain(optax.add_decayed_weights(1e-3), momentum, optax.scale_by_learning_rate(rate))


class Run(NamedTuple):
    """State of an explicit training run; a pytree."""

    trainable: sapp.Trainable
    prune: sapp.PruneState
    opt_state: optax.OptState


def start(sp, params):
    trainable, prune = sp.init(params)
    return Run(trainable, prune, optimizer().init(trainable))


def step(sp, run, data):
    """One explicit training step."""
    trainable, prune, opt_state = run
    grads = jax.grad(lambda t: loss(sp.apply(t, prune), data))(trainable)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix integers and floats
        updates, opt_state = optimizer().update(grads, opt_state, trainable, phase=prune.phase)
    trainable, prune = sp.update(trainable, prune, updates, grads)
    return Run(trainable, prune, opt_state)


def variables(model, *inputs, seed=0, **options):
    """Variables of a flax model drawn by NumPy, as after training: none has its initial value, nothing is compiled."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        name, x = sapp.path_string(path), rng.normal(size=leaf.shape)
        if name.endswith("kernel"):
            x *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            x = np.exp(0.2 * x) if name.endswith(("scale", "var")) else 0.2 * x
        return x.astype(leaf.dtype)

    shapes = jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(value, shapes)


def weights_of(path):
    """`{path of a parameter: it in full}` of a run's file of its pruned network."""
    leaves = jax.tree_util.tree_leaves_with_path(sapp.todense(sapp.load(path)["params"]))
    return {sapp.path_string(keys): np.asarray(leaf) for keys, leaf in leaves}


@functools.cache
def digits():
    """The data set of configs/mnist.py, which takes a second to read."""
    from configs import mnist  # noqa: PLC0415 -- tests of the library do without
    from experiments import tasks  # noqa: PLC0415

    return tasks.dataset_of(mnist.get_config().data)


def examples(count):
    """Settings of a hypothesis test: `count` examples where others have 30, and in proportion in a campaign."""
    return hypothesis.settings(max_examples=max(1, count * hypothesis.settings.default.max_examples // 30))


def without_addresses(value):
    """A test's name from its parameter; functions have addresses, by which processes would differ."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
