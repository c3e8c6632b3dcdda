"""Random programs over rows of 4 by 6 numbers: any permutation of the groups found leaves them as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from sa_plus_plus.reordering import axes
from sa_plus_plus.reordering.orders import order_of

ROWS, OUTER, INNER = 3, 4, 6
SHAPES = {  # of the leaves that a program may use
    **{"each": (OUTER, INNER, INNER), "inner": (INNER, INNER), "outer": (OUTER, OUTER), "flat": (24, 24)},
    **{"of_inner": (INNER,), "of_outer": (OUTER,), "of_both": (OUTER, INNER), "layers": (2, INNER, INNER)},
    **{"up": (OUTER, INNER, 5), "down": (OUTER, 5, INNER), "gates": (INNER, 2 * INNER), "filter": (3, 1, INNER)},
}


def tokens(h, p):
    dims = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(h, p["filter"], (1,), "SAME", dimension_numbers=dims, feature_group_count=INNER)


def each_in_a_loop(h, p):
    step = lambda c, hw: (c + hw[0].sum(), jnp.tanh(hw[0] @ hw[1]))  # noqa: E731
    return lax.scan(step, 0.0, (h.swapaxes(0, 1), p["each"]))[1].swapaxes(0, 1)


OPERATIONS = {
    "a kernel for each": lambda h, p: jnp.einsum("bof,ofg->bog", h, p["each"]),
    "the same transposed": lambda h, p: jnp.einsum("bof,ogf->bog", h, p["each"]),
    "a kernel for all": lambda h, p: h @ p["inner"],
    "outer ones mixed": lambda h, p: jnp.einsum("bof,op->bpf", h, p["outer"]),
    "a symmetric kernel": lambda h, p: h @ (p["inner"] + p["inner"].T),
    "all at once": lambda h, p: (h.reshape(ROWS, -1) @ p["flat"]).reshape(h.shape),
    "two layers of each": lambda h, p: jnp.einsum("boh,ohf->bof", jnp.einsum("bof,ofh->boh", h, p["up"]), p["down"]),
    "scales": lambda h, p: h * p["of_inner"],
    "scales of both": lambda h, p: h * p["of_both"],
    "scales of the outer": lambda h, p: h * p["of_outer"][:, None],
    "cumulative scales": lambda h, p: h * jnp.cumsum(p["of_both"], 0),
    "softmax": lambda h, p: jax.nn.softmax(h, -1),
    "centred": lambda h, p: h - h.mean(1, keepdims=True),
    "interleaved": lambda h, p: h.reshape(ROWS, OUTER, 2, 3).swapaxes(2, 3).reshape(h.shape),
    "read across": lambda h, p: h.reshape(ROWS, INNER, OUTER).swapaxes(1, 2),
    "halves exchanged": lambda h, p: jnp.concatenate(jnp.split(h, 2, 1)[::-1], 1),
    "cumulative": lambda h, p: jnp.cumsum(h, 1),
    "flipped": lambda h, p: jnp.flip(h, 1),
    "rolled": lambda h, p: jnp.roll(h, 1, 1),
    "sorted": lambda h, p: jnp.sort(h, 1),
    "looked up": lambda h, p: jnp.take(h, (jnp.arange(OUTER) + 1) % OUTER, 1),
    "scattered": lambda h, p: jnp.zeros_like(h).at[:, (jnp.arange(OUTER) + 1) % OUTER].set(h),
    "windows": lambda h, p: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "SAME"),
    "depthwise": tokens,
    "a loop over layers": lambda h, p: lax.scan(lambda c, w: (c + jnp.tanh(c @ w), None), h, p["layers"])[0],
    "a loop over flipped layers": lambda h, p: lax.scan(
        lambda c, w: (c + jnp.tanh(c @ w[0]) @ w[1].T, None), h, (p["layers"], p["layers"][::-1])
    )[0],
    "a loop over each": each_in_a_loop,
    "gated": lambda h, p: jax.nn.glu(h @ p["gates"]),
    "attention among the outer": lambda h, p: jnp.einsum("bof,bpf,bpg->bog", h, h, h) / 10,
    "attention among the inner": lambda h, p: jnp.einsum("bof,bog,bpg->bpf", h, h, h) / 10,
}
Step = st.tuples(st.sampled_from(list(OPERATIONS)), st.booleans())
pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in SHAPES.items()}
PARAMS |= {"in": RNG.normal(size=(OUTER, 5, INNER)) / 2, "out": RNG.normal(size=(OUTER, INNER, 3)) / 2}
X = RNG.normal(size=(ROWS, 5))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_one_operation(name, residual):
    check([(name, residual)], 0)


@given(st.lists(Step, min_size=2, max_size=3), st.integers(0, 99))
def test_random_programs(steps, seed):
    check(steps, seed)


def check(steps, seed):
    def fn(p, x):
        h = jnp.tanh(jnp.einsum("bd,odf->bof", x, p["in"]))
        for name, residual in steps:
            h = OPERATIONS[name](h, p) + (h if residual else 0)
        return jnp.einsum("bof,ofn->bn", h, p["out"])

    with jax.enable_x64(True):
        found = axes.find(fn, PARAMS, X)
        tables, rng = {}, np.random.default_rng(seed)
        for group in found.groups.values():
            shape = (*(found.sizes[factor] for factor in group.within), group.size)
            tables[group.name] = rng.permuted(np.broadcast_to(np.arange(group.size), shape), axis=-1)
        moved = order_of(found, tables).apply(PARAMS)
        want, got = fn(PARAMS, X), fn(moved, X)
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9 * float(np.abs(want).max()))
