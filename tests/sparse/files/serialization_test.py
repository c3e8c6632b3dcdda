"""Block-sparse kernels and files of them: exact, small, and never read where damaged."""

import collections
import hashlib
import itertools
import json
import struct

import file_fuzz
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import safetensors.numpy

import sa_plus_plus as sapp
from sa_plus_plus.sparse import BlockSparse, Layout, to_bsr
from sa_plus_plus.sparse.files import container, serialization

# Ragged, tiny, long and of 2 to 5 dimensions: from a list, since each is a compilation.
SHAPES = st.sampled_from([(1, 1), (9, 40), (64, 3), (3, 200), (2, 5, 12), (3, 3, 4, 16), (2, 1, 3, 2, 7)])
SIDES = st.sampled_from([(1, 1), (2, 5), (4, 4), (12, 3), (1, 12)])


@st.composite
def kernels(draw, dtypes=("float32", "bfloat16", "float16")):
    shape, block = draw(SHAPES), draw(SIDES)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    mask = rng.random(sapp.blocks.grid_shape(shape, block)) < draw(st.sampled_from([0, 0.1, 0.5, 1]))
    rows, cols = sapp.blocks.matrix_shape(shape)
    values = np.kron(mask, np.ones(block))[:rows, :cols].reshape(shape) * rng.normal(size=shape)
    return jnp.asarray(values, draw(st.sampled_from(dtypes))), block, mask


@hypothesis.given(kernels())
@problems.examples(20)
def test_a_kernel_comes_back_bit_by_bit(drawn):
    dense, block, mask = drawn
    w = BlockSparse.fromdense(dense, block)
    assert w.shape == dense.shape
    assert w.dtype == dense.dtype
    np.testing.assert_array_equal(w.todense(), dense)
    np.testing.assert_array_equal(jax.jit(BlockSparse.todense)(w), dense)
    assert w.layout.mask.sum() == w.layout.nse <= mask.sum()
    kept_by_mask = BlockSparse.fromdense(dense, block, mask)
    np.testing.assert_array_equal(kept_by_mask.layout.mask, mask)
    np.testing.assert_array_equal(kept_by_mask.todense(), dense)


@hypothesis.given(kernels(dtypes=("float32",)))
@problems.examples(15)
def test_transposed_layout_and_bsr(drawn):
    dense, block, mask = drawn
    w = BlockSparse.fromdense(dense, block, mask)
    matrix = np.asarray(dense).reshape(-1, dense.shape[-1])
    turned, order = w.layout.transposed
    across = BlockSparse(jnp.swapaxes(w.blocks[order], 1, 2), turned)
    np.testing.assert_array_equal(across.todense(), matrix.T)
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
        double(BlockSparse(jnp.ones((3, 4, 4)), make(rows)))
    assert len(traces) == 2
    with pytest.raises(ValueError, match="read-only"):
        make().indices[0] = 5
    assert "3 of 6 blocks, 50.0%" in repr(make())


@pytest.mark.parametrize(
    ("rows", "starts", "message"),
    [
        ([0, 3, 1], [0, 2, 3], "block 1 is in grid row 3, outside 0 to 2"),
        ([0, -1, 1], [0, 2, 3], "block 1 is in grid row -1"),
        ([0, 2**31, 1], [0, 2, 3], "must fit 32 bits"),
        ([0, 0, 1], [0, 2, 3], "block 1 is in row 0 after row 0"),
        ([0, 1, 1], [0, 2], "indptr must be 3 numbers from 0 to 3"),
        ([0, 1, 1], [0, 2, 4], "got 3, 0 to 4"),
        ([0, 1, 1], [0, 4, 3], "must be non-decreasing, but decreases after column 1"),
        ([0.0, 1.0, 1.0], [0, 2, 3], "must be a list of integers"),
    ],
)
def test_no_layout_points_outside_its_kernel(rows, starts, message):
    with pytest.raises(ValueError, match=message):
        Layout((12, 8), (4, 4), np.array(rows), np.array(starts))


def test_what_cannot_become_block_sparse():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda x: BlockSparse.fromdense(x, 2).blocks)(jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"mask must have the shape \(2, 2\)"):
        BlockSparse.fromdense(jnp.ones((4, 4)), 2, np.ones((4, 4)))


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
    assert_same(sapp.todense(exported), params)
    saved = sapp.save(tmp_path / "network.safetensors", exported, metadata={"accuracy": "0.95"})
    loaded = sapp.load(tmp_path / "network.safetensors")
    assert_same(sapp.todense(loaded), params)
    assert_same(loaded, exported)
    assert set(saved.errors) == set(plan.pruned) == {"conv/kernel", "dense/kernel", "half/kernel"}
    assert not any(saved.errors.values())
    assert saved.bytes == (tmp_path / "network.safetensors").stat().st_size
    with safetensors.safe_open(tmp_path / "network.safetensors", "numpy") as file:
        about = json.loads(file.metadata()["sa_plus_plus"])
        assert file.metadata()["accuracy"] == "0.95"
    assert about["kernels"]["conv/kernel"]["shape"] == [3, 3, 24, 40]


def test_equal_content_has_equal_bytes(tmp_path):
    w = BlockSparse.fromdense(np.kron(np.eye(3, 2), np.ones((4, 4))).astype(np.float32), 4)
    leaves, metadata = [("b", w), ("a", np.ones(3)), ("c", np.int32(1))], [("x", "1"), ("é", "2\n"), ("z", "3")]
    contents = set()
    for orders in zip(itertools.permutations(leaves), itertools.permutations(metadata), strict=True):
        tree, texts = map(collections.OrderedDict, orders)
        saved = sapp.save(tmp_path / "a", tree, metadata=texts)
        assert saved.bytes == (tmp_path / "a").stat().st_size
        contents.add((tmp_path / "a").read_bytes())
    (content,) = contents
    assert int.from_bytes(content[:8], "little") % 8 == 0  # tensors are aligned
    with safetensors.safe_open(tmp_path / "a", "numpy") as file:  # by the library, not this package
        assert dict(metadata).items() <= file.metadata().items()
        np.testing.assert_array_equal(file.get_tensor("a"), np.ones(3))


def test_whatever_a_file_holds_it_is_read_or_refused():
    outcomes = file_fuzz.run(seed=0, count=400)
    assert {name.rpartition(": ")[2] for name in outcomes} == {"read", "refused"}
    assert sum(outcomes.values()) == 400


@pytest.mark.parametrize("block", [(4, 4), (16, 16), (20, 20), (32, 8)])
def test_size_is_that_of_the_kept_weights(tmp_path, block):
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(1990, 1000)), jnp.float32)}
    sp = sapp.random(block=block, sparsity=0.9, phases=sapp.phases.random(10))
    params = sp.finalize(*sp.init(params))
    exported = sapp.export(params, sp.plan(params))
    weights, blocks = np.count_nonzero(params["a"]), exported["a"].layout.nse
    saved = sapp.save(tmp_path / "a", exported)
    assert saved.bytes <= 1.03 * (4 * weights + 4 * blocks)
    assert saved.dense_bytes == 4 * 1990 * 1000


@pytest.mark.parametrize(("storage", "bytes_each", "bound"), [("bfloat16", 2, 2**-8), ("int8", 1, 0.01)])
def test_narrow_storage_states_its_error(tmp_path, storage, bytes_each, bound):
    params, exported, _ = pruned()
    saved = sapp.save(tmp_path / "a", exported, storage=storage)
    loaded = sapp.todense(sapp.load(tmp_path / "a"))
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


def hostile(path, change, change_about=lambda about: about):
    """A file with right checksums whose content was made to harm."""
    kernel_about = {"shape": [12, 8], "block": [4, 4], "kept": 3, "dtype": "float32", "storage": "exact"}
    tensors = {"k:index": np.array([0, 2, 4], np.int32), "k:blocks": np.ones(48, np.float32)}
    change(kernel_about, tensors)
    about = {
        "format": container.FORMAT,
        "kernels": {"k": kernel_about},
        "sha256": {name: container.digest(tensor) for name, tensor in tensors.items()},
    }
    text = change_about(about)
    text = text if isinstance(text, str) else json.dumps(text)
    metadata = {"sa_plus_plus": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    path.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, t: t.update({"k:index": np.array([0, 2, 6], np.int32)}), "runs from 0 to 6, beyond a grid of 3×2"),
        (lambda k, t: t.update({"k:index": np.array([-1, 2, 4], np.int32)}), "runs from -1 to 4"),
        (lambda k, t: t.update({"k:index": np.array([0, 2, 2], np.int32)}), "not strictly increasing"),
        (lambda k, t: t.update({"k:index": np.array([0.0, 2.0])}), "not a list of int32"),
        (lambda k, t: t.update({"k:blocks": np.ones(47, np.float32)}), "47 weights where its 3 blocks take 48"),
        (lambda k, t: k.update({"block": [4, 3]}), "weights where its 3 blocks take"),
        (lambda k, t: k.update({"shape": [12, 0]}), "is damaged"),
        (lambda k, t: k.update({"storage": "int8"}), "no scale for each of its blocks"),
        (lambda k, t: k.update({"dtype": "float31"}), "is damaged"),
        (lambda k, t: t.pop("k:blocks"), "is damaged: it has no tensor for its blocks"),
        (lambda k, t: k.update({"shape": [16, 2**45]}), "too large"),
        (lambda k, t: k.update({"shape": [2**20, 2**20], "block": [1, 1]}), "too large"),
        (lambda k, t: k.update({"shape": [1, 2**25], "block": [1, 1]}), "too large"),
        (lambda k, t: k.update({"shape": [12.0, 8]}), r"its description.shape\[0\] is 12.0, not of type int"),
        (lambda k, t: k.update({"shape": "12"}), "its description.shape is '12', not of type list"),
        (lambda k, t: k.update({"block": [2**40, 4]}), "nearly all padding"),
        (lambda k, t: k.update({"storage": "int2"}), "storage is 'int2'; this version reads exact, bfloat16, int8"),
        (lambda k, t: k.update({"storage": []}), "storage is "),
        (lambda k, t: k.update({"storage": "bfloat16"}), "its blocks are float32, though"),
        (lambda k, t: k.update({"dtype": "int32"}), "its blocks are float32, though"),
        (lambda k, t: k.update({"dtype": None}), "dtype is None"),
        (lambda k, t: k.clear(), "its description has no 'shape'"),
        (lambda k, t: k.update({"shape": []}), "not a list of positive integers"),
        (lambda k, t: k.update({"shape": [True, 8]}), "not of type int"),
        (lambda k, t: k.update({"kept": 4}), "its index has 3 blocks, where it keeps 4"),
        (lambda k, t: k.pop("kept"), "its description has no 'kept'"),
        (lambda k, t: k.update({"view": [[0], [1]]}), "not three lists of axes"),
        (lambda k, t: k.update({"view": [[], [0], [9]]}), "is damaged"),
    ],
)
def test_files_made_to_harm_are_refused(tmp_path, change, message):
    hostile(tmp_path / "a", lambda k, t: None)
    assert sapp.load(tmp_path / "a")["k"].layout.nse == 3
    hostile(tmp_path / "a", change)
    with pytest.raises(ValueError, match=message) as error:
        sapp.load(tmp_path / "a")
    assert "kernel 'k'" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: [], "names no format"),
        (lambda about: None, "names no format"),
        (lambda about: "{", "is not JSON"),
        (lambda about: "[" * 100_000, "is not JSON"),
        (lambda about: about | {"kernels": []}, "no mapping 'kernels'"),
        (lambda about: about | {"kernels": None}, "no mapping 'kernels'"),
        (lambda about: about | {"kernels": {"k": None}}, "kernel 'k' is damaged"),
        (lambda about: about | {"sha256": None}, "no mapping 'sha256'"),
        (lambda about: about | {"sha256": {}}, "does not have the checksum"),
        (lambda about: about | {"format": ["x"]}, "has the format"),
    ],
)
def test_metadata_made_to_harm_is_refused(tmp_path, change, message):
    hostile(tmp_path / "a", lambda k, t: None, change)
    with pytest.raises(ValueError, match=message) as error:
        sapp.load(tmp_path / "a")
    assert str(tmp_path / "a") in str(error.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        sapp.load(tmp_path)
    hostile(tmp_path / "a", lambda k, t: t.update({"k": np.ones(3, np.float32)}))
    with pytest.raises(ValueError, match=r"a is damaged: 'k' is both a kernel and a tensor"):
        sapp.load(tmp_path / "a")
    for order in (1, -1):
        extra = {name: np.ones(3, np.float32) for name in ("x", "x/y")[::order]}
        hostile(tmp_path / "a", lambda k, t, extra=extra: t.update(extra))
        with pytest.raises(ValueError, match="load it into a tree"):
            sapp.load(tmp_path / "a")
    (tmp_path / "b").write_bytes(safetensors.numpy.save({"x": np.ones(2, jnp.float8_e4m3fn)}))
    with pytest.raises(ValueError, match="b is damaged, or not a safetensors file of NumPy's dtypes"):
        sapp.load(tmp_path / "b")


@pytest.mark.parametrize("part", ["blocks", "index", "scales"])
def test_no_leaf_has_the_name_of_a_kernels_tensor(tmp_path, part):
    w, a = BlockSparse.fromdense(jnp.ones((8, 8)), 4), jnp.arange(4)
    for items in ([("w", w), (f"w:{part}", a)], [(f"w:{part}", a), ("w", w)]):
        with pytest.raises(ValueError, match=f"leaf 'w:{part}' has the name of a tensor kept for 'w'"):
            sapp.save(tmp_path / "a", collections.OrderedDict(items))
    with pytest.raises(ValueError, match="'__metadata__' has the name"):
        sapp.save(tmp_path / "a", {"__metadata__": a})
    fine = {"w": w, "v": {f"w:{part}": a}, "w:bias": a}
    sapp.save(tmp_path / "a", fine)
    assert_same(sapp.load(tmp_path / "a"), fine)


@pytest.mark.parametrize("scale", [np.nan, np.inf, 1e38])
def test_scales_of_another_range_are_refused(tmp_path, scale):
    def change(kernel, tensors):
        kernel["storage"] = "int8"
        tensors["k:blocks"] = np.full(48, 127, np.int8)
        tensors["k:scales"] = np.array([1, scale, 1], np.float32)

    hostile(tmp_path / "a", change)
    with pytest.raises(ValueError, match=r"a: kernel 'k' is damaged: .*not finite in float32, which int8 never has"):
        sapp.load(tmp_path / "a")


def test_scales_are_those_of_int8_alone(tmp_path):
    hostile(tmp_path / "a", lambda k, t: t.update({"k:scales": np.ones(3, np.float32)}))
    np.testing.assert_array_equal(sapp.load(tmp_path / "a")["k:scales"], np.ones(3))


@pytest.mark.parametrize("x64", [False, True])
def test_dtypes_come_back_bit_by_bit(tmp_path, x64):
    rng = np.random.default_rng(0)
    tree = {name: np.asarray(3 * rng.normal(size=(3, 2)) ** 2).astype(name) for name in serialization.STORABLE}
    tree |= {"scalar": np.int64(2**40), "empty": np.zeros((0, 3))}
    layout = Layout((10, 8), (4, 4), np.array([0, 2, 1]), np.array([0, 2, 3]))
    blocks = rng.normal(size=(3, 4, 4)) * layout.real
    with jax.enable_x64(x64):
        tree["kernel"] = BlockSparse(jnp.asarray(blocks) if x64 else blocks, layout)
        sapp.save(tmp_path / "a", tree | {"turned": np.arange(3.0).astype(">f4")})
        loaded = sapp.load(tmp_path / "a")
        np.testing.assert_array_equal(loaded.pop("turned"), np.arange(3.0))
        assert_same(loaded, tree)
        assert isinstance(loaded["float64"], jax.Array) == x64
        assert isinstance(loaded["float32"], jax.Array)
        full = sapp.todense(loaded)["kernel"]
        assert full.dtype == np.float64
        np.testing.assert_array_equal(BlockSparse.fromdense(np.asarray(full), 4).layout.indices, layout.indices)
        np.testing.assert_array_equal(full[:4, :4], blocks[0])
        np.testing.assert_array_equal(full[8:, :4], blocks[1, :2])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int4", "complex128", "str"])
def test_dtypes_that_cannot_be_stored(tmp_path, dtype):
    leaf = np.array(["a"]) if dtype == "str" else np.ones((4, 4), jnp.dtype(dtype))
    with pytest.raises(ValueError, match=r"leaf 'x/y' is .*, which cannot be stored: make it one of bool, int8"):
        sapp.save(tmp_path / "a", {"x": {"y": leaf}})
    with pytest.raises(ValueError, match="leaf 'x' is key<fry>, which cannot be stored"):
        sapp.save(tmp_path / "a", {"x": jax.random.key(0)})
    if dtype.startswith("float8"):
        sparse = BlockSparse(leaf[None], Layout((4, 4), (4, 4), np.array([0]), np.array([0, 1])))
        with pytest.raises(ValueError, match=f"leaf 'k' is {dtype}"):
            sapp.save(tmp_path / "a", {"k": sparse})
    assert not list(tmp_path.iterdir())


def test_keys_may_hold_any_text(tmp_path):
    w = BlockSparse.fromdense(np.kron(np.eye(3, 2), np.ones((4, 4))).astype(np.float32), 4)
    tree = {
        "mlp/~/linear_0": {"w": w, "b": jnp.ones(2)},  # Haiku's names
        "mlp": {"~": {"linear_0": {"w": jnp.zeros(3), "b": w}}},  # the same but for what the slashes are
        **{key: jnp.full((2,), i) for i, key in enumerate(["~0", "~1", "~01", "/", "//", "a~1b", "", "a:blocks"])},
    }
    saved = sapp.save(tmp_path / "a", tree, storage="bfloat16")
    assert set(saved.errors) == {"mlp~1~0~1linear_0/w", "mlp/~0/linear_0/b"}
    assert_same(sapp.load(tmp_path / "a"), tree)
    assert_same(sapp.load(tmp_path / "a", like=tree), tree)


def test_a_tilde_in_older_files_stands_for_itself(tmp_path):
    def written(names, version):
        hostile(
            tmp_path / "a",
            lambda k, t: t.update({name: np.ones(3, np.float32) for name in names}),
            lambda about: about | {"format": version},
        )
        return sapp.load(tmp_path / "a").keys() - {"k"}

    assert written(["a~0", "a~1b", "~"], "block-sparse 1") == {"a~0", "a~1b", "~"}
    assert written(["a~0", "a~1b"], "block-sparse 2") == {"a~", "a/b"}
    like = {"k": 0, "a~0": 1}
    written(["a~0"], "block-sparse 1")
    assert sapp.load(tmp_path / "a", like=like).keys() == like.keys()


def test_plain_names_are_written_in_the_first_format(tmp_path):
    sapp.save(tmp_path / "a", {"a": {"b": jnp.ones(2)}})
    with safetensors.safe_open(tmp_path / "a", "numpy") as file:
        assert json.loads(file.metadata()["sa_plus_plus"])["format"] == "block-sparse 1"
        assert list(file.keys()) == ["a/b"]


@pytest.mark.parametrize(
    ("dtype", "value", "storage", "message"),
    [
        ("float64", 1e300, "bfloat16", "weights up to 1e\\+300, too large for bfloat16"),
        ("float64", 1e300, "int8", "weights up to 1e\\+300, too large for int8"),
        ("float32", 3.4e38, "bfloat16", "too large for bfloat16"),
        ("float16", 65504, "bfloat16", "too large for bfloat16"),  # 65536 in bfloat16
        ("float32", 1e-44, "int8", "weights up to 1e-44, too small for int8"),
        ("float32", np.inf, "bfloat16", "not finite, which bfloat16 cannot hold"),
        ("int32", 7, "int8", "is int32, and int8 is for floating types"),
        ("complex64", 1j, "bfloat16", "is complex64, and bfloat16 is for floating types"),
    ],
)
def test_what_narrow_storage_cannot_hold(tmp_path, dtype, value, storage, message):
    layout = Layout((4, 8), (4, 4), np.array([0, 0]), np.array([0, 1, 2]))
    blocks = np.ones((2, 4, 4), dtype)
    blocks[1] = value
    tree = {"k": BlockSparse(blocks, layout)}
    with pytest.raises(ValueError, match=f"kernel 'k' .*{message}.*use storage=\"exact\""):
        sapp.save(tmp_path / "a", tree, storage=storage)
    assert sapp.save(tmp_path / "a", tree).errors == {"k": 0.0}
    assert_same(sapp.load(tmp_path / "a"), tree)


@pytest.mark.parametrize("value", [1e-200, 1e30, 0.0])
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_errors_are_right_far_from_one(tmp_path, value, storage):
    if (value, storage) == (1e-200, "int8"):
        return  # refused
    layout = Layout((4, 4), (4, 4), np.array([0]), np.array([0, 1]))
    blocks = np.random.default_rng(0).normal(size=(1, 4, 4)) * value
    saved = sapp.save(tmp_path / "a", {"k": BlockSparse(blocks, layout)}, storage=storage)
    back = np.asarray(sapp.load(tmp_path / "a")["k"].blocks)
    want = np.linalg.norm((back - blocks) / (value or 1)) / (np.linalg.norm(blocks / (value or 1)) or 1)
    assert saved.errors["k"] == pytest.approx(want, rel=1e-6)
    assert want == (1 if value == 1e-200 else pytest.approx(0, abs=0.01))  # bfloat16 holds nothing so small


def test_what_is_too_large_to_load_is_not_saved(tmp_path):
    w = BlockSparse(jnp.ones((1, 2**13, 2**13), jnp.bfloat16), Layout((1, 1), (2**13, 2**13), [0], [0, 1]))
    with pytest.raises(ValueError, match=r"kernel 'k' cannot be stored: its 1 blocks of .* are nearly all padding"):
        sapp.save(tmp_path / "a", {"k": w})


def test_a_block_of_negative_zeros_is_not_kept(tmp_path):
    w = BlockSparse.fromdense(jnp.full((4, 4), -0.0), 4)
    sapp.save(tmp_path / "a", {"k": w})
    back = np.asarray(sapp.todense(sapp.load(tmp_path / "a"))["k"])
    assert not np.signbit(back).any()


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
    nan = BlockSparse.fromdense(jnp.full((8, 8), jnp.nan), 4)
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
