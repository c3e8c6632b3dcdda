"""How a function multiplies by its parameters, where names and shapes do not tell."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import sa_plus_plus as sapp
from sa_plus_plus import View
from sa_plus_plus.blocks import view_of

pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.default_rng(0)
WIDTH, HEADS, SIZE, HIDDEN, LAYERS = 32, 4, 8, 48, 3


def leaf(*shape, dtype=np.float32):
    return (RNG.normal(size=shape) / np.sqrt(shape[-2])).astype(dtype)


def gemma(dtype=np.float32):
    """The parameters of a layer as in Gemma, of layers stacked as in MaxText, and of what is no kernel."""
    attention = {"q": leaf(HEADS, WIDTH, SIZE, dtype=dtype), "kv": leaf(2, 1, WIDTH, SIZE, dtype=dtype)}
    attention["out"] = leaf(HEADS, SIZE, WIDTH, dtype=dtype)
    feedforward = {"gating": leaf(2, HIDDEN, WIDTH, dtype=dtype), "linear": leaf(HIDDEN, WIDTH, dtype=dtype)}
    tables = {"table": leaf(40, WIDTH, dtype=dtype), "shift": leaf(12, WIDTH, dtype=dtype)}
    return attention | feedforward | tables | {"layers": leaf(WIDTH, LAYERS, WIDTH, dtype=dtype)}


def network(p, tokens):
    x = jax.tree.map(lambda table: table.astype(jnp.float32)[tokens], p["table"])
    p = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p)
    q = jnp.einsum("btd,ndh->btnh", x, p["q"])
    k, v = jnp.einsum("bsd,ckdh->cbskh", x, p["kv"])[:, :, :, 0]
    shares = jax.nn.softmax(jnp.einsum("btnh,bsh->bnts", q, k))
    x = x + jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsh->btnh", shares, v), p["out"])
    gate, up = jnp.moveaxis(jnp.einsum("...d,chd->...ch", x, p["gating"]), -2, 0)
    x = x + (jax.nn.gelu(gate) * up) @ p["linear"] + p["shift"][: tokens.shape[1]]
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, jnp.moveaxis(p["layers"], 1, 0))[0]


TOKENS = RNG.integers(0, 40, (6, 12))
VIEWS = {
    "q": View((), (1,), (0, 2)),
    "kv": View((), (1, 2), (0, 3)),
    "out": View((), (0, 1), (2,)),
    "gating": View((), (2,), (0, 1)),
    "linear": View((), (0,), (1,)),
    "layers": View((1,), (0,), (2,)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_of_einsums_and_stacked_layers(dtype):
    assert sapp.views_of(network, gemma(jnp.dtype(dtype)), TOKENS) == VIEWS


def test_a_network_whose_layouts_names_do_not_tell_is_pruned_and_reordered():
    params, options = gemma(), {"block": 4, "sparsity": 0.5, "min_blocks": 1, "where": lambda path: path in VIEWS}
    guessed = sapp.plan(params, **options)
    assert [layer.path for layer in guessed.leaves if layer.assumed] == ["gating", "kv", "layers", "out", "q"]
    assert str(guessed).endswith("views=sapp.views_of(fn, params, x) reads it off fn(params, x)")
    found = sapp.one_shot(network, params, [TOKENS], reorder=True, **options)
    assert {path: view_of(layer.shape, layer.view) for path, layer in found.plan.pruned.items()} == VIEWS
    assert found.plan == sapp.plan(params, views=sapp.views_of(network, params, TOKENS), **options)
    sapp.check_pruned(found.params, found.plan)
    want, got = network(params, TOKENS), network(found.params, TOKENS)
    assert 0 < np.abs(got - want).mean() < np.abs(want).mean()
    moved = sapp.reorder(network, params, TOKENS, **options)
    assert moved.plan == found.plan
    np.testing.assert_allclose(network(moved.params, TOKENS), want, rtol=1e-4, atol=1e-5)


def test_views_that_are_given_stay():
    options = {"block": 4, "sparsity": 0.5, "min_blocks": 1, "where": lambda path: path in ("q", "out")}
    views = {"q": "[n] d h"}
    plan = sapp.reorder(network, gemma(), TOKENS, views=views, **options).plan
    assert plan.pruned["q"].view == View((0,), (1,), (2,))
    assert not plan.pruned["out"].assumed


def test_parts_of_a_split_leaf():
    def gated(p, x):
        reset, update, new = (x @ part for part in jnp.split(p["gates"], 3, 1))
        return jax.nn.sigmoid(update) * jnp.tanh(new) + jax.nn.sigmoid(reset)

    assert sapp.views_of(gated, {"gates": leaf(8, 36)}, leaf(2, 8)) == {"gates": View((), (0,), (1,))}


def test_what_has_no_view():
    def fn(p, x):
        halves = (x[:, :16] @ p["cut"].reshape(16, 64))[:, :32]  # one part of an axis is contracted, one is not
        both = x @ p["tied"] @ p["tied"].T
        return halves + both + p["added"][0] + p["looked up"][jnp.arange(len(x))]

    params = {"cut": leaf(32, 32), "tied": leaf(32, 32), "added": leaf(2, 32), "looked up": leaf(9, 32)}
    assert sapp.views_of(fn, params | {"unused": leaf(4, 4)}, leaf(6, 32)) == {}
    assert sapp.views_of(lambda p, x: x @ p["w"].T, {"w": leaf(5, 6), "n": np.arange(4).reshape(2, 2)}, leaf(2, 6)) == {
        "w": View((), (1,), (0,))
    }
    assert sapp.views_of(lambda p, x: x @ p["tied"], params, leaf(6, 32), paths=["cut"]) == {}


@given(st.permutations(range(4)), st.integers(1, 3), st.lists(st.sampled_from([1, 2, 3]), min_size=4, max_size=4))
def test_any_einsum(order, contracted, sides):
    """A leaf with its axes in any order, of which the first ones of `order` are contracted."""
    names = string.ascii_lowercase[:4]
    rows, cols = order[:contracted], order[contracted:]
    spec = f"z{''.join(names[i] for i in rows)},{names}->z{''.join(names[i] for i in cols)}"
    kernel, x = leaf(*sides), leaf(2, *(sides[i] for i in rows))
    found = sapp.views_of(lambda p, x: jnp.einsum(spec, x, p["w"]), {"w": kernel}, x)
    if np.prod([sides[i] for i in rows]) == 1 or np.prod([sides[i] for i in cols]) == 1:
        return  # JAX makes a sum or a scale of it, or which side is which makes no difference
    view, long = found["w"], [axis for axis in range(4) if sides[axis] > 1]
    in_x, in_y = ([axis for axis in side if axis in long] for side in (rows, cols))
    in_view = [axis for axis in view.rows if axis in long]
    read = x.reshape(2, *(sides[i] for i in in_x)).transpose(0, *(1 + in_x.index(i) for i in in_view))
    want = np.einsum(spec, x, kernel).reshape(2, *(sides[i] for i in in_y))
    want = want.transpose(0, *(1 + in_y.index(i) for i in sorted(in_y))).reshape(2, -1)
    np.testing.assert_allclose(read.reshape(2, -1) @ sapp.blocks.matrices(kernel, view), want, rtol=1e-4, atol=1e-5)
