"""Block-sparse kernels and files of them: exact, small, and never read where damaged."""

import json
import struct

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import sa_plus_plus as sapp
from sa_plus_plus.sparse import Layout, densify_tree, kernel, storage, to_block_sparse, to_bsr, to_onnx

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).flatmap(
    lambda lead: st.integers(1, 40).map(lambda cols: (*lead, cols))
)


@st.composite
def kernels(draw, dtypes=("float32", "bfloat16", "float16")):
    shape, block = draw(SHAPES), draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    mask = rng.random(sapp.blocks.grid_shape(shape, block)) < draw(st.sampled_from([0, 0.1, 0.5, 1]))
    values = np.asarray(sapp.blocks.spread(jnp.asarray(mask), shape, block)) * rng.normal(size=shape)
    return jnp.asarray(values, draw(st.sampled_from(dtypes))), block, mask


@hypothesis.given(kernels())
def test_a_kernel_comes_back_bit_by_bit(drawn):
    dense, block, mask = drawn
    w = to_block_sparse(dense, block)
    assert w.shape == dense.shape
    assert w.dtype == dense.dtype
    np.testing.assert_array_equal(kernel.densify(w), dense)
    np.testing.assert_array_equal(jax.jit(kernel.densify)(w), dense)
    assert w.layout.mask.sum() == w.layout.kept <= mask.sum()
    kept_by_mask = to_block_sparse(dense, block, mask)
    np.testing.assert_array_equal(kept_by_mask.layout.mask, mask)
    np.testing.assert_array_equal(kernel.densify(kept_by_mask), dense)


@hypothesis.given(kernels(dtypes=("float32",)))
def test_transposed_layout_and_bsr(drawn):
    dense, block, mask = drawn
    w = to_block_sparse(dense, block, mask)
    matrix = np.asarray(dense).reshape(-1, dense.shape[-1])
    turned, order = w.layout.transposed
    across = kernel.BlockSparse(jnp.swapaxes(w.blocks[order], 1, 2), turned)
    np.testing.assert_array_equal(kernel.densify(across), matrix.T)
    bsr = to_bsr(w)
    assert bsr.nnz == w.blocks.size
    np.testing.assert_array_equal(bsr.toarray()[: matrix.shape[0], : matrix.shape[1]], matrix)


def test_a_layout_is_a_value():
    def make(rows=(0, 2, 1)):
        return Layout((12, 8), (4, 4), np.array(rows), np.array([0, 2, 3]))

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make((0, 1, 1))
    assert make() != "layout"
    traces = []

    @jax.jit
    def double(w):
        traces.append(1)
        return w.blocks * 2

    for rows in ((0, 2, 1), (0, 2, 1), (0, 1, 1)):
        double(kernel.BlockSparse(jnp.ones((3, 4, 4)), make(rows)))
    assert len(traces) == 2
    with pytest.raises(ValueError, match="read-only"):
        make().rows[0] = 5
    assert "3 of 6 blocks, 50.0%" in repr(make())


@pytest.mark.parametrize(
    ("rows", "starts", "message"),
    [
        ([0, 3, 1], [0, 2, 3], "block 1 stands in grid row 3, outside 0 to 2"),
        ([0, -1, 1], [0, 2, 3], "block 1 stands in grid row -1"),
        ([0, 2**31, 1], [0, 2, 3], "must fit 32 bits"),
        ([0, 0, 1], [0, 2, 3], "block 1 stands in row 0 after row 0"),
        ([0, 1, 1], [0, 2], "starts must be 3 numbers from 0 to 3"),
        ([0, 1, 1], [0, 2, 4], "got 3, 0 to 4"),
        ([0, 1, 1], [0, 4, 3], "must not fall"),
        ([0.0, 1.0, 1.0], [0, 2, 3], "must be a list of integers"),
    ],
)
def test_no_layout_points_outside_its_kernel(rows, starts, message):
    with pytest.raises(ValueError, match=message):
        Layout((12, 8), (4, 4), np.array(rows), np.array(starts))


def test_what_cannot_become_block_sparse():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda x: to_block_sparse(x, 2).blocks)(jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"mask must have the shape \(2, 2\)"):
        to_block_sparse(jnp.ones((4, 4)), 2, np.ones((4, 4)))


def network():
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 24, 40)), jnp.float32), "bias": jnp.ones(40)},
        "dense": {"kernel": jnp.asarray(rng.normal(size=(390, 400)), jnp.float32)},
        "half": {"kernel": jnp.asarray(rng.normal(size=(64, 64)), jnp.bfloat16)},
        "small": {"kernel": jnp.ones((3, 3))},
        "steps": jnp.int32(7),
    }


def pruned(block=(8, 8), sparsity=0.9):
    params = network()
    sp = sapp.random(block=block, sparsity=sparsity, min_blocks=50, phases=sapp.phases.random(10))
    params = sp.finalize(*sp.init(params))
    return params, sapp.export(params, sp.plan(params)), sp.plan(params)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(want)]


def test_a_network_through_a_file_bit_by_bit(tmp_path):
    params, exported, plan = pruned()
    assert_same(densify_tree(exported), params)
    saved = sapp.save(tmp_path / "network.safetensors", exported, metadata={"accuracy": "0.95"})
    loaded = sapp.load(tmp_path / "network.safetensors")
    assert_same(densify_tree(loaded), params)
    assert_same(loaded, exported)
    assert set(saved.errors) == set(plan.pruned) == {"conv/kernel", "dense/kernel", "half/kernel"}
    assert not any(saved.errors.values())
    assert saved.bytes == (tmp_path / "network.safetensors").stat().st_size
    with safetensors.safe_open(tmp_path / "network.safetensors", "numpy") as file:
        about = json.loads(file.metadata()["sa_plus_plus"])
        assert file.metadata()["accuracy"] == "0.95"
    assert about["kernels"]["conv/kernel"]["shape"] == [3, 3, 24, 40]
    assert (tmp_path / "network.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("block", [(4, 4), (16, 16), (20, 20), (32, 8)])
def test_size_is_that_of_the_kept_weights(tmp_path, block):
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(1990, 1000)), jnp.float32)}
    sp = sapp.random(block=block, sparsity=0.9, phases=sapp.phases.random(10))
    params = sp.finalize(*sp.init(params))
    exported = sapp.export(params, sp.plan(params))
    weights, blocks = np.count_nonzero(params["a"]), exported["a"].layout.kept
    saved = sapp.save(tmp_path / "a", exported)
    assert saved.bytes <= 1.03 * (4 * weights + 4 * blocks)
    assert saved.dense_bytes == 4 * 1990 * 1000


@pytest.mark.parametrize(("storage", "bytes_each", "bound"), [("bfloat16", 2, 2**-8), ("int8", 1, 0.01)])
def test_narrow_storage_states_its_error(tmp_path, storage, bytes_each, bound):
    params, exported, _ = pruned()
    saved = sapp.save(tmp_path / "a", exported, storage=storage)
    loaded = densify_tree(sapp.load(tmp_path / "a"))
    for path in ("conv", "dense"):
        got, want = (np.asarray(tree[path]["kernel"], np.float64) for tree in (loaded, params))
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert saved.errors[f"{path}/kernel"] == pytest.approx(error, rel=1e-4)
        assert 0 < error < bound
        np.testing.assert_array_equal(got == 0, want == 0) if storage == "bfloat16" else None
    assert_same([loaded["conv"]["bias"], loaded["small"]], [params["conv"]["bias"], params["small"]])
    assert loaded["dense"]["kernel"].dtype == jnp.float32
    assert loaded["half"]["kernel"].dtype == jnp.bfloat16
    weights = sum(int(w.layout.real.sum()) for w in (exported["conv"]["kernel"], exported["dense"]["kernel"]))
    assert saved.bytes < bytes_each * weights * 1.2 + 10_000


def test_every_flipped_byte_is_noticed(tmp_path):
    _, exported, _ = pruned()
    path = tmp_path / "a"
    sapp.save(path, {"dense": exported["dense"]}, storage="int8")
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    rng = np.random.default_rng(0)
    places = [*rng.integers(8, 8 + header, 60), *rng.integers(8 + header, len(content), 60), 0, len(content) - 1]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(0, 7)
        path.write_bytes(damaged)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            sapp.load(path)
        if place >= 8 + header:
            assert "tensor 'dense/kernel:" in str(error.value)
    for length in (0, 7, 100, header, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="damaged"):
            sapp.load(path)


def hostile(path, change):
    """A file with right checksums whose content was made to harm."""
    kernel_about = {"shape": [12, 8], "block": [4, 4], "kept": 3, "dtype": "float32", "storage": "exact"}
    tensors = {"k:index": np.array([0, 2, 4], np.int32), "k:blocks": np.ones(48, np.float32)}
    change(kernel_about, tensors)
    text = json.dumps(
        {
            "format": storage.FORMAT,
            "kernels": {"k": kernel_about},
            "sha256": {name: storage._digest(tensor) for name, tensor in tensors.items()},
        }
    )
    metadata = {"sa_plus_plus": text, "sha256": storage.hashlib.sha256(text.encode()).hexdigest()}
    path.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, t: t.update({"k:index": np.array([0, 2, 6], np.int32)}), "runs from 0 to 6, beyond a grid of 3×2"),
        (lambda k, t: t.update({"k:index": np.array([-1, 2, 4], np.int32)}), "runs from -1 to 4"),
        (lambda k, t: t.update({"k:index": np.array([0, 2, 2], np.int32)}), "does not rise"),
        (lambda k, t: t.update({"k:index": np.array([0.0, 2.0])}), "not a list of int32"),
        (lambda k, t: t.update({"k:blocks": np.ones(47, np.float32)}), "47 weights where its 3 blocks take 48"),
        (lambda k, t: k.update({"block": [4, 3]}), "weights where its 3 blocks take"),
        (lambda k, t: k.update({"shape": [12, 0]}), "is damaged"),
        (lambda k, t: k.update({"storage": "int8"}), "no scale for each of its blocks"),
        (lambda k, t: k.update({"dtype": "float31"}), "is damaged"),
        (lambda k, t: t.pop("k:blocks"), "is damaged"),
    ],
)
def test_files_made_to_harm_are_refused(tmp_path, change, message):
    hostile(tmp_path / "a", lambda k, t: None)
    assert sapp.load(tmp_path / "a")["k"].layout.kept == 3
    hostile(tmp_path / "a", change)
    with pytest.raises(ValueError, match=message) as error:
        sapp.load(tmp_path / "a")
    assert "kernel 'k'" in str(error.value)


def test_bad_requests(tmp_path):
    params, exported, plan = pruned()
    with pytest.raises(FileNotFoundError, match="no file"):
        sapp.load(tmp_path / "none")
    with pytest.raises(ValueError, match="storage must be one of exact, bfloat16, int8, got 'int4'"):
        sapp.save(tmp_path / "a", exported, storage="int4")
    (tmp_path / "b").write_bytes(safetensors.numpy.save({"x": np.ones(2)}))
    with pytest.raises(ValueError, match=r"not written by sa_plus_plus\.save"):
        sapp.load(tmp_path / "b")
    with pytest.raises(ValueError, match=r"a kernel dense/kernel of shape \(390, 400\), which is not there"):
        sapp.export({k: v for k, v in params.items() if k != "dense"}, plan)
    with pytest.raises(ValueError, match=r"which has the shape \(390, 3\)"):
        sapp.export(params | {"dense": {"kernel": jnp.ones((390, 3))}}, plan)
    nan = to_block_sparse(jnp.full((8, 8), jnp.nan), 4)
    with pytest.raises(ValueError, match="'k' has weights that are not finite"):
        sapp.save(tmp_path / "c", {"k": nan}, storage="int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]
    with pytest.raises(TypeError, match="SciPy has no bfloat16"):
        to_bsr(exported["half"]["kernel"])
    sapp.save(tmp_path / "a", exported)
    with pytest.raises(ValueError, match="differ in extra"):
        sapp.load(tmp_path / "a", like=exported | {"extra": 1})


def test_trees_that_are_not_dicts(tmp_path):
    params, exported, _ = pruned()
    tree = [exported["dense"]["kernel"], (params["steps"], {"x": exported["conv"]})]
    sapp.save(tmp_path / "a", tree)
    assert_same(sapp.load(tmp_path / "a", like=tree), tree)


def test_onnx_gives_the_networks_results(tmp_path):
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    params, exported, _ = pruned()
    x = np.random.default_rng(1).normal(size=(5, 390)).astype(np.float32)

    def apply(x):
        return jax.nn.relu(x @ kernel.densify(exported["dense"]["kernel"])) - 1

    size = to_onnx(tmp_path / "a.onnx", apply, x)
    assert size == (tmp_path / "a.onnx").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x})
    want = np.maximum(x @ np.asarray(params["dense"]["kernel"]), 0) - 1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

    def pooled(x):
        return nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=[(1, 1), (1, 1)])

    image = np.random.default_rng(1).normal(size=(1, 8, 8, 3)).astype(np.float32)
    with pytest.raises(ValueError, match="jax2onnx made a model of this network"):  # as of 0.17
        to_onnx(tmp_path / "b.onnx", lambda x: pooled(x), image)
    assert not (tmp_path / "b.onnx").exists()
