"""The part of the tests that touches JAX's inner workings, with the oldest and the newest JAX that are supported.

    nox                                           # both
    nox -s "tests(jax 0.12)" -- tests/convex      # one of them, with other tests

Each version gets a fresh environment with the dev extra below `.nox/` (2 GB), which `nox -r` uses again. At the end nox
prints one line for each version; one whose Python is not installed is skipped.
"""

import nox

FAST = (
    *("tests/sparse/network_test.py", "tests/sparse/files/serialization_test.py"),
    *("tests/sparse/ops/sparse_matmul_test.py", "tests/core/transforms_test.py", "tests/core/contract_test.py"),
    *("-k", "(not contract_test or float32) and not within_its_memory"),  # the last of these has nothing of JAX
)


@nox.session
@nox.parametrize(
    ("python", "version"), [("3.11", "==0.10.0"), ("3.13", ">=0.12,<0.13")], ids=["jax 0.10.0", "jax 0.12"]
)
def tests(session: nox.Session, version: str) -> None:
    """The tests above, or those given after `--`."""
    session.install("-e", ".[dev]", f"jax{version}", f"jaxlib{version}")
    session.run("python", "-c", "import jax; print('JAX', jax.__version__)")
    session.run("python", "-m", "pytest", *(session.posargs or FAST))
