"""Served files that are forged or damaged: what they say is checked, and what their programs call."""

import dataclasses
import json
import pickle
import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import sa_plus_plus as sapp
from sa_plus_plus import serve
from sa_plus_plus.sparse import native
from sa_plus_plus.sparse.files import container

pytestmark = pytest.mark.filterwarnings("ignore:specialize found no")  # of functions without kernels


def saved(fn, *example):
    return sapp.specialize(fn, *example, mode="never")


@pytest.mark.parametrize("key", ["format", "jax", "platforms", "calling_convention", "inputs", "networks"])
@pytest.mark.parametrize("value", [None, {}, [[None]], 1.5, [{"weights": [0.5], "table": ""}], [{"weights": ["0"]}]])
def test_what_a_file_says_of_itself_is_checked(key, value, tmp_path):
    saved(jnp.sin, jnp.ones(3)).save(tmp_path / "file")
    tensors, header = container.read(tmp_path / "file")
    said = json.loads(tensors["about"].tobytes()) | {key: value}
    container.write(tmp_path / "file", tensors | {"about": np.frombuffer(json.dumps(said).encode(), np.uint8)}, header)
    with pytest.raises(ValueError, match=rf"{tmp_path}/file is damaged: about.*{key}"):
        serve.load(tmp_path / "file")


def test_a_file_of_several_networks_that_do_not_go_together(tmp_path):
    serve.save(tmp_path / "file", [saved(jnp.sin, jnp.ones((n, 3))) for n in (1, 2)])
    right, header = container.read(tmp_path / "file")
    for names, message in [
        (("programs/1", "programs/0"), "not in order of their batches"),
        (("programs/0", "programs/0"), "two networks have the same batch size: 1, 1"),
    ]:
        tensors = right | {f"programs/{i}": right[name] for i, name in enumerate(names)}
        container.write(tmp_path / "file", tensors, header)
        with pytest.raises(ValueError, match=f"file is damaged: .*{message}"):
            serve.load(tmp_path / "file")
    container.write(tmp_path / "file", right | {"weights/9": np.ones(2)}, header)
    with pytest.raises(ValueError, match="file is damaged: no network has the tensor 'weights/9'"):
        serve.load(tmp_path / "file")
    del right["programs/1"]
    container.write(tmp_path / "file", right, header)
    with pytest.raises(ValueError, match="file is damaged: it has no tensor 'programs/1'"):
        serve.load(tmp_path / "file")


@dataclasses.dataclass
class Forged:
    """What `save` takes for a network."""

    fn: Any
    weights: Any = ()
    examples: Any = (jax.ShapeDtypeStruct((3, 3), np.float32),)


@pytest.mark.parametrize("target", ["evil", 'q"uo\\te', "a @b", "é", "AllocateBuffer", "xla_ffi_python_cpu_callback"])
@pytest.mark.parametrize("within", [False, True])
def test_programs_call_this_package_alone(target, within, tmp_path, monkeypatch):
    def call(x):
        return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    fn = (
        (lambda weights, x: jax.lax.while_loop(lambda x: x.sum() < 1, call, x))
        if within
        else lambda weights, x: call(x)
    )
    monkeypatch.setattr(native, "CALL_TARGETS", (*native.CALL_TARGETS, target))  # or the forger's `save` would refuse
    serve.save(tmp_path / "file", Forged(fn))
    monkeypatch.undo()
    want = f"{tmp_path}/file calls {target!r}, with which a forged file could crash the process"
    with pytest.raises(ValueError, match=re.escape(want)):
        serve.load(tmp_path / "file")
    serve.load(tmp_path / "file", custom_calls=[target])  # is not run


def test_linear_algebra_is_for_files_that_one_trusts(tmp_path):
    def fn(x):
        return jnp.linalg.solve(x.T @ x + jnp.eye(3), x.T)

    network = saved(fn, jnp.ones((3, 3)))
    network.save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"load it with custom_calls=\['lapack_sgetrf_ffi', 'lapack_strsm_ffi'\]"):
        serve.load(tmp_path / "file")
    loaded = serve.load(tmp_path / "file", custom_calls=["lapack_sgetrf_ffi", "lapack_strsm_ffi"])
    for again in (loaded, pickle.loads(pickle.dumps(loaded)), pickle.loads(pickle.dumps(network))):
        np.testing.assert_array_equal(again(jnp.ones((3, 3))), network(jnp.ones((3, 3))))


def test_programs_that_do_not_fit_their_file(tmp_path):
    w = jnp.ones((3, 3))
    serve.save(tmp_path / "file", Forged(lambda weights, x: x @ weights[0], [w]))
    right, header = container.read(tmp_path / "file")
    serve.save(tmp_path / "other", Forged(lambda weights, x: x + weights[0][0, 0], [jnp.ones((3, 4))]))
    for name in ("weights/0", "programs/0"):
        other, _ = container.read(tmp_path / "other")
        container.write(tmp_path / "file", right | {name: other[name]}, header)
        with pytest.raises(ValueError, match="file is damaged: a program does not take the weights beside it"):
            serve.load(tmp_path / "file")
    program = jax.export.deserialize(bytearray(right["programs/0"]))
    module = jax.export.deserialize(bytearray(other["programs/0"])).mlir_module_serialized
    changed = {
        "takes or returns other arrays than are stated beside it": {"mlir_module_serialized": module},
        "is for": {"platforms": ("tpu",)},
        "has the calling convention": {"calling_convention_version": program.calling_convention_version - 1},
    }
    for message, change in changed.items():
        forged = np.frombuffer(dataclasses.replace(program, **change).serialize(), np.uint8)
        container.write(tmp_path / "file", right | {"programs/0": forged}, header)
        with pytest.raises(ValueError, match=f"file is damaged: a program {message}"):
            serve.load(tmp_path / "file")
    container.write(tmp_path / "file", right | {"programs/0": right["programs/0"][:100]}, header)
    with pytest.raises(ValueError, match=r"file was written with jax .*, jax .* cannot read its program"):
        serve.load(tmp_path / "file")


def test_each_kind_of_file_names_its_reader(tmp_path):
    saved(jnp.sin, jnp.ones(3)).save(tmp_path / "network")
    for like in (None, {"about": 0}):
        with pytest.raises(
            ValueError, match=r"network holds a specialised network, not parameters: read it by sapp.serve"
        ):
            sapp.load(tmp_path / "network", like)
    sapp.save(tmp_path / "parameters", {"about": np.zeros(3, np.uint8), "programs": jnp.ones(3)})
    assert sapp.load(tmp_path / "parameters").keys() == {"about", "programs"}
    with pytest.raises(ValueError, match="holds parameters, not a network"):
        serve.load(tmp_path / "parameters")


def test_random_keys_are_arguments_too(tmp_path):
    serve.save(
        tmp_path / "file",
        Forged(lambda weights, key: (jax.random.normal(key, (2,)), key), (), (jax.eval_shape(jax.random.key, 0),)),
    )
    fast = serve.load(tmp_path / "file")
    np.testing.assert_array_equal(fast(jax.random.key(3))[0], jax.random.normal(jax.random.key(3), (2,)))
    with pytest.raises(ValueError, match=r"made for key<fry>\[\]; got float32\[2\]: convert them to the types"):
        fast(np.ones(2, np.float32))
