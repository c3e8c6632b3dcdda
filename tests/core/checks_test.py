"""A network that is not as sparse as planned does not go unnoticed."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_plus_plus as sapp
from sa_plus_plus import checks

PARAMS = {
    "in": {"kernel": jnp.ones((784, 96)), "bias": jnp.ones(96)},
    "out": {"kernel": jnp.ones((3, 3, 10, 50))},
    "mid": {"kernel": jnp.ones((64, 64), jnp.bfloat16)},
}
PLAN = sapp.plan(PARAMS, block=(8, 20), sparsity=0.9, min_blocks=20)


def keeping(kept):
    """The parameters with so many blocks in each layer that are not zero."""
    params = jax.tree.map(np.array, PARAMS)
    for name, count in kept.items():
        kernel = params[name]["kernel"]
        matrix = kernel.reshape(-1, kernel.shape[-1])
        blocks = [(r, c) for c in range(0, matrix.shape[1], 20) for r in range(0, matrix.shape[0], 8)]
        for r, c in blocks[count:]:
            matrix[r : r + 8, c : c + 20] = 0
    return params


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_layers_that_keep_too_many_blocks_are_named(as_array):
    planned = {name: PLAN.pruned[f"{name}/kernel"].kept for name in ("in", "out", "mid")}
    assert planned == {"in": 49, "out": 3, "mid": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kept in (planned, {**planned, "in": 0, "mid": 2}):
            params = jax.tree.map(as_array, keeping(kept))
            sapp.check_pruned(params, PLAN)
            sapp.export(params, PLAN)
    params = jax.tree.map(as_array, keeping({**planned, "in": 75, "mid": 32}))
    sentences = [
        "mid/kernel: 32 of 32 blocks are not zero, 3 planned (0.0% of blocks pruned instead of 90.6%)",
        "in/kernel: 75 of 490 blocks are not zero, 49 planned (84.7% of blocks pruned instead of 90.0%)",
    ]
    [(fault, found)] = checks.faults(params, PLAN)
    assert found == sentences
    with pytest.raises(ValueError, match="2 of 3 layers keep more blocks than planned") as error:
        sapp.check_pruned(params, PLAN)
    first, *rest = str(error.value).splitlines()
    assert (first, [line.strip() for line in rest]) == (f"{fault}:", sentences)
    for cause in ("unfinished schedule", "average", "after `sparsify`", "clipping", "freezes the layer"):
        assert cause in fault
    with pytest.warns(UserWarning, match="2 of 3 layers keep more blocks than planned.* mid/kernel: 32 of") as caught:
        exported = sapp.export(params, PLAN)
    assert caught[0].filename == __file__
    assert exported["in"]["kernel"].nse == 75
    np.testing.assert_array_equal(sapp.todense(exported)["mid"]["kernel"], params["mid"]["kernel"])


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_counted(bad):
    """Instead of being taken for blocks that were not pruned, whether there are too many of these or not."""
    planned = {name: PLAN.pruned[f"{name}/kernel"].kept for name in ("in", "out", "mid")}
    params = keeping({**planned, "out": 4})
    params["in"]["kernel"][:100] = bad
    params["mid"]["kernel"][0, :7] = bad  # in a block that stays
    params["in"]["bias"][:] = bad  # not pruned, so not looked at
    for as_array in (np.asarray, jnp.asarray):
        given = jax.tree.map(as_array, params)
        with pytest.raises(ValueError, match=r"2 of 3 layers hold weights that are not finite \(training") as error:
            sapp.check_pruned(given, PLAN)
        lines = [line.strip() for line in str(error.value).splitlines()]
        assert lines[1:3] == [
            "in/kernel: 9,600 of 75,264 weights are NaN or infinite",
            "mid/kernel: 7 of 4,096 weights are NaN or infinite",
        ]
        assert lines[3].startswith("1 of 3 layers keep more blocks than planned (possible causes: an")
        assert [line.partition(":")[0] for line in lines[4:]] == ["out/kernel"]
        with pytest.warns(UserWarning) as caught:  # noqa: PT030 - both are compared below
            sapp.export(given, PLAN)
        assert [str(warning.message).splitlines() for warning in caught] == [
            [" ".join([lines[0], "; ".join(lines[1:3])])],
            [" ".join([lines[3], lines[4]])],
        ]


def test_what_cannot_be_checked():
    for check in (sapp.check_pruned, sapp.export):
        with pytest.raises(TypeError, match="outside jit, vmap and grad"):
            jax.jit(lambda params, check=check: check(params, PLAN))(PARAMS)
        with pytest.raises(ValueError, match=r"kernel in/kernel of shape \(784, 96\), which is not there"):
            check({"out": PARAMS["out"]}, PLAN)
        with pytest.raises(ValueError, match=r"which has the shape \(2, 2\) in this tree"):
            check(PARAMS | {"in": {"kernel": jnp.ones((2, 2))}}, PLAN)
