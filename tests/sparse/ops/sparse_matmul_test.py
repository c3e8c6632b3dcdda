"""Products with block-sparse kernels: all implementations against NumPy, exactly; gradients, batching, errors."""

import concurrent.futures
import functools
import inspect
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import warnings

import hypothesis
import jax
import jax.numpy as jnp
import jaxlib
import kernel_fuzz
import numpy as np
import pytest
from hypothesis import strategies as st

import sa_plus_plus.sparse.ops.matmul as matmul
from sa_plus_plus import blocks as blk
from sa_plus_plus.sparse import BlockSparse, Layout, block_sparse_matmul
from sa_plus_plus.sparse.ops import native, xla

needs_native = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
IMPLEMENTATIONS = ["xla", pytest.param("native", marks=needs_native), "dense"]
CASES = {  # rows, columns, block, batch, share of blocks kept
    "square": (64, 64, 16, 5, 0.3),
    "ragged": (37, 45, (8, 20), 13, 0.4),
    "many rows": (40, 24, 8, 70, 0.5),
    "wide blocks": (33, 100, (5, 64), 3, 0.4),
    "wider than the matrix": (3, 5, (8, 9), 2, 1.0),
    "one row": (96, 64, 32, 1, 0.3),
    "all kept": (32, 48, 16, 33, 1.0),
    "none kept": (32, 48, 16, 4, 0.0),
    "convolution": ((3, 3, 4), 16, 4, 6, 0.4),
}


def eighths(rng, shape):
    """Numbers of which products and sums are exact in float32, so that results can be held to equality."""
    return (rng.integers(-16, 17, shape) / 8).astype(np.float32)


def problem(rows, cols, block, batch, density, seed=0, dtype=np.float32):
    """`x`, a block-sparse kernel, its matrix and a bias, of numbers that bfloat16 has too."""
    rng = np.random.default_rng(seed)
    shape = (*(rows if isinstance(rows, tuple) else (rows,)), cols)
    block = blk.as_block(block)
    mask = rng.random(blk.grid_shape(shape, block)) < density
    spread = np.repeat(np.repeat(mask, block[0], 0), block[1], 1)[: math.prod(shape[:-1]), :cols]
    matrix = eighths(rng, spread.shape) * spread
    w = BlockSparse.fromdense(matrix.reshape(shape).astype(dtype), block, mask)
    x, bias = eighths(rng, (batch, len(matrix))), eighths(rng, cols)
    return jnp.asarray(x, dtype), w, matrix.astype(np.float64), jnp.asarray(bias)


def expected(x, matrix, bias=None, relu=False):
    y = np.asarray(x, np.float64) @ matrix + (0 if bias is None else np.asarray(bias, np.float64))
    return jnp.asarray((np.maximum(y, 0) if relu else y).astype(np.float32), x.dtype)


product = jax.jit(block_sparse_matmul, static_argnames=("relu", "implementation"))  # one program for each shape


@functools.partial(jax.jit, static_argnames="implementation")
def with_gradients(x, w, bias, g, implementation):
    """`relu(x w + bias)` and the gradients of `g` times it."""
    y, pull = jax.vjp(
        lambda x, w, b: block_sparse_matmul(x, w, bias=b, relu=True, implementation=implementation), x, w, bias
    )
    return y, *pull(g)


def same(left, right):
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_product_and_gradients_are_exact(name, dtype, implementation):
    x, w, matrix, bias = problem(*CASES[name], dtype=dtype)
    same(product(x, w, implementation=implementation), expected(x, matrix))
    g = jnp.asarray(eighths(np.random.default_rng(1), (len(x), matrix.shape[1])), dtype)
    y, dx, dw, db = with_gradients(x, w, bias, g, implementation)
    same(y, expected(x, matrix, bias, relu=True))
    g = np.asarray(g, np.float64) * (np.asarray(y, np.float64) > 0)
    same(dx, expected(jnp.asarray(g, dtype), matrix.T))
    full = BlockSparse.fromdense(
        (np.asarray(x, np.float64).T @ g).astype(np.float32).reshape(w.shape), w.layout.block, w.layout.mask
    )
    same(dw.blocks, full.blocks.astype(dtype))
    same(db, jnp.asarray(g.sum(0).astype(np.float32)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["ragged", "many rows", "wide blocks", "none kept", "convolution"])
def test_pallas_kernel_by_its_interpreter(name, dtype):
    x, w, matrix, bias = problem(*CASES[name], dtype=dtype)
    same(product(x, w, implementation="pallas"), expected(x, matrix))
    same(product(x, w, bias=bias, relu=True, implementation="pallas"), expected(x, matrix, bias, relu=True))
    ones = jnp.ones((len(x), w.shape[-1]), dtype)
    gradient = jax.jit(lambda x, g: jax.vjp(lambda x: block_sparse_matmul(x, w, implementation="pallas"), x)[1](g)[0])
    dx = gradient(x, ones)
    same(dx, expected(ones, matrix.T))


@pytest.mark.parametrize(
    ("dtype", "implementation"), [(jnp.float32, "pallas"), (jnp.bfloat16, "pallas"), (jnp.bfloat16, None)]
)
def test_pallas_kernel_lowers_for_a_gpu(dtype, implementation, monkeypatch):
    """Down to Triton's language, which takes no GPU; that it runs there takes one. It is what a GPU has by default."""
    x, w, _, bias = problem(*CASES["ragged"], dtype=dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    lowered = jax.jit(lambda x, w: block_sparse_matmul(x, w, bias=bias, relu=True, implementation=implementation))
    device = {}
    if "platform" in inspect.signature(jax.sharding.AbstractDevice).parameters:  # newer versions ask which GPU
        device = {"abstract_device": jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")}
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("one",), **device)):
        program = jax.export.export(lowered, platforms=["cuda"], disabled_checks=unchecked)(x, w).mlir_module()
    assert "block_sparse_matmul" in program and "triton" in program  # noqa: PT018


@hypothesis.given(
    sides=st.tuples(*[st.integers(1, 70)] * 2),
    block=st.tuples(*[st.sampled_from([1, 2, 3, 5, 8, 16, 20, 32, 40])] * 2),
    lead=st.lists(st.sampled_from([0, 1, 2, 3, 7, 33]), max_size=3).map(tuple),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    epilogue=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
@hypothesis.example((1, 3), (16, 2), (7,), 1.0, jnp.bfloat16, (False, False), 0)
def test_any_shape(sides, block, lead, density, dtype, epilogue, seed):
    batch = math.prod(lead)
    hypothesis.assume(batch * math.prod(sides) < 300_000)
    x, w, matrix, bias = problem(*sides, block, batch, density, seed, dtype)
    bias, relu = bias if epilogue[0] else None, epilogue[1]
    wanted = expected(x, matrix, bias, relu).reshape(*lead, sides[1])
    x = x.reshape(*lead, sides[0])
    implementations = ["xla", None] if native.unavailable_reason() or dtype == jnp.float16 else ["xla", "native"]
    for implementation in implementations:
        same(product(x, w, bias=bias, relu=relu, implementation=implementation), wanted)


def test_float64():
    with jax.enable_x64(True):
        x, w, matrix, _ = problem(*CASES["ragged"], dtype=np.float64)
        x = x / 3
        np.testing.assert_allclose(block_sparse_matmul(x, w), np.asarray(x) @ matrix, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_sums_are_kept_in_float32(implementation):
    ones = BlockSparse.fromdense(np.ones((1024, 8), jnp.bfloat16), 8)  # in bfloat16, 256 + 1 = 256
    assert block_sparse_matmul(jnp.ones(1024, jnp.bfloat16), ones, implementation=implementation).tolist() == [1024] * 8


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_makes_one_larger_product(implementation):
    x, w, matrix, bias = problem(*CASES["ragged"])
    x = jnp.stack([x, 2 * x])

    def f(x, w=w, bias=bias):
        return block_sparse_matmul(x, w, bias=bias, relu=True, implementation=implementation)

    wanted = expected(x, matrix, bias, relu=True)
    same(jax.vmap(f)(x), wanted)
    same(jax.vmap(jax.vmap(f))(x), wanted)
    same(jax.vmap(f, in_axes=2, out_axes=2)(jnp.moveaxis(x, 0, 2)), jnp.moveaxis(wanted, 0, 2))
    same(jax.vmap(f, (None, None, 0))(x[0], w, jnp.stack([bias, -bias]))[1], expected(x[0], matrix, -bias, relu=True))
    twice = jax.vmap(f, (0, 0, None))(x, jax.tree.map(lambda b: jnp.stack([b, b]), w), bias)
    same(twice, wanted)
    each = jax.vmap(jax.grad(lambda x, w: jnp.sum(f(x, w)), 1), (0, None))(x, w)
    whole = jax.grad(lambda w: jnp.sum(f(x, w)))(w)
    same(each.blocks.sum(0), whole.blocks)


def test_one_compilation_for_equal_layouts():
    x, w, *_ = problem(*CASES["square"])
    traces = []

    @jax.jit
    def f(x, w):
        traces.append(w.layout)
        return block_sparse_matmul(x, w)

    f(x, w)
    f(x + 1, BlockSparse(2 * w.blocks, Layout(w.shape, w.layout.block, w.layout.indices, w.layout.indptr)))
    assert len(traces) == 1
    f(x, problem(*CASES["square"], seed=1)[1])
    assert len(traces) == 2


def test_rows_on_several_devices():
    x, w, matrix, _ = problem(64, 64, 16, 16, 0.3)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    same(jax.jit(block_sparse_matmul)(spread, w), expected(x, matrix))


def test_a_program_for_another_platform_has_no_kernel_of_this_one():
    x, w, *_ = problem(*CASES["square"])
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(native.CONV)]
    for platform, has in (("cpu", native.unavailable_reason() is None), ("cuda", False), ("tpu", False)):
        exported = jax.export.export(jax.jit(block_sparse_matmul), platforms=[platform], disabled_checks=unchecked)(
            x, w
        )
        assert (native.CONV in exported.mlir_module()) == has


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 1.0])
def test_groups_hold_every_block_once_and_little_padding(density):
    layout = problem(640, 720, (8, 9), 1, density)[1].layout
    groups = xla.groups(layout)
    at = np.concatenate([group.at.ravel() for group in groups])
    assert sorted(at[at < layout.nse]) == list(range(layout.nse))
    assert at.size <= layout.nse / (1 - xla.WASTE)
    for group in groups:
        real = group.at < layout.nse
        np.testing.assert_array_equal(layout.indices[group.at[real]], group.rows[real])
        np.testing.assert_array_equal(layout.columns[group.at[real]], group.columns[np.nonzero(real)[0]])


def test_many_rows_are_taken_in_tiles(monkeypatch):
    monkeypatch.setattr(xla, "LARGE_TILE", 16)
    monkeypatch.setattr(xla, "TILE", 12)
    x, w, matrix, _ = problem(*CASES["many rows"])
    g = jnp.asarray(eighths(np.random.default_rng(1), (len(x), matrix.shape[1])))
    full = BlockSparse.fromdense(np.asarray(x).T @ np.asarray(g), w.layout.block, w.layout.mask)
    same(xla.weight_gradient(x, g, w.layout), full.blocks)
    same(xla.matmul(x, w.blocks, w.layout), expected(x, matrix))


def test_errors():
    x, w, _, bias = problem(*CASES["ragged"])
    for bad, wanted in (
        (lambda: block_sparse_matmul(x[:, :-1], w), r"x must be \(\.\.\., 37\)"),
        (lambda: block_sparse_matmul(jnp.float32(1), w), r"got \(\)"),
        (lambda: block_sparse_matmul(x.astype(jnp.bfloat16), w), "one floating type, got bfloat16 and float32"),
        (lambda: block_sparse_matmul(x.astype(int), w), "one floating type"),
        (lambda: block_sparse_matmul(x, BlockSparse(w.blocks[1:], w.layout)), "blocks must be"),
        (lambda: block_sparse_matmul(x, w, bias=bias[1:]), r"of shape \(45,\)"),
        (
            lambda: block_sparse_matmul(x, w, implementation="cuda"),
            "one of xla, native, pallas, dense or None, got 'cuda'",
        ),
    ):
        with pytest.raises(ValueError, match=wanted):
            bad()
    half = BlockSparse(w.blocks.astype(jnp.float16), w.layout)
    with pytest.raises(ValueError, match="not float16: use implementation='xla'"):
        block_sparse_matmul(x.astype(jnp.float16), half, implementation="native")


def test_without_the_compiled_kernel_there_is_one_notice(monkeypatch):
    x, w, matrix, _ = problem(*CASES["ragged"])
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no compiler was found")
    matmul._notice.cache_clear()
    with pytest.warns(UserWarning, match="no compiler was found"):
        same(block_sparse_matmul(x, w), expected(x, matrix))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(block_sparse_matmul(x[:2], w), expected(x[:2], matrix))
        same(block_sparse_matmul(x, w, implementation="xla"), expected(x, matrix))
    with pytest.raises(RuntimeError, match="no compiler was found; install"):
        block_sparse_matmul(x, w, implementation="native")


@needs_native
def test_a_kernel_for_a_newer_interface_is_not_registered(monkeypatch):
    monkeypatch.setattr(native, "_ffi_version", lambda: 0)
    assert "this jaxlib has 0" in native.unavailable_reason.__wrapped__()


@needs_native
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"rows": [0, 9]}, "outside the grid"),
        ({"rows": [-1, 0]}, "outside the grid"),
        ({"rows": [0]}, "do not match the number of blocks"),
        ({"starts": [0, 3, 2]}, "starts must be non-decreasing"),
        ({"starts": [0, 1, 3]}, "number of blocks"),
        ({"starts": [0, 2]}, "do not match the number of blocks"),
        ({"bias": np.zeros(3, np.float32)}, "bias"),
        ({"out": (1, 1, 4, 16)}, "does not fit the images"),
        ({"out": (1, 3, 16)}, "four dimensions"),
        ({"blocks": np.zeros((2, 8, 8), np.int32)}, "float32"),
        ({"blocks": np.zeros((2, 8, 8, 1), np.float32)}, "number of dimensions"),
        ({"blocks": np.zeros((2, 8, 8), np.int8)}, "types of x and blocks differ"),
        ({"residual": np.zeros((1, 1, 3, 15), np.float32)}, "residual"),
        ({"window_rows": 2}, "does not fit the images"),
        ({"stride_down": 0}, "does not fit the images"),
        ({"top": -1}, "does not fit the images"),
        ({"activation": len(native.ACTIVATIONS)}, "an unknown activation"),
        ({"activation": -1}, "an unknown activation"),
    ],
)
def test_the_kernel_refuses_wrong_buffers(change, wanted):
    call = {"rows": [0, 1], "starts": [0, 1, 2], "bias": np.zeros(0, np.float32), "out": (1, 1, 3, 16)}
    call |= {"blocks": np.ones((2, 8, 8), np.float32), "residual": np.zeros(0, np.float32), **change}
    rows, starts = (np.array(call[name], np.int32) for name in ("rows", "starts"))
    kernel = jax.ffi.ffi_call(native.CONV, jax.ShapeDtypeStruct(call["out"], jnp.float32))
    integers = dict.fromkeys(("window_rows", "window_columns", "stride_down", "stride_across"), 1)
    integers |= dict.fromkeys(("top", "bottom", "left", "right", "activation"), 0)
    options = {name: np.int64(change.get(name, n)) for name, n in integers.items()}
    options |= dict.fromkeys(("residual_scale", "residual_zero", "y_zero", "y_unit"), np.float32(0))
    none = np.zeros(0, np.float32)
    x = np.ones((1, 1, 3, 24), np.float32)
    with pytest.raises((ValueError, RuntimeError), match=wanted):
        jax.block_until_ready(kernel(x, call["blocks"], rows, starts, none, call["bias"], call["residual"], **options))


def fuzzed(programs, directory, machine, supported, each=10_000, emulator=()):
    """Both programs without a complaint of a sanitizer, in all of the supported targets; `each` calls of each kind."""
    for name in kernel_fuzz.target_flags(machine):
        assert not kernel_fuzz.shared_symbols(directory / f"target_{name}.o", name)
    products, calls = programs
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"} if emulator else None
    run = subprocess.run([*emulator, products, str(each // 25)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == f"{each // 25} products in {' '.join(supported)}\n"
    kinds = "convolution", "depthwise", "pooling", "rounding", "lookup", "normalization", "attention", "sequence"
    calling = [*emulator, calls, str(len(kinds) * each)]
    run = subprocess.run(calling, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    counts = json.loads(run.stdout)
    assert set(counts) == {*kinds}
    for kind in counts.values():
        assert kind["checked"] == each > kind["accepted"] >= kind["computed"] > each // 10


@pytest.mark.long
def test_the_kernel_stays_within_its_memory(tmp_path):
    """Its source under the address and undefined-behaviour sanitizers, on random products and calls, without XLA."""
    try:
        programs = kernel_fuzz.build(tmp_path)
    except LookupError as missing:
        pytest.skip(str(missing))
    fuzzed(programs, tmp_path, os.uname().machine, [target.name for target in native.targets() if target.supported])


@pytest.mark.long
def test_targets_of_arm_stay_within_their_memory(tmp_path):
    """The same for another machine, in an emulator: `apt install g++-aarch64-linux-gnu qemu-user`."""
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64")
    if not shutil.which(compiler) or emulator is None:
        pytest.skip(f"{compiler} or qemu-aarch64 is not installed")
    programs = kernel_fuzz.build(tmp_path, compiler=compiler)
    command = [emulator, "-L", "/usr/aarch64-linux-gnu", "-cpu", "max"]
    fuzzed(programs, tmp_path, "aarch64", kernel_fuzz.target_flags("aarch64"), 2000, command)


@pytest.mark.long
@pytest.mark.parametrize(("system", "machine"), [("aarch64-macos", "arm64"), ("x86_64-macos", "x86_64")])
def test_compiles_and_links_for_macos(system, machine, tmp_path, tmp_path_factory):
    """By clang with the headers of macOS: `pip install ziglang`, which has both for every machine."""
    pytest.importorskip("ziglang")
    headers = pathlib.Path(jaxlib.__file__).parent / "include"
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-ignored-optimization-argument"]
    flags = ["-target", system, "-std=c++17", "-O0", "-fPIC", *strict, f"-I{kernel_fuzz.SOURCE}", f"-isystem{headers}"]
    compiler = [sys.executable, "-m", "ziglang", "c++", *flags]
    sources = {file.stem: [file] for file in kernel_fuzz.SOURCE.glob("*.cc") if file.stem != "target"}
    for name, own in kernel_fuzz.target_flags(machine).items():
        # zig names what a processor has in its own way; `-march` there is the processor.
        named = [re.sub(r"-march=armv8\.2-a", "-mcpu=generic+v8_2a", flag) for flag in own]
        sources[f"target_{name}"] = [kernel_fuzz.SOURCE / "target.cc", *named]
    objects = {name: tmp_path / f"{name}.o" for name in sources}
    cache = str(tmp_path_factory.getbasetemp() / "zig")
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}

    def run(command):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ([*compiler, "-c", *sources[name], "-o", objects[name]] for name in sources)))
    library = tmp_path / "native.so"
    run([*compiler[:4], "-target", system, "-shared", *objects.values(), "-o", library])
    assert library.read_bytes()[:4] == bytes.fromhex("cffaedfe")  # Mach-O, 64 bits


@pytest.mark.parametrize("implementation", ["dense", "xla", "native", None])
def test_a_view_whose_outputs_are_not_the_last_axis(implementation):
    rng = np.random.default_rng(0)
    w, x, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 4), (3, 4), (6,)))
    kernel = BlockSparse.fromdense(w, 2, view="o i -> i o")
    got = block_sparse_matmul(jnp.asarray(x), kernel, bias=jnp.asarray(bias), implementation=implementation)
    np.testing.assert_allclose(got, x @ w.T + bias, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"bias must be floating and of shape \(6,\)"):
        block_sparse_matmul(jnp.asarray(x), kernel, bias=jnp.ones(4), implementation=implementation)
