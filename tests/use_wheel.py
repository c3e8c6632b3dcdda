"""Use the installed wheel: layers run in its compiled kernel, no compiler in reach, and a file gives the same.

    python -P tests/use_wheel.py

Not collected by pytest: it is for an environment into which the wheel, safetensors and flatbuffers are installed.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import sa_plus_plus as sapp
from sa_plus_plus.sparse.ops import native


def main() -> None:
    os.environ["PATH"] = ""  # no compiler
    home = pathlib.Path(sapp.__file__).parent
    assert home.parent.name == "site-packages", f"{home} is not an installed wheel"
    assert native.unavailable_reason() is None, native.unavailable_reason()
    rng = np.random.default_rng(0)
    w = np.kron(rng.random((16, 16)) < 0.4, np.ones((16, 16))) * rng.normal(size=(256, 256))
    x = rng.normal(size=(3, 256))
    for precision, most in (("float32", 1e-5), ("int8", 0.1)):
        print(f"  {precision}: {report(jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32), precision, most)}")
    command = [sys.executable, "-P", "-m", "sa_plus_plus", "prune", "model", "--output=new", "--sparsity=0.5"]
    said = subprocess.run(command, capture_output=True, text=True)  # its extra is not installed
    assert "pip install flax" in said.stderr, said
    assert said.returncode == 2, said
    with tempfile.TemporaryDirectory() as folder:
        np.savez(pathlib.Path(folder, "network.npz"), w=w.astype(np.float32))
        command = [str(pathlib.Path(sys.executable).with_name("sapp")), "plan", "network.npz", "--sparsity=0.5"]
        said = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert said.stdout.startswith("1 of 1 kernels pruned; 50.00% of 65,536"), said
    print(f"  Python {sys.version.split()[0]}, jax {jax.__version__}, {native.target(np.float32).name}, {home}")


def report(w: jax.Array, x: jax.Array, precision: str, most: float) -> str:
    """Specialise two layers, save and load them, compare with NumPy in float64."""
    network = sapp.specialize(lambda x: jax.nn.relu(x @ w) @ w, x, mode="always", precision=precision, calibration=[x])
    program = jax.jit(network.fn).lower(network.weights, x).as_text()
    kernels = program.count(native.CONV)
    assert (kernels, "dot_general" in program) == (2, False), f"{kernels} of 2 layers run in the compiled kernel"
    with tempfile.TemporaryDirectory() as folder:
        network.save(pathlib.Path(folder, "network"))
        loaded = sapp.serve.load(pathlib.Path(folder, "network"))
    exact = np.asarray(w, np.float64)
    want = np.maximum(np.asarray(x, np.float64) @ exact, 0) @ exact
    error = float(np.abs(np.asarray(network(x)) - want).max() / np.abs(want).max())
    assert error < most, (precision, error)
    assert (np.asarray(loaded(x)) == np.asarray(network(x))).all(), "the network from the file differs"
    return f"off by {error:.1e} of the largest output, the same from a file"


if __name__ == "__main__":
    main()
