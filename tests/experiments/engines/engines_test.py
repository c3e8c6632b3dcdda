"""Dense engines compute what the model does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.engines import runtimes
from experiments.models import ClickNet, ConvNet, LeNet300, MobileNetV2, ResNet
from experiments.utils.timing import difference
from sa_plus_plus.contrib.transformers.encoder import Encoder

SMALL = {"classes": 5, "stages": (1, 1), "width": 8}
CASES = {  # and an input
    "bottlenecks": (ResNet(**SMALL), (2, 40, 33, 3)),
    "basic": (ResNet(**SMALL, bottleneck=False, small_images=True), (2, 16, 15, 3)),
    "inverted residuals": (MobileNetV2(5, stages=((1, 8, 1, 1), (2, 16, 2, 2))), (2, 40, 32, 3)),
    "inverted residuals padded below": (
        MobileNetV2(5, stages=((1, 8, 1, 1), (2, 16, 2, 2, 5)), same=True, epsilon=0.1),
        (2, 40, 33, 3),
    ),
    "encoder": (Encoder(layers=1, width=32, hidden=64, heads=4), (2, 8, 32)),
    "perceptron": (LeNet300(), (3, 8, 8, 1)),
    "click": (ClickNet(vocabulary=(5, 700, 9), table_scale=1.0, widths=(40, 30)), (64, 3)),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.15}


def case(name):
    """A model, variables that are nowhere zero, and a batch."""
    model, shape = CASES[name]
    rng = np.random.default_rng(0)
    if name == "click":
        x = rng.integers(0, model.vocabulary, shape).astype(np.int32)
    else:
        x = rng.standard_normal(shape).astype(np.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(x))

    def draw(path, leaf):
        last = path[-1].key
        if last == "var":
            return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
        if leaf.ndim == 1:
            return ((last == "scale") + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
        return (rng.standard_normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, like), x


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", CASES)
def test_every_engine_and_precision_gives_the_results_of_the_model(name):
    if not all(map(runtimes.installed, ("onnx", *runtimes.ENGINES))):
        pytest.skip("the engines are not installed")
    model, variables, x = case(name)
    want = model.apply(variables, x)
    engines = runtimes.contenders(model, variables, x)
    assert set(engines.missing.values()) <= {"not on CPUs", "not on this processor", "slow for convolutions"}
    assert {"onnxruntime float32", "onnxruntime int8", "openvino float32", "openvino int8"} <= set(engines.calls)
    assert ("onnxruntime int8 dynamic" in engines.calls) == (not isinstance(model, ResNet | MobileNetV2))
    for contender, call in engines.calls.items():
        assert call().shape == want.shape
        assert difference(call(), want) < TOLERANCE[runtimes.precision(contender)], contender


def test_what_is_missing_is_said(monkeypatch):
    model, variables, x = case("perceptron")
    monkeypatch.setattr(runtimes, "installed", lambda package: package == "onnx")
    engines = runtimes.contenders(model, variables, x, precisions=["float32", "int8"])
    assert engines.calls == {}
    assert engines.missing == {
        **dict.fromkeys([f"onnxruntime {p}" for p in ("float32", "int8", "int8 dynamic")], "onnxruntime not installed"),
        "openvino float32": "openvino not installed",
        "openvino int8": "openvino and onnxruntime not installed",
    }


def test_a_network_without_a_graph_is_said():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    x = np.zeros((1, 8, 8, 1), np.float32)
    engines = runtimes.contenders(ConvNet(), {}, x, engines=["onnxruntime"], precisions=["float32"])
    assert engines.calls == {}
    assert engines.missing["onnxruntime float32"].startswith("no ONNX graph of ConvNet, only of ResNet, Encoder, ")


def test_the_fastest_engine_is_one_of_the_same_precision():
    seconds = {"openvino float32": 3, "onnxruntime float32": 2, "onnxruntime int8 dynamic": 1, "ours float32 90%": 0.5}
    taken = {name: np.array([s, s, 9.0]) for name, s in seconds.items()}
    assert runtimes.fastest(taken, "float32") == "onnxruntime float32"
    assert runtimes.fastest(taken, "int8") == "onnxruntime int8 dynamic"
    assert runtimes.fastest(taken, "bfloat16") is None
