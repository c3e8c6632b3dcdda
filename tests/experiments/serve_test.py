"""The serving benchmark, on small networks."""

import json

import commands
import matplotlib.image
import pytest

from configs import cifar10_resnet20
from experiments import runs
from experiments.outputs import progress
from experiments.training.setup import prepare


def serve(*flags, **options):
    return commands.run("experiments.serve_bench", "--rounds=2", "--engines=", *flags, **options)


def assert_sane(row):
    """What holds of any measurement, however fast the machine."""
    assert row["relative_error"] < 1e-5
    assert row["folded_error"] < 1e-5
    assert 0 <= row["sparse_layers"] <= row["layers"]
    assert min(row["model_ms"], row["folded_ms"], row["sparse_ms"]) > 0
    for ratio in (row["model_to_sparse"], row["folded_to_sparse"]):
        assert 0 < ratio["q25"] <= ratio["median"] <= ratio["q75"]


@pytest.mark.long
def test_every_block_size_and_sparsity_without_data(tmp_path):
    done = serve("--blocks=4,8", "--sparsities=0.9,0.95", "--batches=2", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "serve.json").read_text())["rows"]
    assert [(row["block"], row["sparsity"]) for row in rows] == [(4, 0.9), (4, 0.95), (8, 0.9), (8, 0.95)]
    for row in rows:
        assert_sane(row)
        assert row["layers"] == 3
    text = (tmp_path / "layers.txt").read_text()
    assert "blocks 8, sparsity 95%, batch 2" in text
    assert "784×300" in text
    assert matplotlib.image.imread(tmp_path / "serve.png").shape[2] == 4


@pytest.mark.long
@pytest.mark.usefixtures("standard_promotion")
def test_a_trained_network_with_batch_normalisation_serves_as_it_was_tested(tmp_path):
    config = cifar10_resnet20.get_config()
    config.data.name, config.data.options, config.data.local = "mnist5k", {}, ""
    config.data.mean, config.data.std = (), ()
    config.steps, config.batch_size, config.eval_batch_size = 8, 16, 1000
    config.optimizer.warmup_steps = 1
    config.model_options.update({"width": 8, "stages": (1, 1, 1)})
    config.dense_twin, config.sparsifier.min_blocks = False, 12
    config.sparsifier.schedule = (("dense", 4), ("sparse", 4))
    runs.run(prepare(config), tmp_path / "run", progress.console())
    lines = [
        "import ml_collections",
        "def get_config():",
        f"    return ml_collections.ConfigDict({config.to_dict()!r})",
    ]
    (tmp_path / "config.py").write_text("\n".join(lines))
    flags = [f"--config={tmp_path}/config.py", f"--weights={tmp_path}/run/pruned.safetensors", "--batches=2"]
    done = serve(*flags, f"--output={tmp_path}/serve", real=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "serve/serve.json").read_text())["rows"]
    assert_sane(row)
    assert not (tmp_path / "serve/serve.png").exists()


def test_a_click_network_is_asked_for_all_of_its_vocabulary(tmp_path):
    small = ["--config=configs/planted.py", "--config.data.options.rows=3000", "--config.data.options.held_out=100"]
    done = serve(
        *small,
        "--engines=onnxruntime,openvino",
        "--blocks=10",
        "--sparsities=0.9",
        "--batches=64",
        f"--output={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "serve.json").read_text())["rows"]
    assert_sane(row)
    assert {*row["engines_ms"], *row["engines_missing"]} == {"onnxruntime float32", "openvino float32"}
    assert row["fastest_engine"] in {*row["engines_ms"], None}
    # In a process of its own, as in all of these tests: its flags have the names of other programs'.
    (tmp_path / "ids.py").write_text(_IDS)
    done = commands.run(tmp_path / "ids.py")
    assert done.returncode == 0, done.stderr


_IDS = """
import numpy as np
from configs import planted
from experiments import serve_bench, tasks
from experiments.training.setup import prepare_without_data
config = planted.get_config()
config.data.options.update({"rows": 3000, "held_out": 100})
setup = prepare_without_data(config)
ids, vocabulary = tasks.random_inputs(setup.task, 4096), np.array(setup.task.dataset.vocabulary)
assert ids.shape == (4096, len(vocabulary)) and ids.dtype == np.int32
assert (ids.min(0) == 0).all() and (ids.max(0) == vocabulary - 1).all(), (ids.min(0), ids.max(0), vocabulary)
"""


def test_both_contenders_are_compared_with_the_model(tmp_path):
    (tmp_path / "compared.py").write_text(_COMPARED)
    done = commands.run(tmp_path / "compared.py")
    assert done.returncode == 0, done.stderr


_COMPARED = """
import types
import jax, jax.numpy as jnp, numpy as np, pytest
from absl import flags
import sa_plus_plus as sapp
from configs import mnist
from experiments import serve_bench
from experiments.training.setup import prepare_without_data
from experiments.utils import timing
flags.FLAGS(["x", "--rounds=1", "--engines="])
specialize, setup = sapp.specialize, prepare_without_data(mnist.get_config())
params, _ = setup.task.init(jax.random.key(0))
for wrong in ("folded", "sparse"):
    def twisted(apply, x, mode="autotune", wrong=wrong):
        right = specialize(apply, x, mode="never")
        return (lambda x: right(x) * 1.01) if (mode == "never") == (wrong == "folded") else right
    sapp.specialize = twisted
    with pytest.raises(RuntimeError, match=f"results of '{wrong}' are 1.0e-02 of the largest output away"):
        serve_bench.measure(setup, {"params": params}, 2)
sapp.specialize = specialize
row, _ = serve_bench.measure(setup, {"params": jax.tree.map(jnp.zeros_like, params)}, 2)
assert row["relative_error"] == row["folded_error"] == 0
with pytest.raises(RuntimeError, match="the model's own results are not finite"):
    serve_bench.measure(setup, {"params": jax.tree.map(lambda a: a + jnp.nan, params)}, 2)
assert timing.difference(np.ones(2), np.zeros(2)) == 1
assert timing.difference([4.0, 2.0], [4.0, 1.0]) == 0.25
assert not timing.difference([np.nan], [1.0]) < 1
"""


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--rounds=0", "--rounds must be in [1, "),
        ("--batches=", "--batches is empty: give numbers with commas between them"),
        ("--blocks=8,abc", "--blocks has 'abc', which is not an integer"),
        ("--weights=/tmp", "/tmp is a directory or device, not a file"),
        ("--weights=a --blocks=8", "--blocks is for networks of random blocks, but --weights gives one"),
        (
            "--config=configs/cifar10_resnet20.py --config.model_options.dtype=float16",
            "config.model_options.dtype must be one of float32, bfloat16 to compare results, got 'float16'",
        ),
        ("--sparsities=1.5", "--sparsities must be in [0, 1), got 1.5"),
        ("--blocks=900", "nothing to prune"),
        ("--engines=onnx", "--engines='onnx' is unknown; did you mean 'onnxruntime'?"),
    ],
)
def test_bad_requests_are_answered_in_a_sentence(tmp_path, flag, message):
    done = serve(*flag.split(), f"--output={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
