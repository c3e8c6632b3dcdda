"""What a tree holds: zeros, blocks and bytes, against NumPy and the sizes of files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_plus_plus as sapp


@pytest.fixture(scope="module")
def tree():
    """A network of which one kernel is pruned, ragged, and one leaf is no array."""
    w = np.random.default_rng(0).normal(size=(30, 50)).astype(np.float32)
    return {
        "a": {"kernel": sapp.prune(w, block=(4, 8), sparsity=0.75), "bias": np.zeros(50, np.float32)},
        "b": {"kernel": np.ones((50, 3), np.float16)},
        "count": 3,
    }


def test_a_tree_without_a_plan(tree):
    found = sapp.summary(tree)
    kernel, dense = tree["a"]["kernel"], tree["b"]["kernel"]
    assert [leaf.path for leaf in found.kernels] == ["a/kernel", "b/kernel"]
    a, b = found.kernels
    assert (a.layer.block, a.layer.grid, a.zeros) == ((4, 8), (8, 7), np.sum(kernel == 0))
    occupied = np.add.reduceat(np.add.reduceat(np.abs(kernel), np.arange(0, 30, 4), 0), np.arange(0, 50, 8), 1) > 0
    assert (a.layer.blocks, a.layer.kept) == (56, occupied.sum()) == (56, 14)
    assert (b.has_blocks, b.zeros, b.bytes, b.stored_bytes) == (False, 0, dense.nbytes, dense.nbytes)
    assert found.sparsity == pytest.approx(np.sum(kernel == 0) / (kernel.size + dense.size))
    assert found.bytes == kernel.nbytes + dense.nbytes + 200


def test_bytes_by_blocks_are_those_of_a_file(tree, tmp_path):
    arrays = {key: tree[key] for key in "ab"}
    exported = sapp.export(arrays, sapp.plan(arrays, block=(4, 8), sparsity=0.75, min_blocks=50))
    sapp.save(tmp_path / "file", exported)
    content = (tmp_path / "file").read_bytes()
    head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    stored = max(tensor["data_offsets"][1] for name, tensor in head.items() if name != "__metadata__")
    assert sapp.summary(arrays).stored_bytes == sapp.summary(exported).stored_bytes == stored
    assert sapp.summary(exported).kernels[0].layer.block == (4, 8)


def test_blocks_that_are_asked_for(tree):
    counted = sapp.summary(tree, block=2).kernels[0]
    kernel = tree["a"]["kernel"]
    assert counted.layer.kept == sum(
        kernel[i : i + 2, j : j + 2].any() for i in range(0, 30, 2) for j in range(0, 50, 2)
    )


def test_views_stacks_and_shapes_alone(tree):
    stacked = {"x": np.stack([tree["a"]["kernel"].T, 1 + np.zeros((50, 30), np.float32)])}
    leaf = sapp.summary(stacked, views={"x": "[l] o i -> [l] i o"}).kernels[0]
    assert (leaf.layer.full_grid, leaf.layer.kept, leaf.layer.block) == ((2, 8, 7), 14 + 56, (4, 8))
    shapes = sapp.summary(jax.eval_shape(lambda: {"kernel": jnp.ones((4, 5))}))
    assert (shapes.kernels[0].zeros, shapes.bytes) == (None, 80)
    assert np.isnan(shapes.sparsity)


def test_what_is_printed(tree):
    line, _, head, _, *rows = str(sapp.summary(tree)).splitlines()
    zeros = np.sum(tree["a"]["kernel"] == 0) / 1650
    assert line.startswith(f"1 of 2 kernels have blocks of zeros; {zeros:.2%} of 1,650 kernel weights are zero; 6.5 kB")
    assert line.endswith("by blocks 2.3 kB (2 scalars and vectors not shown)")
    assert head.split()[:3] == ["path", "shape", "dtype"]
    assert [row.split()[0] for row in rows] == ["a/kernel", "b/kernel"]
    assert "count" in sapp.summary(tree).table(all=True)


def test_what_has_no_summary(tree):
    with pytest.raises(ValueError, match="no leaves"):
        sapp.summary({})
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda w: sapp.summary({"w": w}).bytes)(jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="block"):
        sapp.summary(tree, block=0)
