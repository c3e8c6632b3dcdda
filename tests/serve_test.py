"""The serving benchmark, on small networks."""

import json
import os
import pathlib
import subprocess
import sys

import matplotlib.image
import pytest

from configs import cifar10_resnet20
from experiments import main, progress

ROOT = pathlib.Path(__file__).resolve().parent.parent


def serve(*flags):
    line = [sys.executable, "-m", "experiments.serve_bench", "--rounds=2", *flags]
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_every_block_size_and_sparsity_without_data(tmp_path):
    done = serve("--blocks=4,8", "--sparsities=0.9,0.95", "--batches=2", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "serve.json").read_text())["rows"]
    assert [(row["block"], row["sparsity"]) for row in rows] == [(4, 0.9), (4, 0.95), (8, 0.9), (8, 0.95)]
    for row in rows:
        assert row["relative_error"] < 1e-5
        assert row["layers"] == 3
        assert row["model_to_sparse"]["median"] == pytest.approx(row["model_ms"] / row["sparse_ms"], rel=0.5)
    text = (tmp_path / "layers.txt").read_text()
    assert "blocks 8, sparsity 95%, batch 2" in text
    assert "784×300" in text
    assert matplotlib.image.imread(tmp_path / "serve.png").shape[2] == 4


@pytest.mark.usefixtures("standard_promotion")
def test_a_trained_network_with_batch_normalisation_serves_as_it_was_tested(tmp_path):
    config = cifar10_resnet20.get_config()
    config.data.name, config.data.options, config.data.local = "mnist5k", {}, ""
    config.data.mean, config.data.std = (), ()
    config.steps, config.batch_size, config.eval_batch_size = 8, 16, 1000
    config.optimizer.warmup_steps = 1
    config.model_options.width, config.dense_twin = 8, False
    config.sparsifier.schedule = (("dense", 4), ("sparse", 4))
    main.run(config, tmp_path / "run", progress.console())
    lines = [
        "import ml_collections",
        "def get_config():",
        f"    return ml_collections.ConfigDict({config.to_dict()!r})",
    ]
    (tmp_path / "config.py").write_text("\n".join(lines))
    flags = [f"--config={tmp_path}/config.py", f"--weights={tmp_path}/run/pruned.safetensors", "--batches=2"]
    done = serve(*flags, f"--output={tmp_path}/serve")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "serve/serve.json").read_text())["rows"]
    assert row["relative_error"] < 1e-5
    assert not (tmp_path / "serve/serve.png").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sparsities=1.5", "--sparsities must be in [0, 1), got 1.5"),
        ("--batches=0", "--batches must be in [1, "),
        ("--blocks=900", "nothing to prune"),
        ("--weights=/nowhere/pruned.safetensors", "there is no file /nowhere/pruned.safetensors"),
    ],
)
def test_bad_requests_are_answered_in_a_sentence(tmp_path, flag, message):
    done = serve(flag, f"--output={tmp_path}")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
