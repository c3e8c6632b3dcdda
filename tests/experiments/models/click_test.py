"""The click network, exact AUC, the planted problem, and the Criteo configs."""

import json
import runpy

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from real_data import FILES, needs
from sklearn.metrics import log_loss, roc_auc_score

from configs import planted as planted_config
from experiments import models, runs
from experiments.data.criteo.columns import Options
from experiments.data.criteo.prepare import prepare as prepare_log
from experiments.data.planted import found_and_covered, planted, teacher, true_logits
from experiments.outputs import progress
from experiments.training import evaluation, factories, loop, program, sharding
from experiments.training.setup import prepare

pytestmark = pytest.mark.usefixtures("standard_promotion")
SAMPLE = FILES / "criteo" / "criteo_head_10k.tsv.gz"


def test_auc_without_both_labels_or_finite_scores_is_not_a_number():
    assert evaluation.auc(np.array([0.1, 0.9, 0.4]), np.array([0, 1, 1])) == 1
    assert evaluation.auc(np.zeros(4), np.array([0, 1, 0, 1])) == 0.5
    assert np.isnan(evaluation.auc(np.arange(3.0), np.ones(3)))
    assert np.isnan(evaluation.auc(np.array([0.5, np.nan]), np.array([0, 1])))


@pytest.mark.parametrize("seeds", [(), (2,)])
def test_auc_over_batches_leaves_out_padding(seeds):
    rng = np.random.default_rng(0)
    scores, labels, weight = rng.random((*seeds, 3, 8)), rng.integers(0, 2, (*seeds, 3, 8)), np.ones((3, 8))
    weight[2, 5:] = 0
    labels[..., 0, :2] = 0, 1

    def evaluate(i):
        return {"weight": weight[i].sum()}, evaluation.Ranked(scores[..., i, :], labels[..., i, :], weight[i])

    got = evaluation.means(evaluate, range(3))["auc"]
    real = weight.ravel() > 0
    flat = [np.atleast_2d(x.reshape(*seeds, 24))[:, real] for x in (scores, labels)]
    assert got.tolist() == [roc_auc_score(y, s) for s, y in zip(*flat, strict=True)]


def test_forward_pass_against_numpy():
    vocabulary = (5, 3, 7)
    model = models.ClickNet(vocabulary, size=4, widths=(6, 5), table_scale=1.0)
    ids = np.stack([np.random.default_rng(i).integers(0, n, 8) for i, n in enumerate(vocabulary)], 1).astype(np.int32)
    params = model.init(jax.random.key(0), ids)["params"]
    tables = np.split(np.asarray(params["table"]["embedding"]), np.cumsum(vocabulary)[:-1])
    x = np.concatenate([table[column] for table, column in zip(tables, ids.T, strict=True)], axis=1)
    for name in ("hidden1", "hidden2"):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
    want = (x @ params["logit"]["kernel"] + params["logit"]["bias"])[:, 0]
    np.testing.assert_allclose(model.apply({"params": params}, ids), want, rtol=1e-5, atol=1e-6)
    half = models.ClickNet(vocabulary, size=4, widths=(6, 5), table_scale=1.0, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.init(jax.random.key(0), ids))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(half.apply({"params": params}, ids), want, atol=0.05 * np.abs(want).max())


@pytest.mark.parametrize("block", [5, 10, 20, 1])
def test_every_cell_of_table_2_prunes_the_first_layer_alone(block):
    config = runpy.run_path(str(commands.ROOT / f"configs/criteo_block{max(block, 5)}.py"))["get_config"]()
    config.sparsifier.block = (block, block)
    config.batch_size = config.eval_batch_size = 1000
    config.steps = 100
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    dataset = planted(rows=2000, held_out=100)
    setup = prepare(config, mesh, dataset)
    shapes = jax.eval_shape(setup.task.init, jax.random.key(0))[0]
    for name in ("magnitude", "powerpropagation", "acdc", "sequential_attention", "dense"):
        for sparsity in (0.9, 0.95, 0.97, 0.98, 0.99):
            config.sparsifier.update({"name": name, "sparsity": sparsity})
            plan = factories.sparsifier(config.sparsifier, 100).plan(shapes)
            assert list(plan.pruned) == ([] if name == "dense" else ["hidden1/kernel"])
            assert sum(layer.is_kernel for layer in plan.leaves) == 4, "the table is no kernel"
    rates = [float(setup.schedule(step)) for step in (0, 50, 100)]
    np.testing.assert_allclose(rates, [2e-2, np.sqrt(2e-2 * 3e-4), 3e-4], rtol=1e-4)


def test_planted_data_are_what_they_are_said_to_be():
    dataset, network = planted(rows=60_000, held_out=20_000), teacher()
    ids, label = dataset.train.arrays["ids"], dataset.train.arrays["label"]
    assert (ids.shape, ids.dtype, label.dtype) == ((60_000, 39), np.int32, np.uint8)
    assert abs(label.mean() - 0.25) < 0.01
    kernel = network.kernel.reshape(39, 10, 40, 10).any(axis=(1, 3))
    assert set(np.flatnonzero(kernel.any(axis=1))) == set(network.features.tolist())
    assert 0.1 < kernel[network.features].mean() < 0.4
    logits = true_logits(network, ids)
    assert np.std(logits) == pytest.approx(2, rel=0.05)
    # Of the rows with logits around z, the share of clicks is 1 / (1 + exp(-z)).
    for low in (-3, -2, -1, 0, 1):
        chosen = (logits >= low) & (logits < low + 1)
        assert label[chosen].mean() == pytest.approx(np.mean(1 / (1 + np.exp(-logits[chosen]))), abs=0.02)
    counts = np.sort(np.bincount(ids[:, 0], minlength=200)[1:])[::-1]
    slope = np.polyfit(np.log(np.arange(1, 51)), np.log(counts[:50]), 1)[0]
    assert -1.5 < slope < -0.7, "Zipf's law"
    missing = (ids == 0).mean(axis=0)
    assert 0.3 < missing.max() < 0.41
    again = planted(rows=60_000, held_out=20_000)
    np.testing.assert_array_equal(again.test.arrays["ids"], dataset.test.arrays["ids"])
    with pytest.raises(ValueError, match="informative must be in"):
        planted(rows=10, held_out=10, informative=40)


def test_found_and_covered_counts_blocks_on_planted_rows():
    kernel = np.zeros((390, 400), np.float32)
    kernel[70:80, :20] = 1  # feature 7: two blocks of ten
    kernel[200:210, 30:40] = 1  # feature 20: one
    assert found_and_covered(kernel, 10, np.array([7, 8])) == (pytest.approx(2 / 3), 0.5, pytest.approx(2 / 39))
    assert found_and_covered(kernel, 20, np.array([7])) == (0.5, 1.0, pytest.approx(1 / 20))


def small():
    config = planted_config.get_config()
    config.data.options.update({"rows": 20_000, "held_out": 3_000})
    config.steps, config.log_every, config.eval_every, config.checkpoint_every = 60, 10, 30, 60
    config.eval_batch_size = 512  # so that the last batch is padded
    return config


def test_a_run_reports_loss_auc_and_calibration(tmp_path):
    config = small()
    runs.run(prepare(config), tmp_path, progress.console())
    result = json.loads((tmp_path / "result.json").read_text())
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (result["metric_name"], result["metric"]) == ("test_auc", last["test_auc"])
    assert 0.55 < result["metric"] < 0.9
    assert [row["path"] for row in result["layers"] if not row["skip_reason"]] == ["hidden1/kernel"]


@pytest.mark.long
def test_metrics_of_seeds_side_by_side_against_scikit_learn():
    config = small()
    run = program.compiled(prepare(config, sharding.make_mesh(devices=jax.devices()[:4])), 2)
    test = run.setup.task.dataset.test.arrays
    for outcome in loop.train(run, [0, 1]):
        logits = np.asarray(run.setup.task.model.apply({"params": outcome.params}, test["ids"]), np.float64)
        chance = 1 / (1 + np.exp(-logits))
        assert outcome.test["test_auc"] == pytest.approx(roc_auc_score(test["label"], chance), abs=1e-4)
        assert outcome.test["test_loss"] == pytest.approx(log_loss(test["label"], chance), abs=1e-5)
        assert outcome.test["test_calibration"] == pytest.approx(chance.mean() / test["label"].mean(), abs=1e-5)


@pytest.mark.long
@needs(SAMPLE)
def test_real_rows_from_the_log_to_the_validation_loss(tmp_path):
    """A logistic regression on hashed features reaches an AUC of 0.735 on the last fifth of these rows."""
    options = Options(
        train=0.8, validation=0.19, test=0.01, order="chronological", minimum_count=20, numeric_minimum_count=20
    )
    prepare_log(SAMPLE, tmp_path / "rows", options)
    both = [
        "--config=configs/criteo_sample.py",
        f"--config.data.local={tmp_path / 'rows'}",
        "--config.dense_twin=False",
    ]
    both += ["--config.eval_batch_size=512", "--config.eval_every=1000", "--config.checkpoint_every=1000"]
    for name, least in (("dense", 0.725), ("sequential_attention", 0.65)):
        own = [f"--config.sparsifier.name={name}", f"--workdir={tmp_path / name}"]
        done = commands.run("experiments.main", *both, *own, long=True)
        assert done.returncode == 0, done.output
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["metric"] > least
        assert result["loss"] < 0.51
