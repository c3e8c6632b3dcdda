"""Networks as files: other processes, batch sizes, threads and pickles have the same results bit for bit."""

import concurrent.futures
import copy
import json
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_plus_plus as sapp
from sa_plus_plus import serve
from sa_plus_plus.sparse.files import container
from sa_plus_plus.sparse.ops import native

pytestmark = pytest.mark.filterwarnings("ignore:specialize found no products")  # of functions without kernels
needs_kernel = pytest.mark.skipif(native.unavailable_reason() is not None, reason="there is no compiled kernel")
RNG = np.random.default_rng(0)
KERNELS = [
    jnp.asarray(np.kron(RNG.random((4, 4)) < 0.4, np.ones((16, 16))) * RNG.normal(size=(64, 64)) / 5, jnp.float32)
    for _ in range(3)
]


def model(x):
    first, second, last = KERNELS
    y = jax.nn.relu(x @ first)
    return {"y": jax.nn.relu(y @ second) @ last, "hidden": y}


def inputs(batch):
    return np.random.default_rng(batch).normal(size=(batch, 64)).astype(np.float32)


def made(batch, precision="float32"):
    options = {"precision": "int8", "calibration": [jnp.asarray(inputs(batch))]} if precision == "int8" else {}
    return sapp.specialize(model, jnp.asarray(inputs(batch)), mode="always", **options)


@pytest.fixture(scope="module")
def networks():
    return {
        (batch, precision): made(batch, precision) for batch, precision in ((2, "float32"), (5, "float32"), (2, "int8"))
    }


LARGE = 256  # rows, enough that the kernel shares each layer out to threads


@pytest.fixture(scope="module")
def large():
    return {precision: made(LARGE, precision) for precision in ("float32", "int8")}


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


READER = """
import sys, numpy as np, sa_plus_plus as sapp
for path in sys.argv[1:]:
    network = sapp.serve.load(path)
    np.savez(path + ".npz", **network(np.load(path + ".npy")))
    open(path + ".again", "wb").write(network.__reduce__()[1][0])
"""


@needs_kernel
def test_another_process_has_the_same_results(networks, tmp_path):
    paths = {}
    for precision in ("float32", "int8"):
        network = networks[2, precision]
        paths[precision] = str(tmp_path / precision)
        assert network.save(paths[precision]) == (tmp_path / precision).stat().st_size
        np.save(paths[precision] + ".npy", inputs(2))
        assert str(serve.load(paths[precision])) == str(network)
    subprocess.run([sys.executable, "-c", READER, *paths.values()], check=True, timeout=300)
    for precision, path in paths.items():
        same(dict(np.load(path + ".npz")), networks[2, precision](inputs(2)))
        assert (tmp_path / f"{precision}.again").read_bytes() == (tmp_path / precision).read_bytes()


@needs_kernel
def test_any_batch_from_two(networks, tmp_path):
    path = tmp_path / "both"
    size = serve.save(path, [networks[5, "float32"], networks[2, "float32"]])
    alone = networks[2, "float32"].save(tmp_path / "alone")
    assert size < 1.7 * alone  # weights once
    fast = serve.load(path)
    assert fast.batches == (2, 5)
    for batch in (0, 1, 2, 3, 5, 11):
        want = model(inputs(batch))
        got = fast(inputs(batch))
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want)
        assert {type(y) for y in jax.tree.leaves(got)} == {type(jnp.ones(1))}
    with pytest.raises(ValueError, match=r"in batches of any size, .*got float32\[3, 63\]"):
        fast(inputs(3)[:, 1:])
    one = serve.load(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"made for float32\[2, 64\]; got float32\[3, 64\]"):
        one(inputs(3))
    with pytest.raises(ValueError, match="made for arguments like"):
        one(inputs(2), inputs(2))


def saved(fn, *examples):
    return [sapp.specialize(fn, *arguments, mode="never") for arguments in examples]


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (lambda: [], "there is no network"),
        (
            lambda: saved(jnp.sin, (jnp.ones((2, 3)),), (jnp.ones((2, 3)),)),
            "two networks have the same batch size: 2, 2",
        ),
        (lambda: saved(jnp.sin, (jnp.ones((2, 3)),), (jnp.ones((4, 5)),)), "differ in more than the batch"),
        (lambda: saved(jnp.sin, (jnp.ones(()),), (jnp.ones((4,)),)), "need the batch as their leading axis"),
        (
            lambda: saved(lambda x, y: x.sum() + y, *((jnp.ones((n, 3)), jnp.ones(7)) for n in (1, 2))),
            "need the batch as their leading axis",
        ),
        (
            lambda: [*saved(jnp.sin, (jnp.ones(3),)), *saved(lambda x, y: x + y, (jnp.ones(2), jnp.ones(2)))],
            "take different arguments",
        ),
    ],
)
def test_networks_that_cannot_be_one_file(networks, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        serve.save(tmp_path / "file", networks())
    assert not list(tmp_path.iterdir())


def test_outputs_without_a_batch_take_the_saved_sizes_alone(tmp_path):
    serve.save(tmp_path / "sums", saved(lambda x: x.sum(0), (jnp.ones((2, 3)),), (jnp.ones((4, 3)),)))
    fast = serve.load(tmp_path / "sums")
    np.testing.assert_array_equal(fast(np.ones((4, 3), np.float32)), [4, 4, 4])
    with pytest.raises(ValueError, match="only the batches that were saved can be run: 2, 4, not 3"):
        fast(np.ones((3, 3), np.float32))


def changed(path, **about):
    """The file with something else said of it, and checksums that agree."""
    tensors, header = container.read(path)
    said = json.loads(tensors["about"].tobytes()) | about
    container.write(path, tensors | {"about": np.frombuffer(json.dumps(said).encode(), np.uint8)}, header)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"format": 99}, "format 99, this version reads up to 2"),
        ({"format": 1}, "format 1, this version reads 2: write it again"),
        ({"platforms": ["tpu"]}, "is for 'tpu', JAX runs on cpu"),
        ({"calling_convention": 1}, "in version 1 of its format for programs"),
        ({"kind": "something"}, "holds parameters, not a network"),
    ],
)
def test_files_that_cannot_be_read_here(about, message, tmp_path):
    [network] = saved(jnp.sin, (jnp.ones(3),))
    network.save(tmp_path / "file")
    changed(tmp_path / "file", **about)
    with pytest.raises(ValueError, match=message):
        serve.load(tmp_path / "file")


def test_the_same_network_has_the_same_bytes_wherever_its_source_is(tmp_path):
    w = np.eye(8, dtype=np.float32)
    contents, limit = set(), jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 100)  # as outside of these tests
    try:
        for number in range(4):
            names = {"w": w, "jax": jax}
            source = "\n" * number + "def f(x):\n    return jax.nn.silu(x @ w) @ w"
            exec(compile(source, f"/home/{number}/secret.py", "exec"), names)
            serve.save(tmp_path / "file", saved(names["f"], (jnp.ones((1, 8)),), (jnp.ones((2, 8)),)))
            contents.add((tmp_path / "file").read_bytes())
        assert jax.config.values["jax_traceback_in_locations_limit"] == 100
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
    (content,) = contents
    assert b"secret" not in content
    assert b".py" not in content


def test_damaged_files(tmp_path):
    path = tmp_path / "file"
    w = jnp.asarray(RNG.normal(size=(64, 64)), jnp.float32)
    [network] = saved(lambda x: x @ w, (jnp.ones((1, 64)),))
    network.save(path)
    content = path.read_bytes()
    for place in (20, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            serve.load(path)
    path.write_bytes(content[:-7])
    with pytest.raises(ValueError, match="damaged"):
        serve.load(path)
    sapp.save(path, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="holds parameters, not a network"):
        serve.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        serve.load(tmp_path / "none")


@needs_kernel
def test_without_the_compiled_kernel(networks, tmp_path, monkeypatch):
    networks[2, "float32"].save(tmp_path / "file")
    monkeypatch.setattr(native, "unavailable_reason", lambda: "it was not compiled")
    with pytest.raises(
        RuntimeError, match="needs the compiled kernel for CPUs, and there is none: it was not compiled"
    ):
        serve.load(tmp_path / "file")
    with pytest.raises(RuntimeError, match="no compiled kernel"):
        serve.set_threads(1)


@needs_kernel
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_python_threads_have_the_same_results(precision, large):
    fast = pickle.loads(pickle.dumps(large[precision]))
    xs = [inputs(LARGE) + i for i in range(10)]
    wants = [jax.device_get(large[precision](x)) for x in xs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(lambda i: jax.device_get(fast(xs[i % 10])), range(1000))):
            same(got, wants[i % 10])


@needs_kernel
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_results_do_not_depend_on_the_number_of_threads(precision, large):
    want = large[precision](inputs(LARGE))
    try:
        for threads in (1, 2, 3):
            serve.set_threads(threads)
            same(large[precision](inputs(LARGE)), want)
    finally:
        serve.set_threads(0)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="must be an integer, 0 for as many"):
            serve.set_threads(wrong)


THREADS = """
import pathlib, time, jax, jax.numpy as jnp, sa_plus_plus as sapp
network = sapp.specialize(lambda x: x @ jnp.eye(256), jnp.ones((256, 256)), mode="always")
for threads in (1, 0):
    sapp.serve.set_threads(threads)
    for _ in range(20):  # a thread takes a while to begin
        jax.block_until_ready(network(jnp.ones((256, 256))))
        time.sleep(0.01)
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    print(names.count("sa_plus_plus"))
"""


@needs_kernel
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_one_thread_starts_no_other():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # which ask for devices
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert [int(line) for line in done.stdout.split()] == [0, len(os.sched_getaffinity(0)) - 1]


@needs_kernel
def test_copies(networks):
    network = networks[2, "int8"]
    want = network(inputs(2))
    copied = copy.deepcopy(network)
    assert isinstance(copied, sapp.sparse.Network)
    assert copied.choices == network.choices
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(network))))
    assert str(again) == str(network)
    same(copied(inputs(2)), want)
    same(again(inputs(2)), want)
