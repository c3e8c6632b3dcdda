"""The algorithms against an independent NumPy implementation: whole runs step by step, gradients, phases."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import sa_plus_plus as sapp

STEPS = 120
DECAY = 1e-3
TOLERANCE = 1e-5
MARGIN = 2e-5  # scores closer than this (relatively) might be told apart differently in float32

PAPER = {"min_blocks": 1, "min_kept": 0}  # no layer keeps more than its share
CASES = {
    "even": {"block": (2, 2), "sparsity": 0.8},  # one kernel of 12 x 10 blocks
    "ragged": {"block": (4, 3), "sparsity": 0.7},  # two kernels, partial blocks on both edges
}
ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-2}  # b2 and eps kind to float32: small gradients are mostly rounding

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # runs are short


def make_problem(shapes, samples=64, seed=7):
    """Regression on weights of very unequal size, so that scores do not tie."""
    rng = np.random.default_rng(seed)
    cols = shapes[0][-1]
    inputs, kernels, targets = {}, {}, 0.1 * rng.normal(size=(samples, cols))
    for index, shape in enumerate(shapes):
        rows = math.prod(shape[:-1])
        name = f"kernel{index}"
        inputs[name] = rng.normal(size=(samples, rows))
        patches = rng.exponential(0.25, size=(-(-rows // 4), -(-cols // 4)))
        targets += inputs[name] @ (np.kron(patches, np.ones((4, 4)))[:rows, :cols] * rng.normal(size=(rows, cols)))
        kernels[name] = (0.2 * rng.normal(size=shape)).astype(np.float32).astype(np.float64)
    return reference.Problem(inputs, targets, kernels, np.zeros(cols))


@functools.cache
def problem_of(case):
    """`even`: one matrix. `ragged`: a matrix, and the kernel of a convolution."""
    return make_problem([(24, 20)] if case == "even" else [(23, 19), (3, 2, 3, 19)])


def initial_params(problem, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), {**problem.kernels, "bias": problem.bias})


def loss_fn(problem, params):
    residual = params["bias"][None] - jnp.asarray(problem.targets, params["bias"].dtype)
    for name, inputs in problem.inputs.items():
        kernel = params[name]
        residual += jnp.asarray(inputs, kernel.dtype) @ kernel.reshape(-1, kernel.shape[-1])
    return 0.5 * jnp.sum(residual**2) / len(problem.targets)


def recipe_pair(algorithm, recipe="imagenet", steps=STEPS, exponent=None, **options):
    """The library's schedule and the reference's."""
    theirs = reference.lay_out(reference.recipe(algorithm, recipe, **options), steps)
    if exponent is not None:
        options["exponent"] = exponent
    return getattr(sapp.phases, algorithm)(steps, recipe=recipe, **options), theirs


def custom_pair(*phases):
    stops = np.cumsum([length for _, length in phases]).tolist()
    theirs = [(kind, stop - length, stop) for (kind, length), stop in zip(phases, stops, strict=True)]
    return sapp.phases.custom(stops[-1], phases), theirs


def library_run(problem, sp, inner, schedule):
    """Every state of the explicit training loop: `(trainable, prune, effective parameters)`."""
    rate = optax.scale_by_learning_rate(lambda count: schedule(count.astype(jnp.float32)))
    tx = optax.chain(optax.add_decayed_weights(DECAY), sapp.reset_on(inner), rate)

    @jit
    def step(trainable, prune, opt_state):
        grads = jax.grad(lambda trainable: loss_fn(problem, sp.apply(trainable, prune)))(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable, phase=prune.phase)
        trainable, prune = sp.update(trainable, prune, updates)
        return trainable, prune, opt_state, sp.apply(trainable, prune)

    @jit
    def start(params):
        trainable, prune = sp.init(params)
        return trainable, prune, tx.init(trainable), sp.apply(trainable, prune)

    trainable, prune, opt_state, effective = start(initial_params(problem))
    yield trainable, prune, effective
    for _ in range(sp.phases.total_steps):
        trainable, prune, opt_state, effective = step(trainable, prune, opt_state)
        yield trainable, prune, effective


def check_run(algorithm, case, phases=None, *, adam=False, peak=0.05, exponent=4.0, **options):
    """Run the library and the reference, compare every state; returns the reference's pruner and states."""
    problem, options = problem_of(case), {**CASES[case], **options}
    schedule, their_phases = phases or recipe_pair(algorithm)
    sp = getattr(sapp, algorithm)(phases=schedule, **PAPER, **options)
    logit_lr = options.pop("logit_lr", 1.0)
    pruner = reference.Pruner(algorithm, problem.kernels, phases=their_phases, exponent=exponent, **options)

    # It changes at every step: if a boundary set it back, weights would differ.
    def learning_rate(step):
        return peak * (1 - 0.9 * step / STEPS)

    inner = optax.scale_by_adam(**ADAM) if adam else optax.trace(0.9)
    rival = reference.Adam(DECAY, **ADAM) if adam else reference.SGD(DECAY, momentum=0.9)
    ours = library_run(problem, sp, inner, learning_rate)
    theirs = list(reference.train(problem, pruner, rival, learning_rate, logit_lr))

    phase = 0
    for step, ((trainable, prune, effective), state) in enumerate(zip(ours, theirs, strict=True)):
        check = functools.partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE, err_msg=f"at step {step}")
        assert prune.step == step
        assert (prune.phase != phase) == state.boundary, f"at step {step}"
        phase = prune.phase
        assert (prune.masks.keys(), trainable.logits.keys()) == (state.masks.keys(), state.logits.keys())
        for name, mask in state.masks.items():
            np.testing.assert_array_equal(prune.masks[name], mask, f"at step {step}")
            check(effective[name], state.effective[name])
            # What is to restart from zero may be forgotten at any time until then.
            seen = reference.spread(mask, state.weights[name].shape, pruner.block) | (not pruner.forgets())
            check(np.asarray(trainable.params[name])[seen], state.weights[name][seen])
        for name, logits in state.logits.items():
            check(trainable.logits[name], logits)
        check(trainable.params["bias"], state.bias)

    pruned = jit(sp.finalize)(trainable, prune)
    for name, kernel in theirs[-1].effective.items():
        check(pruned[name], kernel)
        np.testing.assert_array_equal(pruned[name] != 0, kernel != 0)
    assert pruner.margin > MARGIN, "scores too close: the comparison of masks would hang on rounding"
    return pruner, theirs


def blocks_that_return(pruner, states):
    """How many blocks come back while a sparsification phase lasts."""
    inside = [step for kind, start, stop in pruner.phases for step in range(start, stop - 1) if kind[:6] == "sparsi"]
    return sum(np.sum(states[i + 1].masks[n] & ~states[i].masks[n]) for i in inside for n in pruner.masks)


both_cases = pytest.mark.parametrize("case", list(CASES))


@both_cases
@pytest.mark.parametrize("mask_every", [1, 3])
def test_sequential_attention(case, mask_every):
    pruner, states = check_run("sequential_attention", case, mask_every=mask_every)
    for name, mask in states[-1].masks.items():
        assert mask.sum() == pruner.kept[name]


def test_sequential_attention_criteo():
    check_run("sequential_attention", "even", recipe_pair("sequential_attention", "criteo"))


def test_sequential_attention_without_sparsification():
    check_run("sequential_attention", "ragged", recipe_pair("sequential_attention", sparsification=False))


@pytest.mark.parametrize(
    ("case", "clip"), [("even", "density"), ("ragged", "density"), ("even", (0.8, 1.3)), ("ragged", None)]
)
def test_clipping(case, clip):
    pruner, _ = check_run("sequential_attention", case, clip=clip, sparsity=0.5, logit_lr=3.0, peak=0.03)
    assert (pruner.clipped > 0) == (clip is not None)


@pytest.mark.parametrize(("algorithm", "case"), [("sequential_attention", "even"), ("gradual_magnitude", "ragged")])
@pytest.mark.parametrize("monotone", [True, False])
def test_returning_blocks(algorithm, case, monotone):
    long = custom_pair(("dense", 2), ("sparsification", 40), ("sparse", 3))
    pruner, states = check_run(algorithm, case, long, monotone=monotone)
    assert (blocks_that_return(pruner, states) > 0) == (not monotone)


def test_logits_learn_faster():
    check_run("sequential_attention", "ragged", logit_lr=10.0, peak=0.01)


@pytest.mark.usefixtures("standard_promotion")  # optax's Adam mixes integers and floats
def test_adam():
    check_run("sequential_attention", "even", adam=True, peak=0.01)


def test_exponent_of_the_curve():
    check_run("sequential_attention", "even", recipe_pair("sequential_attention", exponent=8.0), exponent=8.0)


def test_logits_that_start_again():
    check_run("sequential_attention", "ragged", reset_logits_at=("dense",), logit_lr=10.0, peak=0.01)


@pytest.mark.parametrize("algorithm", ["sequential_attention", "magnitude"])
def test_global_selection(algorithm):
    pruner, states = check_run(algorithm, "ragged", scope="global")
    kept = {name: mask.sum() for name, mask in states[-1].masks.items()}
    assert kept != pruner.kept
    assert sum(kept.values()) == sum(pruner.kept.values())


@both_cases
@pytest.mark.parametrize(("form", "recipe"), [("pruning", "imagenet"), ("masking", "criteo")])
def test_acdc(case, form, recipe):
    check_run("acdc", case, recipe_pair("acdc", recipe), form=form)


def test_magnitude():
    check_run("magnitude", "ragged")


@pytest.mark.parametrize(("case", "mask_every"), [("even", 1), ("ragged", 7)])
def test_gradual_magnitude(case, mask_every):
    check_run("gradual_magnitude", case, mask_every=mask_every)


@pytest.mark.parametrize(("case", "alpha"), [("even", 2.0), ("ragged", 2.0), ("ragged", 3.0)])
def test_powerpropagation(case, alpha):
    check_run("powerpropagation", case, alpha=alpha, peak=0.02)


UNUSUAL = custom_pair(
    ("sparsification", 20),
    ("sparse", 5),
    ("sparse", 5),
    ("sparsification", 7),
    ("sparsification", 7),
    ("dense", 3),
    ("sparse", 1),
    ("dense", 1),
    ("sparsification", 15),
)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sequential_attention", {"mask_every": 4}),
        ("acdc", {"form": "pruning"}),
        ("acdc", {"form": "masking"}),
        ("powerpropagation", {}),
    ],
)
def test_unusual_schedule(algorithm, options):
    """Phases of every kind after every other, the first and the last being sparsification."""
    pruner, states = check_run(algorithm, "ragged", UNUSUAL, **options)
    for name, mask in states[-1].masks.items():
        assert mask.sum() == pruner.kept[name]


def test_sparse_from_the_start():
    check_run("magnitude", "even", custom_pair(("sparse", 10), ("dense", 10), ("sparse", 10)))


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.0])
def test_powerpropagation_starts_at_the_usual_initialisation(alpha):
    problem = problem_of("ragged")
    params = initial_params(problem)
    params["kernel0"] = params["kernel0"].at[4:8, 3:6].set(0)
    sp = sapp.powerpropagation(
        phases=recipe_pair("powerpropagation")[0], alpha=alpha, min_blocks=1, min_kept=0, **CASES["ragged"]
    )
    trainable, prune = sp.init(params)
    for name, kernel in sp.apply(trainable, prune).items():
        np.testing.assert_allclose(kernel, params[name], rtol=1e-5, atol=0)
    for name in problem.kernels:
        norm = reference.norms(np.float64(params[name]), (4, 3))
        expected = np.where(norm > 0, norm, 1) ** (1 / alpha) * (norm > 0)
        np.testing.assert_allclose(reference.norms(np.float64(trainable.params[name]), (4, 3)), expected, rtol=1e-5)


def finite_differences(function, array, h=1e-7):
    """Central differences of `function()` by the entries of an array that it reads."""
    result = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        array[index] = value + h
        above = function()
        array[index] = value - h
        result[index] = (above - function()) / (2 * h)
        array[index] = value
    return result


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sequential_attention", {"clip": None}),
        ("sequential_attention", {"clip": "density"}),
        ("sequential_attention", {"clip": (0.9, 1.2)}),
        ("acdc", {}),
        ("powerpropagation", {"alpha": 2.0}),
        ("powerpropagation", {"alpha": 3.0}),
    ],
)
def test_gradients(algorithm, options):
    """The library's gradients in float64 against finite differences of the reference's loss."""
    rng = np.random.default_rng(0)
    problem = make_problem([(11, 7), (2, 1, 3, 7)], samples=16)
    problem.kernels["kernel0"][4:8, 3:6] = 0  # a whole block
    options = {"block": (4, 3), "sparsity": 0.5, **options}
    schedule, phases = recipe_pair(algorithm)
    pruner = reference.Pruner(algorithm, problem.kernels, phases=phases, **options)
    for name, mask in pruner.masks.items():
        pruner.masks[name] = rng.random(mask.shape) < 0.7
    pruner.masks["kernel0"][1, 1] = True
    for name, logits in pruner.logits.items():
        pruner.logits[name] = rng.normal(size=logits.shape)
    bias = problem.bias.copy()

    with jax.enable_x64(True):
        sp = getattr(sapp, algorithm)(phases=schedule, **PAPER, **options)
        trainable, prune = sp.init(initial_params(problem, jnp.float64))
        trainable = trainable._replace(logits=jax.tree.map(jnp.asarray, pruner.logits))
        prune = prune._replace(masks=jax.tree.map(jnp.asarray, pruner.masks))
        grads = jit(jax.grad(lambda trainable: loss_fn(problem, sp.apply(trainable, prune))))(trainable)

    def check(gradient, array):
        assert gradient.dtype == jnp.float64
        expected = finite_differences(lambda: problem.loss(pruner.effective(), bias), array)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)

    check(grads.params["bias"], bias)
    for name in problem.kernels:
        check(grads.params[name], pruner.weights[name])
        masked = ~reference.spread(pruner.masks[name], problem.kernels[name].shape, pruner.block)
        np.testing.assert_array_equal(grads.params[name][masked], 0)
    for name, logits in pruner.logits.items():
        check(grads.logits[name], logits)
    by_kernels, _ = problem.gradients(pruner.effective(), bias)
    for name, gradient in by_kernels.items():
        by_weights, by_logits = pruner.pull_back(name, gradient)
        np.testing.assert_allclose(grads.params[name], by_weights, atol=1e-12)
        if by_logits is not None:
            np.testing.assert_allclose(grads.logits[name], by_logits, atol=1e-12)
    assert (pruner.clipped > 0) == (options.get("clip") is not None)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_powerpropagation_gradient_at_vanishing_blocks(alpha):
    problem = problem_of("ragged")
    sp = sapp.powerpropagation(
        phases=recipe_pair("powerpropagation")[0], alpha=alpha, min_blocks=1, min_kept=0, **CASES["ragged"]
    )
    trainable, prune = sp.init(initial_params(problem))
    weights = np.array(trainable.params["kernel0"])
    sizes = [0.0, 1e-24, 1e-21, 1e-18, 1e-15]
    for column, size in enumerate(sizes):
        weights[4:8, 3 * column : 3 * column + 3] = size
    trainable = trainable._replace(params={**trainable.params, "kernel0": jnp.asarray(weights)})
    gradient = jit(jax.grad(lambda t: loss_fn(problem, sp.apply(t, prune))))(trainable).params["kernel0"]
    assert np.all(np.isfinite(gradient))
    vanishing = np.s_[4:8, : 3 * len(sizes)]
    np.testing.assert_allclose(gradient[vanishing], 0, atol=1e-6)
    assert np.all(gradient.at[vanishing].set(1) != 0)


@pytest.mark.parametrize("exponent", [0.5, 2.0, 4.0, 8.0])
def test_curve(exponent):
    """Written out for one phase, with its ends and its direction."""
    phases = sapp.phases.custom(20, [("sparsification", 20)], exponent=exponent)
    shares = np.asarray(jit(jax.vmap(phases.fraction))(np.arange(21)))
    np.testing.assert_allclose(shares, [reference.curve(i / 20, exponent) for i in range(21)], atol=1e-6)
    assert (shares[0], shares[20]) == (0, 1)
    assert np.all(np.diff(shares) > 0)
