"""One device, eight, parameters split or not, one process or two: the same losses and the same masks."""

import json
import socket

import commands
import jax
import numpy as np
import problems
import pytest

import sa_plus_plus as sapp
from configs import mnist
from experiments.training import loop, program, sharding
from experiments.training.setup import prepare

pytestmark = pytest.mark.usefixtures("standard_promotion")


def config(name="sequential_attention", fsdp=1):
    result = mnist.get_config()
    result.steps, result.eval_every, result.log_every, result.dense_twin = 30, 15, 1, False
    result.batch_size, result.eval_batch_size, result.mesh.fsdp = 96, 400, fsdp
    result.sparsifier.name = name
    result.sparsifier.block = (7, 10)  # few blocks: the tests' programs are not optimised, and sort slowly
    return result


def trained(c, devices):
    mesh = sharding.make_mesh(c.mesh.fsdp, jax.devices()[:devices])
    masks = []

    def keep(step, state):
        masks.append(jax.tree.map(np.asarray, state.prune.masks))

    (outcome,) = loop.train(program.compiled(prepare(c, mesh, problems.digits())), [0], loop.Hooks(on_state=keep))
    return outcome, masks


@pytest.mark.parametrize(("name", "fsdp"), [("sequential_attention", 4), ("acdc", 1)])
def test_eight_devices_equal_one(name, fsdp):
    one, masks = trained(config(name), 1)
    many, many_masks = trained(config(name, fsdp), 8)
    for a, b in zip(one.rows, many.rows, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    for a, b in zip(masks, many_masks, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert one.test == pytest.approx(many.test, abs=1e-5)


def test_units_that_are_split_over_devices_are_reordered():
    c = config("gradual_magnitude", 4)
    c.sparsifier.schedule = (("dense", 10), ("sparsification", 10), ("sparse", 10))
    plain, _ = trained(c, 8)
    c.sparsifier.reorder = ("sparsification",)
    outcome, _ = trained(c, 8)
    (found,) = outcome.reorderings
    assert found.step == 10
    assert all(after >= before for before, after, _ in found.shares.values())
    for a, b in zip(outcome.rows[:11], plain.rows, strict=False):  # that of step 11 has the loss before the step
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    sapp.check_pruned(outcome.params, outcome.plan)


def test_fsdp_splits_parameters_logits_and_moments():
    c = config(fsdp=4)
    run = program.compiled(prepare(c, sharding.make_mesh(4), problems.digits()))
    state = run.functions.init(np.int32(0))
    batch = program.next_batch(run, program.train_streams(run, [0]))
    state, _ = run.functions.step(state, batch)
    kernel = state.trainable.params["Dense_0"]["kernel"]
    logits = state.trainable.logits["Dense_0/kernel"]
    momentum = next(x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape)
    for x in (kernel, logits, momentum):
        assert x.addressable_shards[0].data.size == x.size // 4


def test_batches_that_do_not_divide_are_refused():
    c = config()
    c.batch_size = 100
    with pytest.raises(ValueError, match=r"config.batch_size=100 is not a multiple of the 8 devices"):
        prepare(c, dataset=problems.digits())
    with pytest.raises(ValueError, match=r"config.mesh.fsdp=3 does not divide the number of devices, 8"):
        sharding.make_mesh(3)


FLAGS = [
    *("--config.steps=40", "--config.batch_size=96", "--config.eval_batch_size=400", "--config.log_every=1"),
    *("--config.eval_every=20", "--config.checkpoint_every=25", "--config.dense_twin=False"),
]


def start(workdir, devices, *flags):
    return commands.Command("experiments.main", *FLAGS, f"--workdir={workdir}", *flags, devices=devices)


def finish(*processes):
    for process in processes:
        done = process.finish()
        assert done.returncode == 0, done.output


def rows_and_masks(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    weights = problems.weights_of(workdir / "pruned.safetensors")
    return rows, {path: w != 0 for path, w in weights.items() if w.ndim == 2}


def two_processes(workdir, *flags):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator_address=localhost:{free.getsockname()[1]}"
    hosts = ["--distributed", address, "--num_processes=2"]
    return [start(workdir, 2, *hosts, f"--process_id={i}", *flags) for i in range(2)]


@pytest.mark.long
def test_two_processes_equal_one_and_checkpoints_move_between_them(tmp_path):
    finish(start(tmp_path / "one", 4))
    finish(*two_processes(tmp_path / "two", "--config.mesh.fsdp=2", "--resume_changed"))
    for refused in two_processes(tmp_path / "two"):  # process 0 looks for both
        assert "holds a run with another config" in refused.finish().output
    rows, masks = rows_and_masks(tmp_path / "one")
    two_rows, two_masks = rows_and_masks(tmp_path / "two")
    for a, b in zip(rows, two_rows, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    jax.tree.map(np.testing.assert_array_equal, masks, two_masks)
    for written, read in (("one", "two"), ("two", "one")):  # go on from the other's last checkpoint
        workdir = tmp_path / written
        (workdir / "result.json").unlink()
        (workdir / "metrics.jsonl").write_text("")
        flags = ["--config.steps=40", "--resume_changed"]
        finish(*two_processes(workdir, *flags) if read == "two" else [start(workdir, 1, *flags)])
        _, again = rows_and_masks(workdir)
        jax.tree.map(np.testing.assert_array_equal, masks, again)
