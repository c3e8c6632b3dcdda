"""Pruning from trained weights: where they are read from, that a run starts at them, and learning from a teacher."""

import contextlib
import functools
import json
import re
import shutil
import types

import commands
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import safetensors.numpy

import sa_plus_plus as sapp
from configs import mnist, mnist_autoencoder
from experiments import cli, runs, tasks
from experiments.outputs import progress, workdir
from experiments.training import checkpoint, loop, program, sharding, step, trained, weights
from experiments.training.setup import prepare

pytestmark = pytest.mark.usefixtures("standard_promotion")
STEPS = 40


def config(**changes):
    result = mnist.get_config()
    result.steps, result.eval_every, result.log_every, result.dense_twin = STEPS, 40, 20, False
    result.batch_size, result.eval_batch_size, result.checkpoint_every = 96, 400, 20
    result.sparsifier.recipe = "finetune"
    result.update_from_flattened_dict(changes)
    return result


def prepared(**changes):
    return prepare(config(**changes), one_device(), problems.digits())


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def shapes(setup):
    return jax.eval_shape(setup.task.init, jax.random.key(0))


def read(source, setup):
    return weights.read(str(source), *shapes(setup), "config.init_from")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The directory of a dense run, and its network by path."""
    path = tmp_path_factory.mktemp("weights") / "dense"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runs.run(prepared(**{"sparsifier.name": "dense"}), path, progress.console())
    return path, problems.weights_of(path / "pruned.safetensors")


def unfinished(dense, tmp_path):
    """A copy of a dense run as it is without what comes last."""
    copy = shutil.copytree(dense[0], tmp_path / "unfinished")
    (copy / "pruned.safetensors").unlink()
    return copy


def plain(dense, tmp_path, **changes):
    """A safetensors file that this project did not write."""
    path = tmp_path / "plain.safetensors"
    safetensors.numpy.save_file({**dense[1], **changes}, path)
    return path


def test_every_source_gives_the_same_weights(dense, tmp_path):
    path, network = dense
    half = {name: w.astype(np.float16) for name, w in network.items()}
    safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
    copy = unfinished(dense, tmp_path)
    sources = [path, path / "pruned.safetensors", path / "checkpoints", path / f"checkpoints/{STEPS}", copy]
    setup = prepared()
    for source in [*sources, plain(dense, tmp_path), tmp_path / "half.safetensors"]:
        found = read(source, setup)
        assert found.model_state is None
        assert jax.tree.structure(found.params) == jax.tree.structure(shapes(setup)[0])
        want = half if "half" in str(source) else network
        for keys, leaf in jax.tree_util.tree_leaves_with_path(found.params):
            assert leaf.dtype == np.float32
            np.testing.assert_array_equal(leaf, want[sapp.path_string(keys)].astype(np.float32))


def test_a_pruned_network_is_a_source_in_full(dense, tmp_path):
    setup = prepared(**{"sparsifier.sparsity": 0.5})
    zeroed = jax.tree.map(np.array, read(dense[0], setup).params)
    for name, rows in (("Dense_0", 392), ("Dense_1", 152)):
        zeroed[name]["kernel"][:rows] = 0
    sapp.save(tmp_path / "pruned.safetensors", {"params": sapp.export(zeroed, setup.plan)})
    damage(tmp_path / "pruned.safetensors", tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match="checksum"):
        read(tmp_path / "damaged.safetensors", setup)
    found = read(tmp_path, setup)  # a directory as a run leaves it
    jax.tree.map(np.testing.assert_array_equal, found.params, zeroed)


def damage(source, target):
    """Flip a bit of the last tensor."""
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)


@pytest.mark.parametrize("name", ["dense", "sequential_attention"])
def test_a_run_starts_at_the_weights_given(name, dense):
    setup = prepared(**{"sparsifier.name": name, "init_from": str(dense[0])})
    state = jax.jit(step.over_seeds(step.functions(setup)).init)(np.arange(2), setup.start)
    for seed in range(2):
        trainable = jax.tree.map(lambda x, seed=seed: x[seed], state.trainable)
        masks = jax.tree.map(lambda x, seed=seed: x[seed], state.prune.masks)
        effective = setup.sparsifier.apply(trainable, state.prune._replace(masks=masks))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(effective):
            np.testing.assert_allclose(leaf, dense[1][sapp.path_string(keys)], rtol=1e-6)


def test_model_state_comes_along_where_the_file_has_it(tmp_path):
    params = {"Dense_0": {"kernel": np.ones((3, 2), np.float32)}}
    own = {"batch_stats": {"mean": np.zeros(2, np.float32)}}
    stored = {"batch_stats": {"mean": np.full(2, 7, np.float32)}}
    setup = prepared(**{"sparsifier.name": "dense"})
    fns = step.functions(setup._replace(task=setup.task._replace(init=lambda key: (params, own))))
    for name, tree, want in (("with", {"params": params, **stored}, 7), ("without", {"params": params}, 0)):
        sapp.save(tmp_path / f"{name}.safetensors", tree)
        start = weights.read(str(tmp_path / f"{name}.safetensors"), params, own, "config.init_from")
        np.testing.assert_array_equal(fns.init(0, start).model_state["batch_stats"]["mean"], want)
    with pytest.raises(ValueError, match=r"batch_stats/mean is float32 \(2,\) there and absent in the model"):
        weights.read(str(tmp_path / "with.safetensors"), params, {}, "config.init_from")


def test_what_cannot_be_started_from_is_named(dense, tmp_path):
    setup, path = prepared(), dense[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("weights")
    copy = unfinished(dense, tmp_path)
    for host in copy.glob("checkpoints/*/host.json"):
        host.write_text("{}")
    kernel = dense[1]["Dense_0/kernel"]
    cases = [
        (tmp_path / "gone", FileNotFoundError, "config.init_from=.*gone: there is no such file or directory"),
        (tmp_path / "empty", FileNotFoundError, "neither pruned.safetensors nor a checkpoint"),
        (tmp_path / "text", ValueError, "damaged, or not a safetensors file"),
        (copy, ValueError, "no checkpoint in .* is intact"),
        (copy / f"checkpoints/{STEPS}", ValueError, "checkpoint .* is not intact: host.json has 2 bytes"),
        (
            plain(dense, tmp_path, **{"Dense_0/kernel": kernel[:100], "Conv_0/kernel": kernel}),
            ValueError,
            r"another network: Dense_0/kernel is float32 \(100, 300\) there and float32 \(784, 300\) in the model; "
            r"Conv_0/kernel is float32 \(784, 300\) there and absent in the model",
        ),
    ]
    for source, error, message in cases:
        with pytest.raises(error, match=message):
            read(source, setup)
    other = prepared(model="ConvNet")
    with pytest.raises(ValueError, match=r"is of another network: Conv_0/bias is absent there.*; and 9 more"):
        read(path, other)
    nan = np.where(np.arange(kernel.size).reshape(kernel.shape) < 5, np.nan, kernel)
    for changed, message in (
        (nan, "Dense_0/kernel holds 5 NaN or infinite values of 235200"),
        (kernel.astype(int), "int"),
    ):
        with pytest.raises(ValueError, match=message):
            read(plain(dense, tmp_path, **{"Dense_0/kernel": changed}), setup)


def test_another_start_is_another_run(tmp_path):
    workdir.record_config(tmp_path, config())
    with pytest.raises(ValueError, match=r"config\.init_from: '' there, 'runs/dense' now"):
        workdir.record_config(tmp_path, config(init_from="runs/dense"))


def test_resumed_runs_end_the_same_wherever_their_start_came_from(dense, tmp_path):
    """The checkpoint of a run that prunes holds all that it goes on from; and is no start itself."""
    setup = prepared(**{"init_from": str(dense[0]), "distil.weight": 0.5})
    run = program.compiled(setup)
    (whole,) = loop.train(run, [0])
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved, pytest.raises(loop.Preempted):
        loop.train(run, [0], loop.Hooks(on_step=lambda done: done == 25), saved)
    elsewhere = run._replace(functions=run.functions._replace(init=None))
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
        (resumed,) = loop.train(elsewhere, [0], checkpoints=saved)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    assert resumed.test == whole.test
    assert whole.test["test_accuracy"] > 0.6, "40 steps dense and 40 of pruning"
    with pytest.raises(ValueError, match=r"of a run that prunes.*let it finish, and take its pruned\.safetensors"):
        read(tmp_path, setup)


def test_compare_from_trained_weights(dense, tmp_path):
    flags = ["--config.steps=20", "--config.sparsifier.recipe=finetune", "--algorithms=magnitude", "--seeds=2"]
    done = commands.run("experiments.compare", *flags, f"--config.init_from={dense[0]}", f"--workdir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/compare.json").read_text())
    assert min(result["algorithms"]["magnitude"]["metric"]) > 0.6, "from scratch it takes more than 20 steps"


@pytest.mark.long
def test_one_shot_prunes_without_training_and_trains_on(dense, tmp_path):
    flags = ["--config=configs/mnist.py", f"--weights={dense[0]}", "--methods=magnitude,obs", "--sparsities=0.8"]
    flags += ["--budget=weights", "--calibration=300", "--finetune=20", f"--workdir={tmp_path / 'out'}"]
    flags += ["--config.batch_size=96"]
    done = commands.run("experiments.one_shot", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "one_shot.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["dense", *(m + b for b in ("", ", budget") for m in ("magnitude", "obs"))]
    assert rows["dense"]["metric"] > 0.85
    chance = 0.1
    assert chance < rows["magnitude"]["metric"] < rows["obs"]["metric"] <= rows["dense"]["metric"] + 0.02
    assert rows["obs"]["finetuned_metric"] > rows["obs"]["metric"] - 0.03
    for row in rows.values():
        network = problems.weights_of(tmp_path / "out" / row["file"])
        kept = {path: layer["kept"] / layer["blocks"] for path, layer in row.get("layers", {}).items()}
        for path, share in kept.items():
            blocks = network[path].reshape(network[path].shape[0] // 4, 4, -1, 4)
            assert np.any(blocks, (1, 3)).mean() <= share + 1e-9
        if "finetuned_file" in row:  # the same blocks
            after = problems.weights_of(tmp_path / "out" / row["finetuned_file"])
            assert all((network[path] != 0).sum() == (after[path] != 0).sum() for path in kept)
    assert rows["dense"]["bytes"] > 3 * rows["obs"]["bytes"]
    assert len((tmp_path / "out" / "sensitivity-obs.txt").read_text().splitlines()) == 4
    assert (tmp_path / "out" / "one_shot.png").stat().st_size > 20_000
    again = commands.run("experiments.one_shot", *flags)
    assert again.returncode == 2
    assert "holds results: choose another --workdir or pass --overwrite" in again.stderr


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--weights="], "--weights is needed"),
        (["--sparsities=0.5,x"], "--sparsities has 'x', which is not a number"),
        (["--sparsities=1"], r"--sparsities must be in \(0, 1\), got 1"),
        (["--methods=obd"], "--methods.*obd.*did you mean"),
        (["--sparsities=0.9999"], "leaves no block"),
        (["--weights=nowhere"], "--weights=nowhere: there is no such file"),
    ],
)
def test_what_one_shot_cannot_do_is_said(flags, match, dense, tmp_path):
    common = ["--config=configs/mnist.py", f"--weights={dense[0]}", f"--workdir={tmp_path / 'out'}"]
    done = commands.run("experiments.one_shot", *common, *flags)
    assert done.returncode == 2
    assert re.search(match, done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_answered_in_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"), cli.input_errors():
        prepared(init_from=f"{tmp_path}/gone")
    want = f"Cannot run: config.init_from={tmp_path}/gone: there is no such file or directory\n"
    assert capsys.readouterr().err == want


@pytest.mark.parametrize("name", problems.NAMES)
def test_every_algorithm_prunes_as_planned_by_the_recipe(name):
    schedule = sapp.ALGORITHMS[name].schedule(20, recipe="finetune")
    options = {} if name == "dense" else {"block": (2, 2), "sparsity": 0.8}
    sp, params = sapp.ALGORITHMS[name].make(phases=schedule, **options), problems.network()
    update = jax.jit(sp.update)
    state = sp.init(params)
    for _ in range(20):
        state = update(*state)
    sapp.check_pruned(sp.finalize(*state), sp.plan(params))


def test_attention_cannot_begin_sparse():
    with pytest.raises(ValueError, match=r"first phase is sparse \[0, 20\).*begin with a dense or a sparsification"):
        prepared(**{"steps": 400, "sparsifier.sparsification": False})


# Learning from a teacher.


def cross_entropies(logits, labels):
    """Of each class, `(examples, classes)` in float64, weighted by `labels` of that shape."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return -np.sum(labels * (logits - np.log(np.exp(logits).sum(-1, keepdims=True))), -1)


def softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64))
    return powers / powers.sum(-1, keepdims=True)


def divergence(teacher, logits):
    """KL divergence of softmax(logits) from softmax(teacher), by its definition."""
    p, q = softmax(teacher), softmax(logits)
    return np.sum(p * np.log(p / q), -1)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.5), (5.0, 0.9), (0.5, 0.25), (3.0, 0.0)])
def test_the_loss_is_as_defined(temperature, weight):
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(0, 3, (2, 6, 10)).astype(np.float32)
    labels = np.eye(10)[rng.integers(0, 10, 6)]
    plain_loss = cross_entropies(logits, labels)
    want = (1 - weight) * plain_loss + weight * temperature**2 * divergence(teacher / temperature, logits / temperature)
    loss = functools.partial(tasks.distilled, temperature=temperature, weight=weight)
    got = loss(jnp.asarray(plain_loss, jnp.float32), jnp.asarray(logits), jnp.asarray(teacher))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)
    # d/dlogits of the second term: w T (softmax(logits / T) - softmax(teacher / T)); none for the teacher.
    ours, theirs = jax.grad(lambda *x: loss(jnp.zeros(6), *x).sum(), (0, 1))(jnp.asarray(logits), jnp.asarray(teacher))
    slope = weight * temperature * (softmax(logits / temperature) - softmax(teacher / temperature))
    np.testing.assert_allclose(ours, slope, atol=1e-5)
    assert not theirs.any()


def lenet(network, image):
    x = image.reshape(len(image), -1) / 255
    for i in range(3):
        x = x @ network[f"Dense_{i}/kernel"] + network[f"Dense_{i}/bias"]
        x = np.maximum(x, 0) if i < 2 else x
    return x


@pytest.mark.parametrize("seeds", [1, 2])
def test_training_learns_from_the_teacher_and_evaluation_does_not(seeds, dense):
    path = dense[0] / "pruned.safetensors"
    options = {
        "distil.weight": 0.75,
        "distil.teacher": str(path),
        "distil.temperature": 3.0,
        "sparsifier.name": "dense",
    }
    setup = prepared(**options)
    run = program.compiled(setup, seeds)
    untaught = jax.eval_shape(step.functions(prepared(**{"sparsifier.name": "dense"})).init, 0)
    if seeds == 1:
        assert jax.tree.map(np.shape, run.state) == jax.tree.map(np.shape, untaught), "no teacher in checkpoints"
    state = run.functions.init(program.seed_argument(range(seeds)))
    batch = program.next_batch(run, program.train_streams(run, range(seeds)))
    test = {name: x[:400] for name, x in problems.digits().test.arrays.items()}
    evaluated, _ = run.functions.evaluate(state, {**test, "weight": np.ones(400, np.float32)})
    # Copies, before the state is donated; with an axis of seeds.
    params, batches = jax.tree.map(lambda x: np.array(x if seeds > 1 else x[None]), (state.trainable.params, batch))
    _, means = run.functions.step(state, batch)
    for n in range(seeds):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        network = {sapp.path_string(keys): leaf[n] for keys, leaf in leaves}
        logits, taught = (lenet(w, batches["image"][n]) for w in (network, dense[1]))
        plain_loss = cross_entropies(logits, np.eye(10)[batches["label"][n]])
        want = 0.25 * plain_loss + 0.75 * 9 * divergence(taught / 3, logits / 3)
        assert np.ravel(means["loss"])[n] == pytest.approx(want.mean(), rel=1e-4)
        tested = cross_entropies(lenet(network, test["image"]), np.eye(10)[test["label"]])
        assert np.ravel(evaluated["loss"])[n] / 400 == pytest.approx(tested.mean(), rel=1e-4)


def test_teachers_that_cannot_teach_are_refused(dense):
    path = str(dense[0])
    for changes, message in (
        ({"distil.weight": 1.5}, r"config.distil.weight must be in \[0, 1\], 0 for no teacher; got 1.5"),
        ({"distil.weight": float("nan")}, "got nan"),
        ({"distil.weight": 0.5}, "needs a teacher: name its weights by config.distil.teacher, or by config.init_from"),
        ({"distil.teacher": path}, "is a teacher without influence: raise config.distil.weight"),
        ({"distil.weight": 0.5, "distil.teacher": path, "distil.temperature": 0.0}, "temperature must be .* got 0.0"),
        ({"distil.weight": 0.5, "distil.teacher": path, "model": "ConvNet"}, "config.distil.teacher=.*another network"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(**changes)
    autoencoder = mnist_autoencoder.get_config()
    autoencoder.distil.weight = 0.5
    with pytest.raises(ValueError, match=r"config\.task='reconstruction' cannot"):
        prepare(autoencoder, one_device(), problems.digits())


def test_batch_averages_are_estimated_anew():
    """Against the mean over batches with weights `m^(k-i)`, as an average that began long ago would have them."""
    momentum = 0.9
    batches = [{"x": np.random.default_rng(i).normal(i, 1 + i, (50, 3)).astype(np.float32)} for i in range(4)]

    def outputs(params, model_state, batch, training):
        assert training
        x = batch["x"] * params
        found = {"mean": x.mean(0), "var": x.var(0)}
        old = model_state["batch_stats"]
        return {}, {"batch_stats": jax.tree.map(lambda a, b: momentum * a + (1 - momentum) * b, old, found)}

    setup = types.SimpleNamespace(task=types.SimpleNamespace(outputs=outputs))
    state = {"batch_stats": {"mean": jnp.full(3, 7.0), "var": jnp.full(3, 9.0)}}
    again = trained.Trained(setup, None, state).recalibrated(2.0, batches)
    weights = momentum ** np.arange(3, -1, -1)
    for name, of in (("mean", np.mean), ("var", np.var)):
        want = sum(w * of(2 * b["x"], 0) for w, b in zip(weights, batches, strict=True)) / weights.sum()
        np.testing.assert_allclose(again.model_state["batch_stats"][name], want, rtol=1e-4)
    assert trained.Trained(setup, None, {}).recalibrated(2.0, batches).model_state == {}
