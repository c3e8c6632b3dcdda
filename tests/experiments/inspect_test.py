"""The configs of the ImageNet experiment, without its data: plans, schedules, recipe, and how they are shown."""

import runpy

import commands
import jax
import numpy as np
import pytest

from configs import resnet50_block8
from experiments import data
from experiments.training import factories, sharding
from experiments.training.setup import prepare, prepare_without_data

pytestmark = pytest.mark.usefixtures("standard_promotion")
ROOT = commands.ROOT

# Pruned layers and sparsity of the whole network in percent, as Table 1 prints it.
TABLE_1 = {
    8: (53, ("70.00", "79.99", "89.99", "94.99")),
    16: (46, ("69.72", "79.67", "89.63", "94.61")),
    32: (35, ("68.12", "77.83", "87.56", "92.42")),
    64: (18, ("57.94", "66.18", "74.45", "78.58")),
}


def run(*arguments, **options):
    return commands.run("experiments.inspect", *arguments, **options)


@pytest.mark.parametrize("block", TABLE_1)
def test_inspect_shows_table_1(block):
    done = run(f"--config=configs/resnet50_block{block}.py", "--sparsities=0.7,0.8,0.9,0.95")
    assert done.returncode == 0, done.stderr
    pruned, sparsities = TABLE_1[block]
    rows = [line for line in done.stdout.splitlines() if "25,502,912" in line]
    assert len(rows) == 4
    for row, sparsity in zip(rows, sparsities, strict=True):
        assert [cell.strip() for cell in row.split("│")][2:7] == [
            *("25,557,032", "54", str(pruned), "25,502,912", f"{sparsity}%"),
        ]
        assert "4.089" in row


def test_inspect_shows_every_layer_and_phase():
    done = run("--config=configs/resnet50_block32.py", "--config.sparsifier.name=acdc")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stage") == 52
    assert "56,301 steps of 2048 examples" in done.stdout
    # 3 x 3 x 512 x 512 at 7 x 7 positions; 144 x 16 blocks, of which a tenth is kept.
    row = next(line for line in done.stdout.splitlines() if "stage4_block2/conv2" in line)
    for words in ("144×16", "230 of 2,304", "2,359,296", "115.61", "11.54", "90.02%"):
        assert words in row


def test_inspect_answers_bad_input_in_a_sentence():
    done = run("--config=configs/resnet50_block8.py", "--sparsities=0.9,1.2", real=True)
    assert done.returncode == 2
    assert "got 1.2" in done.stderr
    assert "Traceback" not in done.stderr


def setup(**changes):
    config = resnet50_block8.get_config()
    config.update_from_flattened_dict(changes)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return prepare(config, mesh, data.declared("imagenet", 224))


def test_recipe():
    s = setup()
    per_epoch = 1_281_167 / 2048
    assert (s.config.steps, s.config.optimizer.warmup_steps) == (round(90 * per_epoch), round(5 * per_epoch))
    warmup = s.config.optimizer.warmup_steps
    rates = [float(s.schedule(step)) for step in (0, warmup // 2, warmup, (warmup + 56_301) // 2, 56_301)]
    np.testing.assert_allclose(rates, [0, 0.8 * (warmup // 2) / warmup, 0.8, 0.4, 0], atol=1e-4)
    half = setup(batch_size=1024)
    assert float(half.schedule(half.config.optimizer.warmup_steps)) == pytest.approx(0.4)
    assert half.config.steps == round(180 * per_epoch)


def test_steps_go_before_epochs():
    s = setup(**{"steps": 1000, "optimizer.warmup_steps": 10})
    assert s.config.steps == 1000
    with pytest.raises(ValueError, match=r"config.steps, or else config.epochs, must be positive: got 0, 0"):
        setup(epochs=0.0)


@pytest.mark.parametrize("block", TABLE_1)
def test_every_cell_of_table_1_can_be_asked_for(block):
    """The network is the same in all cells of a block size: it is made once."""
    config = runpy.run_path(str(ROOT / f"configs/resnet50_block{block}.py"))["get_config"]()
    s = prepare_without_data(config)
    shapes = jax.eval_shape(s.task.init, jax.random.key(0))[0]
    for name in ("sequential_attention", "acdc", "magnitude", "powerpropagation", "dense"):
        for sparsity in (0.7, 0.8, 0.9, 0.95):
            config.sparsifier.update({"name": name, "sparsity": sparsity})
            plan = factories.sparsifier(config.sparsifier, s.config.steps).plan(shapes)
            assert len(plan.pruned) == (0 if name == "dense" else TABLE_1[block][0])
            assert name == "dense" or {layer.sparsity for layer in plan.pruned.values()} == {sparsity}


def test_the_ablations_can_be_asked_for():
    plain, without = setup(), setup(**{"sparsifier.sparsification": False})
    kinds = [[p.kind for p in s.sparsifier.phases.phases] for s in (plain, without)]
    assert "sparsification" in kinds[0]
    assert "sparsification" not in kinds[1]
    middles = []
    for exponent in (2.0, 4.0, 8.0):
        phases = setup(**{"sparsifier.exponent": exponent}).sparsifier.phases
        first = next(p for p in phases.phases if p.kind == "sparsification")
        middles.append(float(phases.fraction((first.start + first.stop) // 2)))
    want = [(1 - np.exp(-c / 2)) / (1 - np.exp(-c)) for c in (2, 4, 8)]
    np.testing.assert_allclose(middles, want, atol=2e-3)
