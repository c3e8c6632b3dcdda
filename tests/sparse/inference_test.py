"""Specialised and loaded networks under JAX's transformations: they work, or say in a sentence what to do."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import sa_plus_plus as sapp
from sa_plus_plus import serve
from sa_plus_plus.sparse import native

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason="there is no compiled kernel")
W = np.kron(np.eye(4), np.ones((16, 16))).astype(np.float32) / 16


def inputs(batch):
    return np.random.default_rng(batch).normal(size=(batch, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def callables(tmp_path_factory):
    """A specialised network, and it from files of one and of several batch sizes."""

    def model(x):
        y = jax.nn.relu(x @ W)
        return {"y": jax.nn.gelu(y @ W) @ W, "hidden": y}

    network, larger = (sapp.specialize(model, jnp.asarray(inputs(n)), mode="always") for n in (2, 5))
    folder = tmp_path_factory.mktemp("callables")
    serve.save(folder / "one", network)
    serve.save(folder / "two", [network, larger])
    return {"network": network, "one": serve.load(folder / "one"), "two": serve.load(folder / "two")}


def same(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


DERIVATIVES = {
    "grad": lambda f, x: jax.grad(lambda x: f(x).sum())(x),
    "grad under jit": lambda f, x: jax.jit(jax.grad(lambda x: f(x).sum()))(x),
    "grad of jit": lambda f, x: jax.grad(lambda x: jax.jit(f)(x).sum())(x),
    "vjp": lambda f, x: jax.vjp(f, x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "linearize": lambda f, x: jax.linearize(f, x),
    "hessian": lambda f, x: jax.hessian(lambda x: f(x).sum())(x),
    "checkpoint": lambda f, x: jax.grad(lambda x: jax.checkpoint(f)(x).sum())(x),
    "scan": lambda f, x: jax.grad(lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x[None])[1].sum())(x),
    "of vmap": lambda f, x: jax.grad(lambda x: jax.vmap(f)(x[None]).sum())(x),
    "under vmap": lambda f, x: jax.vmap(jax.grad(lambda x: f(x).sum()))(x[None]),
}


@pytest.mark.parametrize("name", ["network", "one", "two"])
def test_derivatives_are_refused_in_a_sentence(callables, name):
    x = jnp.asarray(inputs(2))
    for derivative in DERIVATIVES.values():
        with pytest.raises(NotImplementedError, match=r"there is no derivative of .*: differentiate the function that"):
            derivative(lambda x: callables[name](x)["y"], x)
    frozen = jax.grad(lambda a: (a * callables[name](x)["y"]).sum())(2.0)  # a constant of what is differentiated
    np.testing.assert_allclose(frozen, callables[name](x)["y"].sum(), rtol=1e-4)
    stopped = jax.grad(lambda x: (x * callables[name](jax.lax.stop_gradient(x))["y"]).sum())(x)
    np.testing.assert_allclose(stopped, callables[name](x)["y"], rtol=1e-5)


def test_the_weights_of_a_network_have_no_derivatives_either(callables):
    network = callables["network"]
    with pytest.raises(NotImplementedError, match=r"no derivative of the compiled kernel, .*by `block_sparse_matmul`"):
        jax.grad(lambda weights: network.fn(weights, inputs(2))["y"].sum(), allow_int=True)(network.weights)


@pytest.mark.parametrize("name", ["network", "one", "two"])
def test_networks_within_other_programs(callables, name):
    f = callables[name]
    x = jnp.asarray(np.stack([inputs(2), -inputs(2)]))
    want = jax.tree.map(lambda *rows: np.stack(rows), *map(f, x))
    scanned = jax.lax.scan(lambda c, x: (c, f(x)), 0, x)[1]
    for got in (jax.vmap(f)(x), jax.jit(jax.vmap(f))(x), jax.vmap(jax.jit(f))(x), jax.lax.map(f, x), scanned):
        same(got, want)
    both = jax.vmap(jax.vmap(f, in_axes=1, out_axes=1))(jnp.stack([x, x], 2))
    same(jax.tree.map(lambda y: y[:, :, 1], both), want)
    with pytest.raises(ValueError, match=r"got float32\[64\]: give it the whole batch, .*leave out any `jax.vmap`"):
        jax.vmap(f)(x[0])
    with pytest.raises(ValueError, match=r"got float32\[b, 64\]: its sizes are fixed"):
        jax.export.export(jax.jit(f))(jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 64"), np.float32))
    with pytest.raises(ValueError, match=r"got float16\[2, 64\]: convert them to the types that it was made for"):
        jax.jit(f)(x[0].astype(np.float16))
    with pytest.raises(ValueError, match="made for arguments like"):
        jax.jit(f)({"x": x[0]})
    same(f(np.asarray(x[0], np.float64)), f(x[0]))  # as JAX converts it
    if name != "two":
        with pytest.raises(ValueError, match=r"got float32\[3, 64\]: make another for these, or pad them"):
            jax.jit(f)(inputs(3))


def test_any_batch_within_other_programs(callables):
    f = callables["two"]
    for batch in (1, 3, 11):
        want = jax.device_get(f(inputs(batch)))
        shapes = jax.tree.map(lambda y: y.shape, want)
        assert jax.tree.map(lambda y: y.shape, jax.eval_shape(f, inputs(batch))) == shapes
        for got in (jax.jit(f)(inputs(batch)), jax.tree.map(lambda y: y[0], jax.vmap(f)(inputs(batch)[None]))):
            same(got, want)
