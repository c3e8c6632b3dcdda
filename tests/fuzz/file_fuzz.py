"""Files made to harm, with right checksums: the readers return or say in a sentence what is wrong, and nothing else.

    python tests/fuzz/file_fuzz.py --seed=0 --count=100000

`run(seed, count)` makes that many, each from a right file by one to three changes: to the header of the container, the
description of kernels, the tensors, or what a served network says of itself and its program.
"""

import argparse
import collections
import functools
import hashlib
import json
import os
import pathlib
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import sa_plus_plus as sapp
from sa_plus_plus import serve
from sa_plus_plus.sparse import BlockSparse, Layout, native
from sa_plus_plus.sparse.files import container

DTYPES = {
    np.dtype(dtype): name
    for name, dtype in {
        **{
            "BOOL": bool,
            "U8": "u1",
            "I8": "i1",
            "U16": "u2",
            "I16": "i2",
            "U32": "u4",
            "I32": "i4",
            "U64": "u8",
            "I64": "i8",
        },
        **{"F16": "f2", "BF16": ml_dtypes.bfloat16, "F32": "f4", "F64": "f8", "C64": "c8"},
    }.items()
}
NUMBERS = [0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**40]
ODD = [
    None,
    True,
    False,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "4",
    "\0",
    "é\u2028",
    "\ud800",
    [],
    {},
    [[]],
    [0],
]
WORDS = [
    "float32",
    "bfloat16",
    "int8",
    "uint8",
    "exact",
    "block-sparse 1",
    "block-sparse 3",
    "cpu",
    "cuda",
    "about",
    "k/kernel",
]
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class File(NamedTuple):
    """Tensors, and what the metadata says of them."""

    tensors: dict[str, np.ndarray]
    about: dict[str, Any]


def parameters() -> list[File]:
    """Right files of parameters, in every storage, with a view, escaped keys and other leaves."""
    rng = np.random.default_rng(0)

    def kernel(shape: tuple[int, ...], block: tuple[int, int], view: Any = None) -> BlockSparse:
        read = None if view is None else sapp.views.as_view(view, len(shape))
        mask = rng.random(sapp.blocks.full_grid(shape, block, read)) < 0.5
        return BlockSparse.fromdense(rng.normal(size=shape).astype(np.float32), block, mask, view)

    plain = {"k": {"kernel": kernel((12, 8), (4, 4)), "bias": np.ones(8, np.float32)}, "steps": np.int32(7)}
    others = {name: np.ones(2, name) for name in ("bool", "int8", "uint16", "int64", "float16", "complex64")}
    viewed = {"q": kernel((2, 12, 3, 4), (4, 4), "[l] d h k -> [l] d (h k)"), "mlp/~": kernel((9, 7), (2, 5)), **others}
    return [_written(lambda path, a=a: sapp.save(path, *a[:1], storage=a[1])) for a in (
        (plain, "exact"), (plain, "bfloat16"), (plain, "int8"), (viewed, "exact"), ({}, "exact"),
    )]  # fmt: skip


def networks() -> list[File]:
    """Right files of one and of two networks."""
    w = np.kron(np.eye(4), np.ones((8, 8))).astype(np.float32)
    mode = "never" if native.unavailable_reason() else "always"
    several = [sapp.specialize(lambda x: {"y": jax.nn.relu(x @ w) @ w}, jnp.ones((n, 32)), mode=mode) for n in (1, 4)]
    return [_written(lambda path, some=some: serve.save(path, some)) for some in (several[:1], several)]


def _written(write: Callable[[pathlib.Path], Any]) -> File:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "file")
        write(path)
        tensors, about = container.read(path)
    return File(tensors, about)


@functools.cache
def programs() -> dict[str, bytes]:
    """Programs that no network has, by what they do."""

    def program(call: Callable[..., Any], *examples: Any, targets: tuple[str, ...] = ()) -> bytes:
        allowed = [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]
        return bytes(jax.export.export(jax.jit(call), disabled_checks=allowed)(*examples).serialize())

    x = jax.ShapeDtypeStruct((1, 32), np.float32)
    named = (
        "evil",
        'q"uo\\te',
        "a @b",
        "é",
        "Sharding",
        "AllocateBuffer",
        "xla_ffi_python_cpu_callback",
        "tpu_custom_call",
    )
    calls = {
        name: program(lambda w, x, name=name: jax.ffi.ffi_call(name, x)(x), [w_like()] * 2, x, targets=(name,))
        for name in named
    }
    within = program(
        lambda w, x: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: jax.ffi.ffi_call("evil", x)(x), x),
        *([w_like()] * 2, x),
        targets=("evil",),
    )
    return calls | {
        "within a loop": within,
        "lapack": program(lambda w, x: x * jnp.linalg.cholesky(x[:, :4].T @ x[:, :4])[0, 0], [w_like()] * 2, x),
        "no weights": program(lambda w, x: x, [], x),
        "other weights": program(lambda w, x: x + w[0].sum(), [x, x], x),
        "no list": program(lambda x: x, x),
    }


def w_like() -> jax.ShapeDtypeStruct:
    """The shape of a network's first weights."""
    return jax.ShapeDtypeStruct(_bases()[1][0].tensors["weights/0"].shape, np.float32)


@functools.cache
def _bases() -> tuple[list[File], list[File]]:
    return parameters(), networks()


def changed_json(rng: random.Random, value: Any) -> Any:
    """A tree of JSON with a change at a random one of its nodes."""
    path = rng.choice([*_paths(value)])
    if not path:
        return _changed_value(rng, value)
    value = json.loads(json.dumps(value))
    *parents, key = path
    parent = functools.reduce(lambda node, k: node[k], parents, value)
    match rng.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.insert(key, rng.choice(parent))
        case 1:
            parent[rng.choice(WORDS)] = parent.pop(key)
        case _:
            parent[key] = _changed_value(rng, parent[key])
    return value


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _paths(value[key], (*path, key))


def _changed_value(rng: random.Random, value: Any) -> Any:
    if type(value) is int and rng.random() < 0.7:
        return rng.choice([value + 1, value - 1, -value, value * rng.choice(NUMBERS), rng.choice(NUMBERS)])
    return rng.choice(rng.choice([NUMBERS, ODD, WORDS]))


def changed_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """A tensor with other entries, length, shape or type."""
    flat = array.reshape(-1).copy()
    match rng.randrange(6):
        case 0 if flat.size:
            flat.view(np.uint8)[rng.randrange(flat.nbytes)] ^= 1 << rng.randrange(8)
        case 1 if flat.size and flat.dtype == np.int32:
            flat[rng.randrange(flat.size)] = rng.choice([n for n in NUMBERS if abs(n) < 2**31])
        case 2:
            flat = flat[: rng.randrange(flat.size + 1)]
        case 3:
            return np.resize(flat, flat.size + rng.randrange(1, 9))
        case 4:
            with np.errstate(all="ignore"):
                return array.real.astype(rng.choice(list(DTYPES)))
        case _:
            return array.reshape(rng.choice([(-1, 1), (1, -1), (1, 1, -1), (*array.shape, 1)]))
    return flat if flat.size != array.size else flat.reshape(array.shape)


def changed_network(rng: random.Random, tensors: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    """Something else that a served file says, or another program."""
    if rng.random() < 0.7:
        said = changed_json(rng, json.loads(right["about"].tobytes()))
        tensors["about"] = np.frombuffer(_text(rng, said).encode("utf-8", "surrogatepass"), np.uint8)
        return
    name = "programs/0"
    other = bytearray(rng.choice(list(programs().values())) if rng.random() < 0.5 else right[name].tobytes())
    if rng.random() < 0.5:
        for _ in range(rng.choice([1, 1, 2, 4])):
            other[rng.randrange(len(other))] = rng.randrange(256)
    if _has_a_right_module(other):  # MLIR's reader is not made for others: some of them end the process
        tensors[name] = np.frombuffer(bytes(other), np.uint8)


def _has_a_right_module(program: bytearray) -> bool:
    try:
        module = jax.export.deserialize(program).mlir_module_serialized
    except Exception:
        return True  # so that none is read
    return hashlib.sha256(module).digest() in _modules()


@functools.cache
def _modules() -> set[bytes]:
    right = [
        file.tensors[name].tobytes() for file in _bases()[1] for name in file.tensors if name.startswith("programs/")
    ]
    everything = [jax.export.deserialize(bytearray(p)) for p in (*right, *programs().values())]
    return {hashlib.sha256(program.mlir_module_serialized).digest() for program in everything}


def _text(rng: random.Random, value: Any) -> str:
    """JSON, now and then with a key twice, nested too deeply, or cut."""
    text = json.dumps(value)
    match rng.randrange(60):
        case 0:
            return text.replace("{", '{"format": 1, "kind": 2, "shape": [], ', 1)
        case 1:
            return "[" * rng.choice([10, 990, 100_000])
        case 2:
            return text[: rng.randrange(len(text))]
    return text


def content(rng: random.Random, file: File) -> bytes:
    """The bytes of a file, with right checksums, and changes to the container's own header."""
    checksums = {name: container.digest(tensor) for name, tensor in file.tensors.items()}
    about: Any = {key: value for key, value in file.about.items() if key != "sha256"}
    if rng.random() < (0.5 if about["kernels"] else 0.05):
        about = changed_json(rng, about)
    if isinstance(about, dict):
        about["sha256"] = checksums if rng.random() < 0.95 else changed_json(rng, checksums)
    text = _text(rng, about)
    checksum = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    header: Any = {"__metadata__": {"sa_plus_plus": text, "sha256": checksum}}
    data = b""
    for name, tensor in file.tensors.items():
        raw = tensor.tobytes()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    if rng.random() < 0.15:
        header = changed_json(rng, header)
    head = _text(rng, header) if rng.random() < 0.05 else json.dumps(header)
    if rng.random() < 0.02:
        head = head.replace('{"', '{"k:index": {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]}, "', 1)
    encoded = head.encode()
    length = len(encoded) if rng.random() < 0.98 else rng.choice([n % 2**64 for n in NUMBERS])
    whole = length.to_bytes(8, "little") + encoded + data
    return whole if rng.random() < 0.98 else whole[: rng.randrange(len(whole) + 1)] + b"\0" * rng.choice([0, 8])


def case(seed: int, number: int, path: pathlib.Path) -> str:
    """Write one file, read it, and say what came of it.

    Raises:
      AssertionError: if anything but a documented error with the file's name came of it, with what reproduces it.
    """
    rng = random.Random((seed << 32) + number)
    served = rng.random() < 0.1  # a program takes as long as thirty headers
    base = rng.choice(_bases()[served])
    file = File(dict(base.tensors), base.about)
    for _ in range(rng.choice([0, 1, 1, 2])):
        if served and rng.random() < 0.7:
            changed_network(rng, file.tensors, base.tensors)
        elif file.tensors:
            name = rng.choice(list(file.tensors))
            if not name.startswith("programs/"):
                file.tensors[name] = changed_array(rng, file.tensors[name])
    path.write_bytes(content(rng, file))
    reader = serve.load if served != (rng.random() < 0.05) else sapp.load
    try:
        result = reader(path)
    except (ValueError, RuntimeError) as error:
        kind = type(error)
        right = kind is ValueError or (kind is RuntimeError and native.unavailable_reason())
        if right and str(path) in str(error) and len(str(error)) < 10_000:
            return f"{reader.__module__}: refused"
        raise AssertionError(f"case({seed}, {number}) ended in {kind.__name__}: {error}") from error
    except BaseException as error:
        raise AssertionError(f"case({seed}, {number}) ended in {type(error).__name__}: {error}") from error
    for leaf in jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, BlockSparse)):
        if isinstance(leaf, BlockSparse):
            assert leaf.blocks.shape == (leaf.nse, *leaf.layout.block), f"case({seed}, {number}) has other blocks"
            Layout(leaf.shape, leaf.layout.block, leaf.indices, leaf.indptr, leaf.layout.view)
    return f"{reader.__module__}: read"


def run(seed: int, count: int) -> dict[str, int]:
    """Read `count` files made to harm. Returns how many had which outcome.

    Raises:
      AssertionError: at the first that has no right outcome, with its seed and number.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        path = pathlib.Path(folder, "file")
        for number in range(count):
            outcomes[case(seed, number, path)] += 1
    return dict(outcomes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100_000)
    options = parser.parse_args()
    print(run(options.seed, options.count))
    sys.exit(0)
