"""The part of the tests that touches JAX's inner workings, with other versions of what the project depends on.

    nox                                                  # all of these
    nox -s "tests(jax 0.12)" -- tests/convex              # the newest JAX that is supported, with other tests
    nox -s lowest                                        # the lowest versions that pyproject.toml allows

Each session gets a fresh environment with the dev extra below `.nox/` (2 GB), which `nox -r` uses again. At the end nox
prints one line for each; one whose Python is not installed is skipped.
"""

import nox

FAST = (
    *("tests/sparse/network_test.py", "tests/sparse/files/serialization_test.py"),
    *("tests/sparse/ops/sparse_matmul_test.py", "tests/core/transforms_test.py", "tests/core/contract_test.py"),
    *("-k", "(not contract_test or float32) and not within_its_memory"),  # the last of these has nothing of JAX
)


@nox.session
@nox.parametrize(
    ("python", "version"), [("3.11", "==0.10.1"), ("3.13", ">=0.12,<0.13")], ids=["jax 0.10.1", "jax 0.12"]
)
def tests(session: nox.Session, version: str) -> None:
    """The tests above, or those given after `--`."""
    session.install("-e", ".[dev]", f"jax{version}", f"jaxlib{version}")
    session.run("python", "-c", "import jax; print('JAX', jax.__version__)")
    session.run("python", "-m", "pytest", *(session.posargs or FAST))


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Imports, a short main job, and the tests above or those given after `--`: is every lower bound a true one?"""
    session.install("uv")  # pip cannot ask for the lowest versions
    install = ("uv", "pip", "install", "--python", f"{session.bin}/python", "--resolution", "lowest-direct")
    session.run(*install, "-e", ".[dev]")
    session.run("python", "-c", "import flax.nnx, sa_plus_plus")
    job = ("--config.steps=60", "--noconfig.dense_twin", f"--workdir={session.create_tmp()}/run", "--overwrite")
    session.run("python", "-m", "experiments.main", *job)
    quietly = ("-W", "default::DeprecationWarning")  # old packages do what newer ones beside them warn of
    session.run("python", "-m", "pytest", *quietly, *(session.posargs or FAST))
