"""The main job and the comparison, run as a user would, and the parts they are made of."""

import contextlib
import inspect
import json
import re
import shutil
import sys
import types

import commands
import jax
import matplotlib.image
import numpy as np
import problems
import pytest
from absl import flags
from PIL import Image

import sa_plus_plus as sapp
from configs import imagenette_block8, mnist
from experiments import cli, models, runs, tasks
from experiments.outputs import progress, report
from experiments.training import checkpoint, loop, program, sharding
from experiments.training.setup import prepare
from experiments.utils import files
from experiments.utils.registry import own_options

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = commands.ROOT
KEYS = (
    "algorithm block target_sparsity real_sparsity metric_name metric loss diverged steps seconds seed versions config "
    "compile_seconds startup_seconds"
)


def config(**changes):
    result = mnist.get_config()
    result.steps, result.eval_every, result.log_every, result.dense_twin = 60, 20, 10, False
    result.batch_size, result.eval_batch_size, result.checkpoint_every = 96, 400, 30
    result.update_from_flattened_dict(changes)
    return result


def prepared(c):
    return prepare(c, sharding.make_mesh(devices=jax.devices()[:1]), problems.digits())


def numpy_accuracy(weights, dataset):
    """LeNet-300-100 by hand."""
    x = dataset.test.arrays["image"].reshape(len(dataset.test), -1) / 255
    for i in range(3):
        x = x @ weights[f"Dense_{i}/kernel"] + weights[f"Dense_{i}/bias"]
        x = np.maximum(x, 0) if i < 2 else x
    return np.mean(x.argmax(1) == dataset.test.arrays["label"])


@pytest.mark.parametrize(
    "name", ["sequential_attention", "acdc", "powerpropagation", "d_gating", "group_lasso", "dense"]
)
def test_a_run_leaves_complete_and_consistent_results(name, tmp_path):
    c = config(**{"sparsifier.name": name})
    assert runs.run(prepared(c), tmp_path, progress.console())["diverged"] is False
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(KEYS.split()) <= set(result)
    assert (result["algorithm"], result["steps"], result["diverged"]) == (name, 60, False)
    weights = problems.weights_of(tmp_path / "pruned.safetensors")
    kernels = [w for path, w in weights.items() if path.endswith("kernel")]
    zeros = sum((w == 0).sum() for w in kernels) / sum(w.size for w in kernels)
    assert result["real_sparsity"] == pytest.approx(zeros)
    assert result["kept_weights"] == sum(w.size for w in weights.values()) - sum((w == 0).sum() for w in kernels)
    assert zeros == pytest.approx(0 if name == "dense" else 0.8966, abs=1e-3)
    assert result["metric"] == pytest.approx(numpy_accuracy(weights, problems.digits()), abs=1e-3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert steps[-1] == 60
    assert rows[-1]["test_accuracy"] == result["metric"]
    assert list((tmp_path / "tensorboard").iterdir())
    assert matplotlib.image.imread(tmp_path / "run.png").shape[2] == 4
    assert ("churn" in {key for row in rows for key in row}) == (name in ("acdc", "sequential_attention"))


def test_results_count_blocks_as_the_layers_view_has_them():
    rng = np.random.default_rng(0)
    tiles = rng.random((3, 6, 4)) < 0.4  # of a stack of three matrices, stored outputs first
    weight = np.kron(tiles, np.ones((1, 4, 3), np.float32)).transpose(0, 2, 1)
    query = np.kron(rng.random((6, 8)) < 0.4, np.ones((4, 3), np.float32)).reshape(24, 4, 6)
    params = {"stack": weight, "query": {"kernel": query}}
    plan = sapp.plan(params, block=(4, 3), sparsity=0.6, min_blocks=1, views={"stack": "[l] o i -> [l] i o"})
    rows = {row["path"]: row for row in report.layer_rows(types.SimpleNamespace(params=params, plan=plan))}
    assert (rows["stack"]["blocks"], rows["stack"]["kept"]) == (3 * 24, tiles.sum())
    assert (rows["query/kernel"]["blocks"], rows["query/kernel"]["kept"]) == (48, np.count_nonzero(query) // 12)


def test_chosen_inputs_are_rows_of_the_layers_view():
    kernel = np.zeros((3, 5), np.float32)  # outputs first
    kernel[:, 4], kernel[:, 1] = 2, 1
    plan = sapp.plan({"w": kernel}, block=(1, None), sparsity=0.5, min_blocks=1, views={"w": "o i -> i o"})
    chosen = report.chosen_features(types.SimpleNamespace(params={"w": kernel}, plan=plan), "abcde")
    assert [row["name"] for row in chosen] == ["e", "b"]


def test_seeds_side_by_side_equal_seeds_in_turn():
    c = config(**{"sparsifier.name": "random", "eval_batch_size": 320})
    together = loop.train(program.compiled(prepared(c), 2), [3, 4])
    one = program.compiled(prepared(c))
    for outcome in together:
        (alone,) = loop.train(one, [outcome.seed])
        assert alone.test["test_accuracy"] == pytest.approx(outcome.test["test_accuracy"], abs=2e-3)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), alone.params, outcome.params)
    kernels = [np.asarray(o.params["Dense_0"]["kernel"] != 0) for o in together]
    assert not np.array_equal(*kernels), "each seed has a random mask of its own"


def reordering(**changes):
    c = config(log_every=60, eval_every=20, checkpoint_every=15, **changes)
    c.sparsifier.name, c.sparsifier.reorder = "gradual_magnitude", ("sparsification", "50%")
    c.sparsifier.schedule = (("dense", 20), ("sparsification", 20), ("sparse", 20))
    return c


def test_units_change_places_at_a_boundary_of_phases_and_a_run_is_resumed_with_them(tmp_path):
    c, plain = reordering(), reordering()
    plain.sparsifier.reorder = ()
    run = program.compiled(prepared(c))
    (whole,) = loop.train(run, [0])
    (before,) = loop.train(program.compiled(prepared(plain)), [0])
    assert whole.rows[0]["step"] == 20
    assert whole.rows[0]["test_loss"] == pytest.approx(before.rows[0]["test_loss"], abs=1e-5)
    assert [each.step for each in whole.reorderings] == [20, 30]
    assert all(after >= first for first, after, _ in whole.reorderings[0].shares.values())
    order = np.array(whole.reorderings[0].permutations["Dense_0/kernel axis 1"])
    assert np.array_equal(np.sort(order), np.arange(300))
    assert np.mean(order != np.arange(300)) > 0.2
    for stop in (20, 25):
        path = tmp_path / str(stop)
        with contextlib.closing(checkpoint.Checkpoints(path)) as saved, pytest.raises(loop.Preempted):
            loop.train(run, [0], loop.Hooks(on_step=lambda done, stop=stop: done == stop), saved)
        with contextlib.closing(checkpoint.Checkpoints(path)) as saved:
            (resumed,) = loop.train(run, [0], checkpoints=saved)
        jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
        assert resumed.reorderings == whole.reorderings


def test_seeds_side_by_side_have_orders_of_their_own(tmp_path):
    """Of their pixels too, by a table in the model's state."""
    c = reordering(seed=4)
    with c.unlocked():
        c.model_options.inputs_by_table = True
    setup = prepared(c)
    together = loop.train(program.compiled(setup, 2), [3, 4])
    name = "params/Dense_0/kernel axis 1"
    orders = [outcome.reorderings[0].permutations[name] for outcome in together]
    assert orders[0] != orders[1]
    places = [np.asarray(outcome.model_state["tables"]["places"]) for outcome in together]
    assert not np.array_equal(*places)
    assert np.array_equal(np.sort(places[0]), np.arange(784))
    result = runs.run(setup, tmp_path, progress.console())
    assert result["metric"] == pytest.approx(together[1].test["test_accuracy"], abs=0.02)
    saved = json.loads((tmp_path / "orders.json").read_text())
    assert [each["step"] for each in saved] == [each["step"] for each in result["reordered"]] == [20, 30]
    assert saved[0]["permutations"][name] == orders[1]


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (("sparse",), r"reorder='sparse' is at step 40, in the phase sparse \[40, 60\), whose blocks are chosen"),
        ((50,), "reorder=50 is at step 50, in the phase sparse"),
        (("often",), "cannot read the duration 'often'"),
    ],
)
def test_reordering_in_a_sparse_phase_is_refused(when, message):
    c = reordering()
    c.sparsifier.reorder = when
    with pytest.raises(ValueError, match=message):
        prepared(c)


def test_nothing_is_compiled_once_the_first_evaluation_and_save_are_done(tmp_path):
    compilations, done = [], [0]

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(done[0])

    def on_step(step):
        done[0] = step
        return False

    run = program.compiled(prepared(config(log_every=5, eval_every=10, checkpoint_every=10)))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as saved:
            loop.train(run, [0], loop.Hooks(on_step=on_step), saved)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations, "the listener hears something"
    assert not [step for step in compilations if 20 < step < 60]


def test_a_network_that_is_not_sparse_yet_is_never_the_best_checkpoint(tmp_path):
    c = config(log_every=60, eval_every=5, checkpoint_every=5, max_to_keep=60)
    c.sparsifier.schedule = (("dense", 20), ("sparse", 15), ("sparsification", 15), ("sparse", 10))
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, max_to_keep=c.max_to_keep)) as saved:
        loop.train(program.compiled(prepared(c)), [0], checkpoints=saved)
    saves = [json.loads(path.read_text()) for path in tmp_path.glob("*/host.json")]
    assert sorted(save["step"] for save in saves) == list(range(5, 61, 5))
    assert {save["step"] for save in saves if save["metric"] is not None} == {20, 25, 30, 50, 55, 60}


def test_divergence_stops_the_run_and_is_recorded(tmp_path):
    c = config(**{"optimizer.learning_rate": 1e9})
    assert runs.run(prepared(c), tmp_path, progress.console())["diverged"] is True
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["diverged"] is True
    assert result["steps"] < 60
    assert result["metric"] is None


@pytest.mark.long
def test_photographs_through_a_whole_schedule(tmp_path):
    """Files of several sizes, one of them damaged; batch statistics; every phase; and again from a checkpoint."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 7)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (40 + i, 50, 3), np.uint8) + np.uint8(128 * label)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.JPEG")
    (tmp_path / "train/dark/3.JPEG").write_bytes(b"nothing")
    c = imagenette_block8.get_config()
    c.data.name, c.data.options = "image_folder", {"directory": str(tmp_path), "size": 32, "skip_corrupt": True}
    c.model, c.steps, c.batch_size, c.eval_batch_size = "ResNet20", 40, 8, 8
    c.model_options.stages = (1, 1, 1)
    c.log_every, c.eval_every, c.checkpoint_every, c.sparsifier.min_blocks = 1, 10, 15, 20
    c.optimizer.learning_rate = 0.02
    runs.run(prepare(c), tmp_path / "run", progress.console())
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["metric"] == 1, "light and dark are easily told apart"
    assert 0.7 < result["real_sparsity"] < 0.9
    rows = (tmp_path / "run/metrics.jsonl").read_text()
    assert [json.loads(row)["skipped"] for row in rows.splitlines()][-1] == 8, "once in each of 320 / 40 epochs"
    for name in ("result.json", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/40")
    runs.run(prepare(c), tmp_path / "run", progress.console())
    assert (tmp_path / "run/metrics.jsonl").read_text() == "".join(rows.splitlines(keepends=True)[30:])
    again = json.loads((tmp_path / "run/result.json").read_text())
    assert (again["loss"], again["layers"]) == (result["loss"], result["layers"])


def test_a_dense_twin_shares_the_data_and_may_diverge_too(tmp_path, monkeypatch):
    c = config(**{"optimizer.learning_rate": 1e9, "dense_twin": True})
    setup = prepared(c)
    monkeypatch.setattr(tasks, "dataset_of", None)  # reading the data again would fail
    assert runs.run(setup, tmp_path, progress.console())["diverged"]
    assert json.loads((tmp_path / "result.json").read_text())["dense_twin"] == {"metric": None, "loss": None}


@pytest.mark.long
def test_main_from_the_command_line(tmp_path):
    arguments = ["--config.steps=60", "--config.sparsifier.name=acdc", f"--workdir={tmp_path / 'run'}"]
    done = commands.run("experiments.main", *arguments, real=True)
    assert done.returncode == 0, done.stderr
    assert "Warning: phases of fewer than 10 steps (the shortest): acdc (3)" in done.stdout
    for words in ("dense twin", "sparse", "loss", "steps/s", "Dense_0/kernel", "the same network trained dense"):
        assert words in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 < result["dense_twin"]["metric"] < 1
    again = commands.run("experiments.main", *arguments)
    assert again.returncode == 0, "complete already"
    assert (tmp_path / "run" / "result.json").read_text() == json.dumps(result, indent=2, ensure_ascii=False) + "\n"


@pytest.fixture
def parsed(monkeypatch):
    """Parses a command line; the flags that this defines are gone after the test."""
    monkeypatch.chdir(ROOT)

    def parse(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["main", *arguments]
        )  # ml_collections looks there for what overrides the config
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)
        cli.parse(sys.argv)
        return cli.CONFIG.value

    yield parse
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.data.batch_size=3", "no config key 'config.data.batch_size'; did you mean 'config.batch_size'?"),
        ("--config.sparsifier.sparisty=0.5", "did you mean 'config.sparsifier.sparsity'?"),
        ("--config.min_blocks=3", "did you mean 'config.sparsifier.min_blocks'?"),
        ("--noconfig.dens_twin", "did you mean 'config.dense_twin'?"),
        ("--config.seed.first=3", "no config key 'config.seed.first'"),
        (
            "--config.model_options.width=3",
            "did you mean 'config.model_options.widths'? LeNet300 takes classes=10 (int), wi",
        ),
        ("--config.model_options.a.b=3", "no config key 'config.model_options.a.b'"),
        (
            "--config.model_options.widths.a=3",
            "'config.model_options.widths.a'; did you mean 'config.model_options.widths'?",
        ),
        ("--config.model_options.widths[0]=3", "0 is not a valid index"),
        (
            "--config.model_options.classes=many",
            "base 10: 'many'; LeNet300 takes classes=10 (int), widths=(300, 100) (t",
        ),
        ("--config.log_every=often", "--config.log_every=often: invalid literal for int() with base 10: 'often'"),
        ("--config=configs/mnits.py", "--config=configs/mnits.py: no such file; did you mean configs/mnist.py?"),
        ("--config=nowhere/mnist.py", f"no such file, and no config in {ROOT / 'nowhere'}"),
        ("--confog.steps=3", "Unknown command line flag 'confog.steps'"),
        ("typo", "unexpected argument 'typo'"),
    ],
)
def test_wrong_arguments_are_answered_with_the_nearest_right_ones(argument, message, parsed, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed(argument)
    assert message in capsys.readouterr().err


MODELS = [(name, own_options(getattr(models, name))) for name in models.__all__]


@pytest.mark.parametrize(("name", "options"), [pytest.param(*case, id=case[0]) for case in MODELS])
def test_every_option_of_every_model_can_be_set_on_the_command_line(name, options, parsed, capsys):
    other = {int: 3, float: 0.5, str: "bfloat16", tuple: (5, 4)}
    wanted = {
        option: not default if isinstance(default, bool) else other[type(default)]
        for option, default in options.items()
        if default is not inspect.Parameter.empty
    }
    assert wanted
    arguments = [f"--config.model_options.{option}={value}" for option, value in wanted.items()]
    assert parsed(*arguments, "--config.model", name).model_options.to_dict() == wanted
    assert mnist.get_config().model_options.to_dict() == {}, "what is not asked for is not in the config"
    with pytest.raises(SystemExit):
        parsed(f"--config.model={name}", "--config.model_options.colour=3")
    said = capsys.readouterr().err
    assert "no config key 'config.model_options.colour'" in said
    for option in wanted:
        assert f"{option}={options[option]!r} ({type(options[option]).__name__})" in said


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "model_options.width",
            3,
            "config.model='LeNet300' has no option 'width'; did you mean 'widths'? LeNet300 takes",
        ),
        (
            "model_options.widths",
            3,
            "config.model='LeNet300': widths=3 is of another type; LeNet300 takes classes=10 (int",
        ),
        ("model_options.widths", (3, "b"), "widths=(3, 'b') is of another type"),
        ("model_options.classes", True, "classes=True is of another type"),
        (
            "data.options.held",
            3,
            "config.data.name='mnist5k' has no option 'held'; did you mean 'held_out'? mnist5k takes",
        ),
        ("sparsifier.block", (4,), r"such as (8, 8); got (4,)"),
        ("sparsifier.name", "sequental_attention", "did you mean 'sequential_attention'"),
        ("data.name", "mnits", "config.data.name='mnits' is unknown; did you mean 'mnist'?"),
        ("model", "LeNet", "did you mean 'LeNet300'"),
        ("sparsifier.sparsity", 1.5, "got 1.5"),
        ("sparsifier.block", (400, 400), "fewer than 100 blocks"),
        ("steps", 10, "has no step"),
        ("steps", -1, "config.steps must be a finite number from 0, got -1"),
        ("batch_size", 5000, "config.batch_size=5000 exceeds the 4000 training examples"),
        ("eval_every", 0, "config.eval_every must be a finite number from 1, got 0"),
        ("optimizer.learning_rate", -0.1, "config.optimizer.learning_rate must be a finite number from 0, got -0.1"),
        ("optimizer.learning_rate", float("nan"), "learning_rate must be a finite number from 0, got nan"),
        ("optimizer.weight_decay", float("inf"), "weight_decay must be a finite number from 0, got inf"),
        ("optimizer.momentum", 1.0, "config.optimizer.momentum must be in [0, 1), got 1.0"),
    ],
)
def test_a_wrong_config_is_answered_in_a_sentence(key, value, message):
    c = mnist.get_config()
    c.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(
            c, sharding.make_mesh(devices=jax.devices()[:1]), None if key.startswith("data.") else problems.digits()
        )


@pytest.mark.parametrize("argument", ["--config.sparsifier.sparisty=0.5", "--config.sparsifier.sparsity=1.5"])
def test_bad_input_on_the_command_line_gives_no_traceback(argument):
    done = commands.run("experiments.main", argument)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("Cannot run: ")
    assert done.stdout == ""


def test_compare_from_the_command_line(tmp_path):
    done = commands.run(
        "experiments.compare",
        "--config.steps=60",
        "--algorithms=dense,random",
        "--seeds=2",
        f"--workdir={tmp_path}",
        "--together=no",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "compare.json").read_text())
    assert list(result["algorithms"]) == ["dense", "random"]
    assert all(len(row["metric"]) == 2 for row in result["algorithms"].values())
    assert "±" in done.stdout
    assert "Warning" not in done.stdout, "dense and random have one phase each"
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_a_comparison_survives_divergence(tmp_path):
    arguments = ["--config.steps=60", "--config.optimizer.learning_rate=1e9", "--algorithms=dense", "--seeds=2"]
    done = commands.run("experiments.compare", *arguments, f"--workdir={tmp_path}")
    assert done.returncode == 3, done.stderr
    assert json.loads((tmp_path / "compare.json").read_text())["algorithms"]["dense"]["diverged"] == [True, True]


def test_half_written_files_never_appear(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"loss": float("nan")})
    with pytest.raises(TypeError):
        files.write_json(path, {"loss": object()})

    def fails_midway(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, fails_midway)
    assert json.loads(path.read_text()) == {"loss": None}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
