"""Build the wheel, install it for every Python found, without a compiler in reach, and use it. Takes minutes.

    python tests/check_wheel.py [python3.11 python3.12 ...]

Not collected by pytest. Without arguments: this Python and those of pyenv from 3.11 on, one for each minor version.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECK = """
import pathlib, shutil, sys, tempfile
import jax, jax.numpy as jnp, numpy as np, sa_plus_plus as sapp
from sa_plus_plus.sparse.ops import native

assert not any(map(shutil.which, ("cc", "gcc", "g++", "c++", "clang", "clang++"))), "a compiler is in reach"
assert native.unavailable_reason() is None, native.unavailable_reason()
rng = np.random.default_rng(0)
w = jnp.asarray(np.kron(rng.random((16, 16)) < 0.4, np.ones((16, 16))) * rng.normal(size=(256, 256)), jnp.float32)
x = jnp.asarray(rng.normal(size=(3, 256)), jnp.float32)
fn = lambda x: jax.nn.relu(x @ w) @ w
want = np.maximum(np.asarray(x, np.float64) @ np.asarray(w, np.float64), 0) @ np.asarray(w, np.float64)
for precision, most in (("float32", 1e-5), ("int8", 0.1)):
    network = sapp.specialize(fn, x, mode="always", precision=precision, calibration=[x])
    program = jax.jit(network.fn).lower(network.weights, x).as_text()
    assert program.count(native.CONV) >= 2 and "dot_general" not in program, "layers do not run in the compiled kernel"
    with tempfile.TemporaryDirectory() as folder:
        network.save(pathlib.Path(folder, "network"))
        loaded = sapp.serve.load(pathlib.Path(folder, "network"))
    error = float(np.abs(np.asarray(network(x)) - want).max() / np.abs(want).max())
    assert error < most, (precision, error)
    assert (np.asarray(loaded(x)) == np.asarray(network(x))).all()
    print(f"  {precision}: off by {error:.1e} of the largest output, the same from a file")
print(f"  Python {sys.version.split()[0]}, jax {jax.__version__}, {pathlib.Path(sapp.__file__).parent}")
"""


def main(pythons: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        started = time.perf_counter()
        wheel = built(folder)
        print(f"{wheel.name}, {wheel.stat().st_size:,} bytes, built in {time.perf_counter() - started:.0f} s")
        for python in pythons or found():
            started = time.perf_counter()
            check(python, wheel, folder)
            print(f"  {time.perf_counter() - started:.0f} s")


def built(folder: pathlib.Path) -> pathlib.Path:
    """The wheel, from a copy without what was compiled in place."""
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "_native.*", "results", "shared", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source], check=True)
    [wheel] = folder.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name, wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if "_native" in n and n.endswith(".so")], f"no compiled kernel in {wheel.name}"
    assert all(n.startswith(("sa_plus_plus/", "sa_plus_plus-")) and not n.endswith((".cc", ".h")) for n in names), names
    return wheel


def found() -> list[str]:
    """This Python and one of pyenv for each other minor version."""
    versions = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"), "versions")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    pythons = {here: sys.executable}
    for file in sorted(versions.glob("3.*/bin/python")):
        minor = ".".join(file.parent.parent.name.split(".")[:2])
        if int(minor.split(".")[1].rstrip("t")) >= 11 and not minor.endswith("t"):
            pythons.setdefault(minor, str(file))
    return list(pythons.values())


def check(python: str, wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Install the wheel into a fresh environment of that Python and run `CHECK` there, with an empty PATH."""
    print(python, flush=True)
    environment = pathlib.Path(tempfile.mkdtemp(dir=folder))
    subprocess.run([python, "-m", "venv", environment], check=True)
    inside = str(environment / "bin" / "python")
    bare = {"PATH": str(environment / "bin"), "HOME": str(folder)}
    packages = ["--only-binary=:all:", str(wheel), "safetensors", "flatbuffers"]
    kept = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy") or "CERT" in k}
    home = {"HOME": os.environ.get("HOME", str(folder))}  # of pip's settings
    subprocess.run([inside, "-m", "pip", "install", "-qq", *packages], check=True, env={**kept, **bare, **home})
    subprocess.run([inside, "-c", CHECK], check=True, env=bare, cwd=folder)
    shutil.rmtree(environment)


if __name__ == "__main__":
    main(sys.argv[1:])
