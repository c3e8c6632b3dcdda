"""What restarts with a phase, in every optimizer of optax: it goes on as a fresh one with its schedules further on."""

import importlib.metadata
import inspect
import types
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from packaging.version import Version

import sa_plus_plus as sapp
from sa_plus_plus import resets

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lookahead"),
]


@pytest.fixture(autouse=True)
def without_compilation():
    """Hundreds of small programs would each run a few times."""
    with jax.disable_jit():
        yield


BEFORE, AFTER = 3, 2  # steps of the two phases
PARAMS = {"b": jnp.asarray([[-0.5, 1, 2]]), "w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)}
OLD_OPTAX = Version(importlib.metadata.version("optax")) < Version("0.2.8")


def rate(shift):
    return lambda count: 0.1 * 0.7 ** (count + shift)


def adam(shift):
    return optax.adam(rate(shift))


def everywhere(value):
    return lambda tree: jax.tree.map(lambda _: value, tree)


# How to make those that need more than a learning rate; `s` is how far schedules are on.
MAKE = {
    "adaptive_grad_clip": lambda f, s: f(0.1),
    "add_decayed_weights": lambda f, s: f(rate(s)),
    "add_noise": lambda f, s: f(0.01, 0.55, key=0),
    "ademamix": lambda f, s: f(rate(s), b3=0.9, alpha=lambda count: 0.3 * (count + s)),
    "apply_every": lambda f, s: f(2),
    "apply_if_finite": lambda f, s: f(adam(s), 3),
    "chain": lambda f, s: f(optax.clip(1.0), adam(s)),
    "clip": lambda f, s: f(1.0),
    "clip_by_block_rms": lambda f, s: f(0.5),
    "clip_by_global_norm": lambda f, s: f(0.5),
    "conditionally_mask": lambda f, s: f(optax.scale_by_adam(), lambda step: (step + s) % 3 != 1),
    "conditionally_transform": lambda f, s: f(optax.scale_by_adam(), lambda step: (step + s) % 3 != 1),
    "differentially_private_aggregate": lambda f, s: f(1.0, 0.1, key=0),
    "dpsgd": lambda f, s: f(rate(s), 1.0, 0.1, 0),
    "ema": lambda f, s: f(0.9),
    "flatten": lambda f, s: f(adam(s)),
    "freeze": lambda f, s: f(everywhere(False)),
    "hutchinson_estimator_diag_hessian": lambda f, s: f(),
    "inject_hyperparams": lambda f, s: f(optax.adam)(learning_rate=rate(s)),
    "inject_stateful_hyperparams": lambda f, s: f(optax.adam)(learning_rate=rate(s)),
    "lookahead": lambda f, s: f(adam(s), 2, 0.5),
    "masked": lambda f, s: f(adam(s), everywhere(True)),
    "measure_with_ema": lambda f, s: f(lambda updates: updates, 0.9),
    "mechanize": lambda f, s: f(adam(s)),
    "monitor": lambda f, s: f({"mean": optax.measure_with_ema(optax.global_norm, 0.9)}),
    "multi_transform": lambda f, s: f({"all": adam(s)}, everywhere("all")),
    "named_chain": lambda f, s: f(("adam", adam(s)), ("none", optax.identity())),
    "noisy_sgd": lambda f, s: f(0.1, eta=0.01, key=0),
    "optimistic_adam": lambda f, s: f(0.1),
    "partition": lambda f, s: f({"all": adam(s)}, everywhere("all")),
    "reduce_on_plateau": lambda f, s: f(patience=1, cooldown=1),
    "rmsprop": lambda f, s: f(rate(s), momentum=0.9),
    "rprop": lambda f, s: f(0.1),
    "sam": lambda f, s: f(adam(s), optax.sgd(0.1)),
    "scale": lambda f, s: f(-0.1),
    "scale_by_ademamix": lambda f, s: f(b3=0.9, alpha=lambda count: 0.3 * (count + s)),
    "scale_by_backtracking_linesearch": lambda f, s: f(5),
    "scale_by_lbfgs": lambda f, s: f(memory_size=2),
    "scale_by_muon": lambda f, s: f(weight_dimension_numbers=everywhere(optax.contrib.MuonDimensionNumbers())),
    "scale_by_rprop": lambda f, s: f(0.1),
    "scale_by_schedule": lambda f, s: f(rate(s)),
    "scale_by_zoom_linesearch": lambda f, s: f(5),
    "schedule_free": lambda f, s: f(adam(s), lambda count: 0.1 * (1 + count + s)),
    "selective_transform": lambda f, s: f(adam(s), freeze_mask=everywhere(False)),
    "sgd": lambda f, s: f(rate(s), momentum=0.9, nesterov=True),
    "sm3": lambda f, s: f(0.1),
    "snapshot": lambda f, s: f("norm", optax.global_norm),
    "split_real_and_imaginary": lambda f, s: f(adam(s)),
    "stateless": lambda f, s: f(lambda updates, _: updates),
    "stateless_with_tree_map": lambda f, s: f(lambda update, _: update),
    "trace": lambda f, s: f(0.9),
    "with_extra_args_support": lambda f, s: f(adam(s)),
}
NOT_OPTIMIZERS = {  # which say nothing of what they return either
    "bias_correction",
    "matrix_inverse_pth_root",
    "schedule_free_eval_params",
    "sigmoid_binary_cross_entropy",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
}
UNSUPPORTED = {
    "differentially_private_aggregate": "DifferentiallyPrivateAggregateState: it needs a gradient for each example",
    "dpsgd": "DifferentiallyPrivateAggregateState: it needs a gradient for each example",
    "hutchinson_estimator_diag_hessian": "HutchinsonState: it evaluates the loss",
    "lbfgs": "ScaleByZoomLinesearchState: it evaluates the loss",
    "lookahead": "LookaheadState: it has two sets of weights",
    "sam": "SAMState: it evaluates the loss",
    "scale_by_backtracking_linesearch": "ScaleByBacktrackingLinesearchState: it evaluates the loss",
    "scale_by_zoom_linesearch": "ScaleByZoomLinesearchState: it evaluates the loss",
    "sophia": "SophiaState: it evaluates the loss",
}
ONE_COUNTER = {
    "dadapt_adamw": "DAdaptAdamWState",
    "madgrad": "MadgradState",
    "momo": "MomoState",
    "momo_adam": "MomoAdamState",
    "prodigy": "ProdigyState",
    "scale_by_madgrad": "MadgradState",
    "scale_by_simplified_ademamix": "ScaleBySimplifiedAdEMAMixState",
    "simplified_ademamix": "ScaleBySimplifiedAdEMAMixState",
}
SCHEDULE_INSIDE = set(ONE_COUNTER.values()) - {"ScaleBySimplifiedAdEMAMixState"}  # of the learning rate
GO_ON = {"add_noise", "apply_every", "monitor", "noisy_sgd", "reduce_on_plateau", "snapshot"}


def factories():
    """All functions of optax and its contrib that return a transformation, or do not say what they return."""
    found = {}
    for module in (optax, optax.contrib):
        for name, function in vars(module).items():
            if name.startswith("_") or not isinstance(function, types.FunctionType) or name in NOT_OPTIMIZERS:
                continue
            result = inspect.signature(function).return_annotation
            if result is inspect.Signature.empty or "GradientTransformation" in str(result):
                found[name] = function
    return found


FACTORIES = factories()


def make(name, shift):
    factory = FACTORIES[name]
    if name in MAKE:
        tx = MAKE[name](factory, shift)
    else:
        takes_rate = "learning_rate" in inspect.signature(factory).parameters
        tx = factory(**({"learning_rate": rate(shift)} if takes_rate else {}))
    return optax.with_extra_args_support(tx)


def steps(tx, params, state, start, stop, **extra):
    """The updates of steps `start` to `stop`, and what they lead to."""
    taken = []
    for i in range(start, stop):
        noise = np.random.default_rng(i).normal(size=15).astype(np.float32)
        grads = {"b": 0.5 * params["b"] + noise[:3].reshape(1, 3), "w": 0.5 * params["w"] + noise[3:].reshape(4, 3)}
        updates, state = tx.update(grads, state, params, value=jnp.float32(2), **extra)
        params = optax.apply_updates(params, updates)
        taken.append(updates)
    return taken, params, state


def close(one, other):
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((one, other))]
    pairs = zip(leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :], strict=True)
    return all(np.allclose(x, y, rtol=1e-3, atol=1e-3 * np.abs(y).max()) for x, y in pairs)


@pytest.mark.skipif(OLD_OPTAX, reason="some are not in it")
def test_every_optimizer_of_optax_is_found():
    assert {"adamw", "sgd", "lbfgs", "muon", "dog", "scale_by_factored_rms"} <= set(FACTORIES)
    assert len(FACTORIES) > 110
    assert not (set(MAKE) | set(UNSUPPORTED) | set(ONE_COUNTER) | GO_ON) - set(FACTORIES), "of an older optax"


@pytest.mark.parametrize("name", sorted(set(FACTORIES) - set(UNSUPPORTED)))
def test_moments_restart_and_schedules_go_on(name):
    if OLD_OPTAX and name in {"add_decayed_weights", "fromage", "scale_by_distance_over_gradients"}:
        pytest.skip("in optax before 0.2.8 its schedule of weight decay stands still, or its first step is NaN")
    tx = sapp.reset_on(make(name, 0))
    _, params, state = steps(tx, PARAMS, tx.init(PARAMS), 0, BEFORE, phase=0)
    reset, *_ = steps(tx, params, state, BEFORE, BEFORE + AFTER, phase=1)
    gone_on, *_ = steps(tx, params, state, BEFORE, BEFORE + AFTER, phase=0)
    new = make(name, 0 if ONE_COUNTER.get(name) in SCHEDULE_INSIDE else BEFORE)
    fresh, *_ = steps(new, params, new.init(params), BEFORE, BEFORE + AFTER)
    assert close(reset, gone_on if name in GO_ON else fresh)
    has_moments = any(
        jnp.ndim(leaf) > 0 and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(state)
    )
    assert name in {"snapshot", "monitor"} or close(fresh, gone_on) == (not has_moments and name not in GO_ON)


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_sparsify_takes_every_optimizer_or_names_what_it_cannot(name):
    tx = make(name, 0)
    wrapped = sapp.sparsify(tx, block=1, sparsity=0.5, steps=10, min_blocks=1)
    if message := UNSUPPORTED.get(name):
        with pytest.raises(ValueError, match=f"sparsify cannot wrap the optimizer with {message}"):
            wrapped.init(PARAMS)
        return
    if message := ONE_COUNTER.get(name):
        with pytest.raises(ValueError, match=rf"^{message} counts the steps of .* write sapp.reset_on\(\.\.\.\)"):
            wrapped.init(PARAMS)
        options = {"block": 1, "sparsity": 0.5, "steps": 10, "min_blocks": 1}
        sapp.sparsify(sapp.reset_on(tx), **options).init(PARAMS)
        sapp.sparsify(tx, reset=False, **options).init(PARAMS)
        return
    state = wrapped.init(PARAMS).inner
    later = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), state)
    sure, unsure = (resets.restart(True, later, state, *optimizer) for optimizer in ((tx,), ()))
    chex.assert_trees_all_equal(sure, unsure)


def test_gradients_that_are_being_summed_are_not_lost():
    """A phase begins between the two halves of a step: moments restart, and the first half counts."""
    tx = sapp.reset_on(optax.MultiSteps(adam(0), 2))
    _, params, state = steps(tx, PARAMS, tx.init(PARAMS), 0, 3, phase=0)
    assert (state.inner.mini_step, state.inner.gradient_step) == (1, 1)
    (reset,), *_, state = steps(tx, params, state, 3, 4, phase=1)
    new = optax.MultiSteps(adam(1), 2).gradient_transformation()
    (_, fresh), *_ = steps(new, params, new.init(params), 2, 4)
    chex.assert_trees_all_close(reset, fresh, rtol=1e-5)
    assert (state.inner.mini_step, state.inner.gradient_step) == (0, 2)
    assert state.inner.inner_opt_state[0].count == 1


def test_hyperparameters_and_their_schedules_go_on():
    tx = sapp.reset_on(optax.inject_hyperparams(optax.adam)(rate(0), b1=0.9))
    _, params, state = steps(tx, PARAMS, tx.init(PARAMS), 0, 3, phase=0)
    state.inner.hyperparams["b1"] = jnp.asarray(0.5)
    _, _, state = steps(tx, params, state, 3, 4, phase=1)
    assert state.inner.hyperparams["b1"] == 0.5
    assert state.inner.hyperparams["learning_rate"] == pytest.approx(0.1 * 0.7**3)
    assert state.inner.count == 4


class Mine(NamedTuple):
    count: jax.Array
    mu: dict


class Counter(NamedTuple):
    count: jax.Array


def of_state(init):
    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


@pytest.mark.parametrize(
    ("init", "restarts"),
    [
        (lambda params: jax.tree.map(jnp.zeros_like, params), [True, True]),
        (lambda params: Counter(jnp.zeros((), jnp.int32)), [False]),
        (lambda params: {"count": jnp.zeros((), jnp.int32), "key": jax.random.key(0)}, [False, False]),
        (lambda params: Mine(jnp.zeros((), jnp.int32), params), None),
        (lambda params: (jnp.zeros((), jnp.int32), params), None),
        (lambda params: Counter(jnp.zeros(())), None),
        (lambda params: Counter(jnp.zeros(optax.tree.size(params))), None),
    ],
)
def test_states_of_others_restart_where_they_are_like_the_parameters(init, restarts):
    tx = optax.chain(of_state(init), adam(0))
    wrapped = sapp.sparsify(tx, block=1, sparsity=0.5, steps=10, min_blocks=1)
    if restarts is None:
        with pytest.raises(ValueError, match=r"of type (Mine \(count, mu\)|tuple|Counter \(count\)) should restart"):
            wrapped.init(PARAMS)
        sapp.sparsify(tx, block=1, sparsity=0.5, steps=10, min_blocks=1, reset=False).init(PARAMS)
        tx = optax.chain(of_state(init), sapp.reset_on(adam(0)))
        sapp.sparsify(tx, block=1, sparsity=0.5, steps=10, min_blocks=1).init(PARAMS)
        return
    wrapped.init(PARAMS)
    state, mark = tx.init(PARAMS), 7

    def marked(leaf):
        return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.full_like(leaf, mark)

    own, _ = resets.restart(True, state, jax.tree.map(marked, state), tx)
    assert [jnp.ndim(leaf) > 0 and bool(jnp.all(leaf == mark)) for leaf in jax.tree.leaves(own)] == restarts
