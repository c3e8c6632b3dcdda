"""Settings of every test: no implicit promotion of types or ranks, eight CPU devices, no display, one thread each.

All processes of a run share the programs that any of them has compiled, in a directory that goes when the run ends. To
keep them for the next run, name a directory: `JAX_COMPILATION_CACHE_DIR=/tmp/compiled python -m pytest`.
"""

import os
import pathlib
import shutil
import tempfile

import commands

os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tempfile.mkdtemp(
    prefix=f"compiled-{os.getpid()}-"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # source locations that no test reads take a tenth of the time
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"  # there is a worker for each core
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", *commands.QUICK_COMPILATION]
)
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import jax
import pytest

collect_ignore = ["killed.py"]  # a program, not to be imported for its docstrings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("tests", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.register_profile("campaign", deadline=None, max_examples=int(os.environ.get("EXAMPLES", "1000")))
hypothesis.settings.load_profile("tests")


def pytest_unconfigure():
    compiled = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if compiled.name.startswith(f"compiled-{os.getpid()}-"):  # made here, not by the process that started this one
        shutil.rmtree(compiled, ignore_errors=True)


@pytest.fixture
def standard_promotion():
    """JAX's usual promotion, for a test whose other libraries need it (optax's Adam mixes integers and floats)."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
