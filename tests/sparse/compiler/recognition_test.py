"""Which layers of a network are found, which are listed as left out, and in which blocks kernels are pruned."""

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from flax import nnx
from jax import lax

import sa_plus_plus as sapp
from sa_plus_plus.sparse import BlockSparse, block_sparse_conv
from sa_plus_plus.sparse.compiler.infer_blocks import pruned_in


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape) / 5, dtype)


def names(fast):
    return [step for step in fast.steps if not step.startswith(("dense", "convolution"))]


def check(fn, x, layers, **options):
    """The network gives the plain function's results and has as many layers."""
    want, fast = jax.jit(fn)(x), sapp.specialize(fn, x, mode="always", **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fast(x), want)
    assert [c.kernel for c in fast.choices if c.rows] == layers
    assert not {*names(fast)} & {"scan", "conv_general_dilated"}
    return fast


@pytest.mark.usefixtures("standard_promotion")
def test_attention():
    x = normal(2, 5, 16)
    model = nn.MultiHeadDotProductAttention(num_heads=4)
    variables = problems.variables(model, x)
    other = nnx.jit(lambda: nnx.MultiHeadAttention(num_heads=4, in_features=16, decode=False, rngs=nnx.Rngs(0)))()
    for fn in (lambda x: model.apply(variables, x), other):
        assert names(check(fn, x, [(16, 16)] * 4)).count("dot_general") == 2  # five queries: not fused


W, W2, BIAS = normal(24, 16), normal(8, 24), normal(24)
EINSUMS = {
    "several outputs": (lambda x: jnp.einsum("bsi,ihd->bhsd", x, W.T.reshape(16, 4, 6)), (16, 24)),
    "several contracted": (lambda x: jnp.einsum("bhi,hio->bo", x, W.T.reshape(4, 4, 24)[:, :, :7]), (16, 7)),
    "float32 of float32": (lambda x: jnp.matmul(x, W.T, preferred_element_type=jnp.float32), (16, 24)),
}


@pytest.mark.parametrize("name", list(EINSUMS))
def test_products_over_any_axes(name):
    fn, kernel = EINSUMS[name]
    check(fn, normal(3, 4, 4) if "contracted" in name else normal(3, 4, 16), [kernel])


def test_kernels_on_the_left_are_folded_and_not_transposed():
    fast = check(jax.vmap(lambda x: W2 @ jax.nn.relu(W @ x + BIAS)), normal(5, 16), [(16, 24), (24, 8)])
    assert names(fast) == []
    fast = check(lambda x: jax.nn.relu(W @ x + BIAS[:, None]), normal(16, 5), [(16, 24)])
    assert names(fast) == ["transpose", "transpose"]


PLACES = np.array([5, 0, 15, 3, 3, 8, 9, 1])
LOOKUPS = {  # what is looked up, and whether that is in the compiled kernel
    "columns": (lambda x: x[..., PLACES], True),
    "counted from the end": (lambda x: x[..., PLACES - 16], True),
    "of one axis": (lambda x: jax.vmap(lambda row: row[PLACES])(x[:, 0])[:, None], True),
    "no mode": (lambda x: x.at[..., PLACES].get(mode="promise_in_bounds"), True),
    "beyond the end": (lambda x: x.at[..., PLACES + 9].get(mode="fill", fill_value=0), False),
    "rows": (lambda x: x[:, PLACES % 4, :8], False),
    "pairs": (lambda x: x[:, PLACES % 4, PLACES][..., None, :], False),
}


@pytest.mark.parametrize("name", list(LOOKUPS))
def test_lookups_of_columns_in_a_constant_order(name):
    look_up, compiled = LOOKUPS[name]
    w = normal(8, 16)
    fast = check(lambda x: look_up(x) @ w, normal(6, 4, 16), [(8, 16)])
    assert ("look_up" in names(fast), "gather" in names(fast)) == (compiled, not compiled)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_lookups_before_and_between_layers_of_low_precision(precision):
    first, second, x = normal(8, 16), normal(8, 16), normal(20, 16)

    def network(x):
        return jax.nn.relu(x[:, PLACES] @ first)[:, PLACES] @ second

    fast = sapp.specialize(network, x, mode="always", precision=precision, calibration=[x])
    assert names(fast).count("look_up") == 2
    want = network(x)
    np.testing.assert_allclose(fast(x), want, atol=0.03 * np.abs(want).max())


def test_experts_are_layers_each():
    first, second = normal(2, 2, 16, 12), normal(2, 2, 12, 16)

    def experts(x):
        return jnp.einsum("ghcf,ghfd->chgd", jax.nn.relu(jnp.einsum("ghcd,ghdf->ghcf", x, first)), second)

    check(experts, normal(2, 2, 5, 16), [(16, 12)] * 4 + [(12, 16)] * 4)
    check(lambda x: jnp.einsum("ghdf,ghcd->ghfc", first, x), normal(2, 2, 5, 16), [(16, 12)] * 4)
    many = normal(65, 4, 4)
    fast = sapp.specialize(lambda x: jnp.einsum("ecd,edf->ecf", x, many), normal(65, 2, 4), mode="always")
    assert [(c.kernel, c.note) for c in fast.choices] == [((65, 4, 4), "65 kernels in one product")]
    assert "%" not in str(fast)


def conv(x, kernel, numbers, padding="SAME"):
    return lax.conv_general_dilated(x, kernel, (2,) * (x.ndim - 2), padding, dimension_numbers=numbers)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_convolutions_over_one_axis(implementation):
    kernel = normal(3, 8, 16) * np.kron(np.eye(2), np.ones((4, 8)))[None]
    fast = check(
        lambda x: jax.nn.relu(conv(x, kernel, ("NWC", "WIO", "NWC"))),
        normal(2, 11, 8),
        [(3, 8, 16)],
        implementation=implementation,
    )
    assert names(fast) == []


def test_channels_first():
    """As Equinox has them, one image at a time under `vmap`; transpositions between layers cancel."""
    first, second, bias = normal(8, 3, 3, 3), normal(6, 8, 3, 3), normal(8, 1, 1)

    def image(x):
        numbers = ("NCHW", "OIHW", "NCHW")
        y = jax.nn.relu(conv(x[None], first, numbers)[0] + bias)
        y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2), (1, 1, 1), "VALID")
        return conv(y[None], second, numbers)[0]

    fast = check(jax.vmap(image), normal(4, 3, 13, 13), [(3, 3, 3, 8), (3, 3, 8, 6)])
    assert names(fast).count("transpose") <= 4
    residual = check(
        lambda x: jax.nn.relu(conv(x, first, ("NCHW", "OIHW", "NCHW")) + bias[None]), normal(2, 3, 9, 9), [(3, 3, 3, 8)]
    )
    assert names(residual) == ["transpose", "transpose"]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_over_constant_kernels_is_unrolled(reverse):
    kernels, biases = normal(3, 16, 16), normal(3, 16)

    def stack(x):
        def layer(h, weights):
            kernel, bias = weights
            h = jax.nn.relu(h @ kernel + bias[None])
            return h, h.sum()

        return lax.scan(layer, x, (kernels, biases), reverse=reverse)

    check(stack, normal(5, 16), [(16, 16)] * 3)

    def recurrent(x):
        return lax.scan(lambda h, u: (jnp.tanh(u @ W.T @ W + h), h), x[0], x, reverse=reverse)

    check(recurrent, normal(3, 5, 16), [(16, 24), (24, 16)] * 3)


LEFT_OUT = {
    "within while": lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ W.T @ W), (0, x))[1],
    "within cond": lambda x: lax.cond(x.sum() < 3, lambda x: x @ W.T @ W, lambda x: x, x),
    "within scan, 200 steps": lambda x: lax.scan(lambda h, _: (h @ W.T @ W, None), x, length=200)[0],
    "computes in int8": lambda x: jnp.matmul(x.astype(jnp.int8), jnp.ones((16, 3), jnp.int8)),
}


@pytest.mark.parametrize("note", list(LEFT_OUT))
def test_what_is_no_layer_is_listed_with_the_reason(note):
    x = normal(5, 16)
    fast = sapp.specialize(LEFT_OUT[note], x, mode="always")
    np.testing.assert_allclose(fast(x), LEFT_OUT[note](x), rtol=1e-4, atol=1e-5)
    assert {c.note for c in fast.choices} == {note}
    assert [c.kernel for c in fast.choices] == ([(16, 3)] if "int8" in note else [(16, 24), (24, 16)])
    assert note in str(fast)
    assert "100" not in str(fast)


def test_a_network_without_layers_warns():
    x = normal(5, 16)
    with pytest.warns(UserWarning, match=r"close over the weights, `specialize\(lambda x: f\(weights, x\), x\)`"):
        fast = sapp.specialize(lambda w, x: x @ w.T, W, x)
    np.testing.assert_allclose(fast(W, x), x @ W.T, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="no products with constant kernels"):
        sapp.specialize(jnp.sin, x)


@st.composite
def pruned(draw):
    block = draw(st.sampled_from([(1, 8), (8, 1), (7, 7), (12, 12), (16, 4), (3, 3), (2, 64), (4, 4), (32, 32)]))
    grid = draw(st.tuples(st.integers(8, 14), st.integers(8, 14)))
    rest = [draw(st.integers(0, side - 1)) for side in block]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    mask = rng.random((grid[0] + 1, grid[1] + 1)) < draw(st.sampled_from([0.05, 0.2, 0.5]))
    hypothesis.assume(mask[:-1, :-1].sum() >= 6)  # one or two blocks may as well be parts of larger ones
    kernel = np.kron(mask, np.ones(block))[: grid[0] * block[0] + rest[0], : grid[1] * block[1] + rest[1]]
    return kernel * rng.normal(size=kernel.shape), block


@hypothesis.given(pruned())
@problems.examples(60)
def test_blocks_are_found(drawn):
    kernel, (b_r, b_c) = drawn
    found, density = pruned_in(kernel)
    corners = [(i, j) for i in range(0, kernel.shape[0], b_r) for j in range(0, kernel.shape[1], b_c)]
    share = np.mean([kernel[i : i + b_r, j : j + b_c].any() for i, j in corners])
    assert density <= 1.1 * share * 1.3 + 1e-9  # larger blocks count ragged edges in other proportion
    assert found is not None
    down, across = kernel.shape[0], kernel.shape[1]
    assert all(side % b == 0 or side in (n, 128) for side, b, n in zip(found, (b_r, b_c), (down, across), strict=True))


def test_stray_zeros_do_not_hide_blocks():
    rng = np.random.default_rng(0)
    kernel = np.kron(rng.random((20, 20)) < 0.2, np.ones((8, 8))) * (rng.random((160, 160)) > 0.005)
    assert pruned_in(kernel)[0] == (8, 8)
    assert pruned_in(np.ones((8, 8))) == (None, 1.0)


def test_a_plan_says_which_blocks():
    sp = sapp.random(block=(4, 6), sparsity=0.5, min_blocks=4, phases=sapp.phases.random(10))
    params = {"a": W.T, "b": W2.T}
    plan, kept = sp.plan(params), sp.finalize(*sp.init(params))
    fast = sapp.specialize(lambda x: x @ kept["a"], normal(5, 16), plan=plan, mode="always")
    assert [c.block for c in fast.choices] == [(4, 6)]
    left = sapp.specialize(lambda x: kept["a"].T[:, :16] @ x, normal(16, 5), plan=plan, mode="always")
    assert [c.block for c in left.choices] == [(4, 6)]
    with pytest.raises(ValueError, match=r"the plan matches no kernel of this network: it prunes a \(16, 24\)"):
        sapp.specialize(lambda x: x @ W.T[:, :5], normal(5, 16), plan=plan)
    with pytest.raises(ValueError, match="block or plan, not both"):
        sapp.specialize(lambda x: x @ W.T, normal(5, 16), plan=plan, block=4)


def test_exported_for_any_batch():
    export = jax.export
    w = BlockSparse.fromdense(np.kron(np.tri(4, 3), np.ones((4, 8), np.float32)), (4, 8))
    kernel = BlockSparse.fromdense(np.asarray(normal(3, 3, 4, 8)), 4, np.random.default_rng(0).random((9, 2)) < 0.5)
    fns = {
        "b, 16": (lambda w, x: sapp.block_sparse_matmul(x, w, implementation="xla"), w, lambda x: x @ w.todense()),
        "b, 6, 6, 4": (
            lambda w, x: block_sparse_conv(x, w, implementation="xla"),
            kernel,
            lambda x: lax.conv_general_dilated(
                x, kernel.todense(), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
        ),
    }
    for shape, (fn, weights, plain) in fns.items():
        symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
        saved = export.export(jax.jit(fn))(weights, symbolic).serialize()
        loaded = export.deserialize(saved)
        for batch in (2, 40):
            x = normal(batch, *(int(n) for n in shape.split(", ")[1:]))
            np.testing.assert_allclose(loaded.call(weights, x), plain(x), rtol=1e-4, atol=1e-4)
