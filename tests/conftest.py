"""Settings of every test: no implicit promotion of types or ranks, eight CPU devices, no display."""

import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # programs here are small and run a few times: compiling takes the time
    ]
)
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("tests", deadline=None, max_examples=30, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("tests")


@pytest.fixture
def standard_promotion():
    """JAX's usual promotion, for a test whose other libraries need it (optax's Adam mixes integers and floats)."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
