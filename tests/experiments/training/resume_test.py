"""A run killed at any moment and started again ends as one that never was; SIGTERM saves; directories are guarded."""

import json
import shutil
import signal
import subprocess
import time

import commands
import problems
import pytest

import sa_plus_plus as sapp

STEPS = 120
FLAGS = [
    f"--config.steps={STEPS}",
    "--config.log_every=3",
    "--config.eval_every=20",
    "--config.checkpoint_every=7",
    "--config.dense_twin=False",
]


def start(workdir, *flags, when=None):
    what = ["tests/killed.py", when] if when else ["experiments.main"]
    return commands.Command(*what, *FLAGS, f"--workdir={workdir}", *flags)


def run(*arguments, **options):
    return start(*arguments, **options).finish()


def outcome(workdir):
    result = json.loads((workdir / "result.json").read_text())
    weights = problems.weights_of(workdir / "pruned.safetensors")
    kept = {k: result[k] for k in ("metric", "loss", "real_sparsity", "steps", "layers")}
    return (workdir / "metrics.jsonl").read_bytes(), {k: v.tobytes() for k, v in weights.items()}, kept


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("resume") / "whole"
    done = run(workdir)
    assert done.returncode == 0, done.output
    return workdir


@pytest.mark.long
def test_killed_again_and_again_ends_bit_for_bit_the_same(uninterrupted):
    """One run, killed at moments of every kind; `tests/fuzz/campaign_kills.py` kills many at random ones."""
    starts = [p.start for p in sapp.phases.sequential_attention(STEPS).phases[1:]]
    first, evaluation, last = 1, 20, STEPS
    checkpoint = 7
    instants = [
        first,
        "0.000s",
        checkpoint,
        checkpoint + 1,
        evaluation,
        "0.110s",
        starts[1],
        starts[-1],
        last,
    ]
    workdir = uninterrupted.parent / "killed"
    for when in instants:
        done = run(workdir, when=when)
        assert done.returncode == -signal.SIGKILL, done.output
    done = run(workdir)
    assert done.returncode == 0, done.output
    assert outcome(workdir) == outcome(uninterrupted)


@pytest.mark.long
def test_sigterm_saves_and_exits_with_its_own_status(uninterrupted):
    workdir = uninterrupted.parent / "terminated"
    done = run(workdir, when="term:50")
    assert done.returncode == 4, done.output
    assert "Saved after 50 steps" in done.output
    done = run(workdir)
    assert done.returncode == 0, done.output
    assert outcome(workdir) == outcome(uninterrupted)
    again = run(workdir)
    assert again.returncode == 0, "done already"
    assert "test_accuracy" in again.output
    assert outcome(workdir) == outcome(uninterrupted)


@pytest.mark.long
def test_another_config_is_refused_with_the_differing_keys_unless_asked(uninterrupted):
    done = run(uninterrupted, "--config.optimizer.learning_rate=0.05", "--config.seed=3", "--config.max_to_keep=5")
    assert done.returncode == 2
    assert "config.optimizer.learning_rate: 0.2 there, 0.05 now" in done.output
    assert "config.seed: 0 there, 3 now" in done.output
    assert "keep:" not in done.output
    workdir = uninterrupted.parent / "changed"
    assert run(workdir, when="40").returncode == -signal.SIGKILL
    done = run(workdir, "--config.optimizer.learning_rate=0.05", "--resume_changed")
    assert done.returncode == 0, done.output
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert rows[:5] == whole[:5]
    assert rows[-1] != whole[-1]


def test_second_process_on_a_directory_is_refused(tmp_path):
    first = start(tmp_path / "run", "--config.steps=100000")
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.2)
        second = run(tmp_path / "run", "--config.steps=100000")
        assert second.returncode == 2
        assert f"in use by process {first.pid}" in second.output
        assert first.running()
    finally:
        first.kill()
        first.finish()


def test_divergence_names_the_place_and_keeps_the_good_checkpoint(tmp_path):
    done = run(tmp_path, "--config.optimizer.learning_rate=3e4", "--config.checkpoint_every=1")
    assert done.returncode == 3, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    at = result["diverged_at"]
    assert result["diverged"] is True
    assert at["train_loss"] is None
    assert at["last_checkpoint"] == at["step"] - 1
    for words in (f"after step {at['step']}", "in a dense phase", "learning rate 3e+04", "last good checkpoint: step"):
        assert words in " ".join(done.output.split())


def test_unwritable_work_directory(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = run(blocked / "run")
    assert done.returncode == 2
    assert str(blocked) in done.output
    assert "Traceback" not in done.output


@pytest.mark.long
def test_full_disk_stops_the_run_and_loses_nothing(uninterrupted, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount file systems here")
    try:
        done = run(disk / "run", when="full:58")  # a row is due at 60, a checkpoint at 63
        assert done.returncode == 5, done.output
        assert "No space left on device" in done.output
        assert "resumes from the last checkpoint" in done.output
        assert not (disk / "run" / "result.json").exists()
        (disk / "run" / "filler").unlink()
        done = run(disk / "run")
        assert done.returncode == 0, done.output
        assert outcome(disk / "run") == outcome(uninterrupted)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.long
def test_profile_writes_a_trace(tmp_path):
    done = run(tmp_path, "--profile")
    assert done.returncode == 0, done.output
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
