"""Checkpoints: what comes back is what was saved, on any devices; what is damaged is named and passed over."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import commands
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sa_plus_plus as sapp
from experiments.training import checkpoint, sharding

ROOT = commands.ROOT


class State(NamedTuple):
    trainable: sapp.Trainable
    prune: sapp.PruneState
    opt_state: optax.OptState
    others: Any


def training_state():
    """All kinds of nodes and types that a run has, and values and keys that are easily lost."""
    floats = np.array([0x7FC00123, 0xFF800000, 0x80000000, 0x00000001, 0x3F800000], np.uint32)  # NaN with payload, ...
    thirds = jnp.ones((3, 4), jnp.bfloat16) / 3
    params = {"a/b": {"c.d": jnp.asarray(floats.view(np.float32))}, "a": {"b": thirds, "c": [{7: thirds[0]}, {}]}}
    trainable = sapp.Trainable(params, {"a.b": jnp.full((2, 2), -0.0)})
    prune = sapp.PruneState(jnp.int32(2**31 - 1), jnp.array(True), {"a.b": jnp.array([[True, False]])})
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.trace(0.9), optax.scale_by_learning_rate(lambda n: n * 0.1))
    others = (None, {"half": jnp.float16(1.5), "bytes": jnp.arange(256, dtype=jnp.uint8)}, [jnp.int8(-128)])
    return State(trainable, prune, tx.init(trainable), others)


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def small(step):
    return {"w": jnp.arange(1000.0) + step, "step": jnp.int32(step)}


def save(directory, *steps, **options):
    with contextlib.closing(checkpoint.Checkpoints(directory, **options)) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step), {"at": step})


def restore(directory):
    return checkpoint.restore(directory, abstract(small(0)))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def contents(directory):
    return {str(p.relative_to(directory)): p.is_file() and p.read_bytes() for p in directory.rglob("*")}


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save(directory, 100, 200)
    return directory


@pytest.fixture
def two(saved, tmp_path):
    """A directory of its own for the test with checkpoints 100 and 200."""
    shutil.copytree(saved, tmp_path / "two")
    return tmp_path / "two"


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount file systems here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_state_and_host_come_back_bit_by_bit_without_talking_to_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding.multihost_utils, "broadcast_one_to_all", None)
    state, host = training_state(), {"data": {"epoch": 3, "order": [1, 2]}, "loss": 0.1, "name": "é"}
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "new" / "er")) as checkpoints:
        assert checkpoints.restore(abstract(state)) is None
        checkpoints.save(12, state, host, metric=0.5)
        restored = checkpoints.restore(abstract(state))
    assert (restored.step, restored.host) == (12, host)
    assert_same(restored.state, state)
    assert_same(checkpoint.restore(tmp_path / "new" / "er", abstract(state)).state, state)
    assert checkpoint.restore(tmp_path / "nowhere", abstract(state)) is None


def test_a_real_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    sp, step = problems.algorithm("sequential_attention")
    run = problems.start(sp, problems.network())
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        for n in range(20):
            if n == 12:
                checkpoints.save(n, run, {})
            run = step(run, problems.batch(n))
    again = checkpoint.restore(tmp_path, abstract(run)).state
    for n in range(12, 20):
        again = step(again, problems.batch(n))
    assert_same(again, run)


@pytest.mark.parametrize(("before", "after"), [((8,), (1,)), ((1,), (8,)), ((8,), (2, 4)), ((2,), (8,))])
def test_other_devices(tmp_path, before, after):
    def sharding(shape):
        mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], devices=jax.devices()[: np.prod(shape)])
        return NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec(None, *mesh.axis_names[-1:]))

    rows, columns = sharding(before)
    values = {"rows": jnp.arange(64.0).reshape(8, 8), "columns": jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)}
    state = {"rows": jax.device_put(values["rows"], rows), "columns": jax.device_put(values["columns"], columns)}
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state, {})
    asked = dict(zip(("rows", "columns"), sharding(after), strict=True))
    restored = checkpoint.restore(tmp_path, {name: abstract(values[name], asked[name]) for name in values}).state
    assert_same(restored, values)
    for name, array in restored.items():
        assert array.sharding == asked[name]
        assert len(array.sharding.device_set) == np.prod(after)


def largest(folder):
    return max(files(folder), key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def manifest_of(content):
    return lambda d: (d / "200/manifest.json").write_bytes(content)


def without(*keys):
    def write(d):
        manifest = json.loads((d / "200/manifest.json").read_bytes())
        inner = manifest
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        (d / "200/manifest.json").write_text(json.dumps(manifest))

    return write


# What happens to a directory with checkpoints 100 and 200, which step is then the newest intact one, what is passed
# over, and words of the reason.
DAMAGE = {
    "truncated array": (lambda d: truncate(largest(d / "200")), 100, "200", "bytes instead of"),
    "emptied array": (lambda d: os.truncate(largest(d / "200"), 0), 100, "200", "0 bytes instead of"),
    "no manifest": (lambda d: (d / "200/manifest.json").unlink(), 100, "200", "no manifest.json"),
    "truncated manifest": (lambda d: truncate(d / "200/manifest.json"), 100, "200", "manifest.json is damaged"),
    "manifest empty": (manifest_of(b""), 100, "200", "manifest.json is damaged"),
    "manifest of bytes": (manifest_of(bytes(range(256))), 100, "200", "manifest.json is damaged"),
    "manifest a list": (manifest_of(b"[1]"), 100, "200", "manifest.json is damaged"),
    "manifest of no files": (manifest_of(b'{"files": {}}'), 100, "200", "manifest.json does not list host.json"),
    "manifest of odd files": (manifest_of(b'{"files": {"host.json": 1}}'), 100, "200", "manifest.json is damaged"),
    "manifest without sum": (without("files", "host.json", "sha256"), 100, "200", "manifest.json is damaged"),
    "emptied directory": (lambda d: shutil.rmtree(d / "200") or (d / "200").mkdir(), 100, "200", "empty directory"),
    "extra empty directory": (lambda d: (d / "300").mkdir(), 200, "300", "empty directory"),
    "extra directory": (lambda d: (d / "300" / "d").mkdir(parents=True), 200, "300", "no manifest.json"),
    "a file": (lambda d: (d / "300").write_text("?"), 200, "300", "Not a directory"),
    "a copy": (lambda d: shutil.copytree(d / "200", d / "300"), 200, "300", "copy of step 200"),
    "killed before the manifest": (
        lambda d: shutil.copytree(d / "200", d / "300.unfinished", ignore=lambda *_: ["manifest.json"]),
        200,
        "300.unfinished",
        "never completed",
    ),
    "killed before the rename": (lambda d: (d / "200").rename(d / "200.unfinished"), 100, "200.unfinished", "never"),
    "killed while orbax wrote": (
        lambda d: (d / "300.unfinished.orbax-checkpoint-tmp" / "d").mkdir(parents=True),
        200,
        "300.unfinished.orbax-checkpoint-tmp",
        "never completed",
    ),
}


@pytest.mark.parametrize(("harm", "step", "name", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_passed_over_and_a_new_save_has_room(two, caplog, harm, step, name, reason):
    harm(two)
    before = contents(two)
    restored = restore(two)
    assert (restored.step, restored.host) == (step, {"at": step})
    assert_same(restored.state, small(step))
    (warning,) = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert f"{two / name} passed over" in warning
    assert reason in warning
    assert contents(two) == before
    with contextlib.closing(checkpoint.Checkpoints(two, max_to_keep=2)) as checkpoints:
        checkpoints.restore(abstract(small(0)))
        checkpoints.save(step + 100, small(5), {})
    assert restore(two).step == step + 100
    assert_same(restore(two).state, small(5))
    if name.isdigit():  # it is where it was said to be, every byte of it
        assert f"moved aside to {name}.damaged-0" in caplog.text
        aside = two / f"{name}.damaged-0"
        kept = contents(aside) if aside.is_dir() else {}
        assert kept == {k.removeprefix(f"{name}/"): v for k, v in before.items() if k.startswith(f"{name}/")}
        assert aside.exists()
    else:
        assert not (two / name).exists()


def test_each_file_flipped_or_gone(two, caplog):
    paths = files(two / "200")
    assert len(paths) > 8
    for path in paths:
        name, content = str(path.relative_to(two / "200")), path.read_bytes()
        for harm in (flip, pathlib.Path.unlink):
            caplog.clear()
            harm(path)
            assert restore(two).step == 100, (name, harm)
            assert name in caplog.text
            path.write_bytes(content)
    assert restore(two).step == 200


def test_bytes_of_the_manifest_flipped(two, monkeypatch):
    monkeypatch.setattr(checkpoint, "sha256", functools.cache(checkpoint.sha256))  # the others stay as they are
    path = two / "200/manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 5):
        flip(path, position)
        assert checkpoint.damage(two / "200"), position
        path.write_bytes(content)
    assert checkpoint.damage(two / "200") is None


def test_damaged_twice_at_the_same_step_and_at_a_step_to_come(two):
    for n in range(2):
        flip(largest(two / "200"))
        damaged = contents(two / "200")
        save(two, 200)
        assert contents(two / f"200.damaged-{n}") == damaged
    flip(largest(two / "200"))
    save(two, 150, max_to_keep=1)  # must not take the damaged 200 for the newest, and itself for superseded
    assert restore(two).step == 150
    assert names(two) == ["150", "200.damaged-0", "200.damaged-1", "200.damaged-2"]


def test_none_intact_is_an_error_that_names_all_and_deletes_nothing(two):
    flip(largest(two / "100"))
    (two / "200/host.json").unlink()
    (two / "300").mkdir()
    before = contents(two)
    with pytest.raises(checkpoint.NoIntactCheckpoint, match="nothing was deleted") as error:
        restore(two)
    for words in ("100: .* SHA-256 sum differs", "200: host.json is missing", "300: empty directory", str(two)):
        error.match(words)
    assert contents(two) == before


def test_killed_in_the_first_save_is_no_checkpoint_rather_than_an_error(two, caplog):
    shutil.rmtree(two / "100")
    (two / "200").rename(two / "200.unfinished")
    assert restore(two) is None
    assert "200.unfinished passed over" in caplog.text


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"w": jnp.zeros(999), "step": jnp.int32(0)}, r"state\['w'\]: asked for float32\[999\], saved float32\[1000\]"),
        ({"w": jnp.zeros(1000, jnp.bfloat16), "step": jnp.int32(0)}, r"asked for bfloat16\[1000\], saved float32"),
        ({"w": jnp.zeros(1000)}, r"state\['step'\]: asked for none, saved int32\[\]"),
        (small(0) | {"v": jnp.ones(1)}, r"state\['v'\]: asked for float32\[1\], saved none"),
        ({"w": (jnp.zeros(1000),), "step": jnp.int32(0)}, r"state\['w'\]\[0\]: asked for float32\[1000\], saved none"),
    ],
)
def test_another_structure_is_an_error_and_not_damage(two, asked, words, caplog):
    with pytest.raises(ValueError, match=words) as error:
        checkpoint.restore(two, abstract(asked))
    assert not isinstance(error.value, checkpoint.NoIntactCheckpoint)
    error.match("200 is intact")
    assert not caplog.records


def test_many_differences_are_cut_short(tmp_path):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, [jnp.zeros(1)] * 30, {})
    with pytest.raises(ValueError, match="30 arrays") as error:
        checkpoint.restore(tmp_path, abstract([jnp.zeros(2)] * 30))
    assert len(str(error.value).splitlines()) == 10


def test_what_is_kept(tmp_path):
    metrics = {1: 0.1, 2: 0.9, 3: float("nan"), 4: 0.9, 5: None, 6: 0.3, 7: None, 8: 0.2}
    seen = []
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, max_to_keep=2)) as checkpoints:
        for step, metric in metrics.items():
            checkpoints.save(step, small(step), {}, metric)
            checkpoints.wait()
            seen.append([int(name) for name in names(tmp_path)])
    assert seen == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5, 6], [4, 6, 7], [4, 7, 8]]
    save(tmp_path, 9, max_to_keep=1)  # another object knows the best too
    assert names(tmp_path) == ["4", "9"]
    assert checkpoint.superseded({}, 1) == []
    assert checkpoint.superseded({1: None, 2: float("nan"), 10: None}, 1) == [1, 2]
    with pytest.raises(ValueError, match="max_to_keep must be at least 1, got 0"):
        checkpoint.Checkpoints(tmp_path, max_to_keep=0)


def test_older_ones_plainly_damaged_neither_count_nor_go(two):
    (two / "50").mkdir()
    (two / "60").write_text("?")
    (two / "100" / "host.json").write_text("?")
    with contextlib.closing(checkpoint.Checkpoints(two, max_to_keep=2)) as checkpoints:
        checkpoints.save(300, small(300), {})
        checkpoints.wait()
        assert names(two) == ["100", "200", "300", "50", "60"]
        checkpoints.save(400, small(400), {})
    assert names(two) == ["100", "300", "400", "50", "60"]


def test_nothing_is_deleted_before_the_next_is_intact(two, monkeypatch):
    before = contents(two)
    write = checkpoint._write_manifest

    def killed(folder):
        assert {k: v for k, v in contents(two).items() if not k.startswith("300")} == before
        write(folder)
        raise KeyError("killed")

    monkeypatch.setattr(checkpoint, "_write_manifest", killed)
    checkpoints = checkpoint.Checkpoints(two, max_to_keep=1)
    checkpoints.save(300, small(300), {})
    with pytest.raises(KeyError, match="killed"):
        checkpoints.wait()
    assert names(two) == ["100", "200", "300.unfinished"]
    monkeypatch.setattr(checkpoint, "_write_manifest", write)
    checkpoints.save(300, small(300), {})  # which did not come to be, so that this is no repetition
    checkpoints.close()
    assert names(two) == ["300"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, sync, unfinished = [], checkpoint.sync, tmp_path / "1.unfinished"
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append(path) or sync(path))
    save(tmp_path, 1)
    there = {unfinished / path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*")}
    assert there - {unfinished / "manifest.json"} <= set(synced[:-3])
    assert synced[-3:] == [unfinished / ".manifest.json", unfinished, tmp_path]


def test_the_manifest_is_last_and_lists_every_file(saved):
    for step in (100, 200):
        listed = json.loads((saved / f"{step}/manifest.json").read_bytes())["files"]
        there = {str(path.relative_to(saved / str(step))): path.stat().st_size for path in files(saved / str(step))}
        del there["manifest.json"]
        assert {name: entry["size"] for name, entry in listed.items()} == there
        assert "host.json" in listed


def test_save_returns_at_once_and_what_it_was_given_may_be_overwritten(tmp_path):
    go_on = threading.Event()
    overwrite = jax.jit(lambda x: -x, donate_argnums=0)
    expected = np.arange(1 << 20, dtype=np.float32)
    x, host = jax.block_until_ready(jnp.arange(1 << 20, dtype=jnp.float32)), {"batches": [1]}
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints._thread.submit(go_on.wait, 30)  # whatever save leaves to the thread comes after what follows here
        checkpoints.save(1, x, host)
        for _ in range(5):
            x = overwrite(x)
        host["batches"].append(2)
        assert "1" not in names(tmp_path)  # the save is still under way
        go_on.set()
        checkpoints.wait()
        assert names(tmp_path) == ["1"]
        restored = checkpoints.restore(abstract(x))
    assert np.asarray(restored.state).tobytes() == expected.tobytes()
    assert restored.host == {"batches": [1]}


def test_the_manifest_comes_without_another_call(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, small(1), {})
    deadline = time.monotonic() + 30
    while not (tmp_path / "1").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert checkpoint.damage(tmp_path / "1") is None
    checkpoints.close()


def test_the_same_step_again_is_nothing_and_a_step_of_another_run_an_error(two):
    before = contents(two)
    with contextlib.closing(checkpoint.Checkpoints(two)) as checkpoints:
        for step in (50, 100, 200):
            with pytest.raises(ValueError, match=f"cannot save step {step}: .* intact checkpoint of step 200"):
                checkpoints.save(step, small(0), {})
        checkpoints.restore(abstract(small(0)))
        checkpoints.save(200, small(0), {})
        assert contents(two) == before
        checkpoints.save(300, small(300), {})
        checkpoints.save(300, small(0), {})
    assert names(two) == ["200", "300"]
    assert_same(restore(two).state, small(300))


def test_wrong_arguments(tmp_path):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(TypeError, match=r"state\['x'\] is not an array on devices: it has no sharding, 3"):
            checkpoints.save(1, {"x": 3}, {})
        with pytest.raises(TypeError, match="set is not JSON serializable"):
            checkpoints.save(1, small(1), {"x": set()})
        with pytest.raises(TypeError, match=r"state\['w'\] .* no sharding"):
            checkpoints.restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert names(tmp_path) == []


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # orbax has closed the loop of its writers
@pytest.mark.parametrize("surface", ["wait", "save", "close", "restore"])
def test_full_disk(tiny_disk, surface):
    noise = jax.random.normal(jax.random.key(0), (1 << 19,))  # 2 MiB that do not compress
    checkpoints = checkpoint.Checkpoints(tiny_disk)
    checkpoints.save(1, small(1), {})
    checkpoints.save(2, noise, {})
    calls = {"save": lambda: checkpoints.save(3, small(3), {}), "restore": lambda: checkpoints.restore(noise)}
    with pytest.raises(OSError, match="No space left") as error:
        calls.get(surface, getattr(checkpoints, surface))()
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tiny_disk))
    assert restore(tiny_disk).step == 1
    if surface != "close":  # the half-written one is cleared away, or it would be full still
        noise = jax.random.normal(jax.random.key(0), (1 << 16,))
        checkpoints.save(3, noise, {})
        checkpoints.close()
        assert names(tiny_disk) == ["1", "3"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Failed to write 8 bytes: No space left on device [os_error_code='28']"),
    ],
)
def test_full_disk_as_the_system_and_as_orbax_tell_it(tmp_path, monkeypatch, error):
    def write(folder):
        raise error

    monkeypatch.setattr(checkpoint, "_write_manifest", write)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, small(1), {})
    with pytest.raises(OSError, match="checkpoint not saved, No space left") as raised:
        checkpoints.close()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert restore(tmp_path) is None


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        checkpoint.Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_directory_that_cannot_be_written_to(tiny_disk):
    save(tiny_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(OSError, match="Read-only"):
        checkpoint.Checkpoints(tiny_disk)
    assert restore(tiny_disk).step == 1  # for reading it will do


WORKER = """
import concurrent.futures, contextlib, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from experiments.training import checkpoint, sharding

port, index, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
assert jax.device_count() == 4 and jax.local_device_count() == 2
mesh = jax.make_mesh((4,), ("x",))
sharded, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())

def state(step):
    w = np.arange(64, dtype=np.float32).reshape(8, 8) + step
    return {"w": jax.make_array_from_callback(w.shape, sharded, lambda i: w[i]),
            "step": jax.make_array_from_callback((), whole, lambda i: np.array(step, np.int32)[i])}

def abstract(w, step):
    return {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=w),
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=step)}

def check(restored, step):
    assert (restored.step, restored.host) == (step, {"at": step}), restored
    expected = np.arange(64, dtype=np.float32).reshape(8, 8) + step
    for shard in restored.state["w"].addressable_shards:
        assert (np.asarray(shard.data) == expected[shard.index]).all()

def raises(kind, words, call):
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"did not raise {kind}: {words}")

def on_first(act):
    sharding.from_first(act)

def damage(step):
    path = max((directory / "two" / step).rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

check(checkpoint.restore(directory / "one", abstract(sharded, whole)), 200)  # what one process saved
check(checkpoint.restore(directory / "one", abstract(NamedSharding(mesh, P(None, "x")), whole)), 200)

with contextlib.closing(checkpoint.Checkpoints(directory / "two", max_to_keep=2)) as checkpoints:
    assert checkpoints.restore(abstract(sharded, whole)) is None
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"at": step})
    checkpoints.wait()
    assert checkpoint.damage(directory / "two" / "3") is None  # on every process
    check(checkpoints.restore(abstract(sharded, whole)), 3)
    raises(ValueError, "intact checkpoint of step 3", lambda: checkpoints.save(2, state(2), {}))
    on_first(lambda: damage("3"))
    check(checkpoints.restore(abstract(whole, whole)), 2)
    if index == 1:  # must not look for itself
        checkpoint.damage = None
    on_first(lambda: damage("2"))
    raises(checkpoint.NoIntactCheckpoint, "nothing was deleted", lambda: checkpoints.restore(abstract(sharded, whole)))
    checkpoints.save(3, state(3), {"at": 3})
    checkpoints.save(3, state(4), {"at": 4})  # nothing
    check(checkpoints.restore(abstract(sharded, whole)), 3)
    if index == 0:
        write, checkpoint._write_manifest = checkpoint._write_manifest, lambda folder: 1 / 0
    checkpoints.save(4, state(4), {"at": 4})
    raises(ZeroDivisionError, "division", checkpoints.wait)
    if index == 0:
        checkpoint._write_manifest = write
    checkpoints.save(5, state(5), {"at": 5})
    checkpoints.wait()
    if index == 1:  # an error of its own
        checkpoints._pending = concurrent.futures.Future()
        checkpoints._pending.set_exception(KeyError("mine"))
        raises(KeyError, "mine", checkpoints.wait)
print("passed", index)
"""


@pytest.mark.long
def test_two_processes(tmp_path):
    def state(step):
        return {"w": jnp.arange(64.0).reshape(8, 8) + step, "step": jnp.int32(step)}

    rows = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "one")) as checkpoints:
        checkpoints.save(100, state(100), {"at": 100})
        checkpoints.save(200, state(200) | {"w": jax.device_put(state(200)["w"], rows)}, {"at": 200})
        checkpoints.wait()
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    flags = " ".join(["--xla_force_host_platform_device_count=2", *commands.QUICK_COMPILATION])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(index), tmp_path],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, output in enumerate(outputs):
        assert f"passed {index}" in output, "\n\n".join(outputs)
    assert names(tmp_path / "two") == ["3", "3.damaged-0", "5"]
    restored = checkpoint.restore(tmp_path / "two", abstract(state(0)))
    assert (restored.step, restored.host) == (5, {"at": 5})
    assert_same(restored.state, state(5))
