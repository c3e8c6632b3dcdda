"""Networks of each framework as ONNX models: ONNX Runtime's numbers are ours. The table in `docs/inference.md`."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from flax import nnx

from sa_plus_plus.sparse import to_onnx
from sa_plus_plus.sparse.files.onnx_rewrites import rewritten

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
FLAT = RNG.standard_normal((2, 12), np.float32)
IMAGES = RNG.standard_normal((2, 12, 12, 3), np.float32)
TOKENS = RNG.integers(0, 20, (2, 6), np.int32)  # 0 is padding
MASK = (TOKENS > 0)[:, None, None, :]


class Linen(nn.Module):
    """All four in flax linen; ResNets pool by `max_pool` with padding, as in experiments/models/resnet.py."""

    kind: str

    @nn.compact
    def __call__(self, x):
        return getattr(self, self.kind)(x)

    def mlp(self, x):
        return nn.Dense(5)(nn.relu(nn.Dense(8)(x)))

    def convnet(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(4, (3, 3), padding="VALID")(x)), (2, 2), (2, 2))
        return nn.Dense(5)(x.reshape(len(x), -1))

    def resnet(self, x):
        def conv(x, width, window, stride=1):
            x = nn.Conv(width, (window, window), stride, padding=window // 2, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        x = nn.max_pool(nn.relu(conv(x, 4, 7, 2)), (3, 3), (2, 2), [(1, 1), (1, 1)])
        x = nn.relu(conv(x, 8, 1, 2) + conv(nn.relu(conv(x, 8, 3, 2)), 8, 3))
        return nn.Dense(5)(x.mean((1, 2)))

    def bert(self, x):
        mask = (x > 0)[:, None, None, :]
        x = nn.LayerNorm()(nn.Embed(20, 8)(x) + nn.Embed(6, 8)(jnp.arange(6)))
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x, mask=mask))
        x = nn.LayerNorm()(x + nn.Dense(8)(nn.gelu(nn.Dense(16)(x), approximate=False)))
        return nn.Dense(5)(jnp.tanh(x[:, 0]))


def linen(kind, x):
    variables = Linen(kind).init(KEY, x)
    return lambda x: Linen(kind).apply(variables, x)


def nnx_(kind, x):
    rngs = nnx.Rngs(0)
    if kind == "mlp":
        return nnx.Sequential(nnx.Linear(12, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 5, rngs=rngs))
    if kind == "convnet":
        first, last = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Conv(4, 4, (3, 3), padding="VALID", rngs=rngs)
        head = nnx.Linear(16, 5, rngs=rngs)

        def convnet(x):
            x = nnx.max_pool(nnx.relu(first(x)), (2, 2), (2, 2))
            return head(nnx.avg_pool(nnx.relu(last(x)), (2, 2), (2, 2)).reshape(len(x), -1))

        return convnet
    if kind == "resnet":

        def conv(start, end, window, stride=1):
            kernel = nnx.Conv(start, end, (window,) * 2, stride, padding=window // 2, use_bias=False, rngs=rngs)
            return nnx.Sequential(kernel, nnx.BatchNorm(end, use_running_average=True, rngs=rngs))

        stem, short = conv(3, 4, 7, 2), conv(4, 8, 1, 2)
        branch = nnx.Sequential(conv(4, 8, 3, 2), nnx.relu, conv(8, 8, 3))
        head = nnx.Linear(8, 5, rngs=rngs)

        def resnet(x):
            x = nnx.max_pool(nnx.relu(stem(x)), (3, 3), (2, 2), [(1, 1), (1, 1)])
            return head(nnx.relu(short(x) + branch(x)).mean((1, 2)))

        return resnet
    table, place = nnx.Embed(20, 8, rngs=rngs), nnx.Embed(6, 8, rngs=rngs)
    norms = [nnx.LayerNorm(8, rngs=rngs) for _ in range(3)]
    attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    up, down, head = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    def bert(t):
        x = norms[0](table(t) + place(jnp.arange(6)))
        x = norms[1](x + attention(x, mask=(t > 0)[:, None, None, :]))
        return head(jnp.tanh(norms[2](x + down(nnx.gelu(up(x), approximate=False)))[:, 0]))

    return bert


def equinox(kind, x):
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")
    layers, keys = eqx.nn, iter(jax.random.split(KEY, 20))
    relu = layers.Lambda(jax.nn.relu)
    if kind == "mlp":
        return jax.vmap(layers.MLP(12, 5, 8, 1, key=KEY))
    if kind == "convnet":
        convs = [layers.Conv2d(3, 4, 3, padding=1, key=KEY), relu, layers.MaxPool2d(2, 2)]
        convs += [layers.Conv2d(4, 4, 3, key=KEY), relu, layers.AvgPool2d(2, 2)]
        network = layers.Sequential([*convs, layers.Lambda(jnp.ravel), layers.Linear(16, 5, key=KEY)])
    elif kind == "resnet":

        def conv(start, end, window, stride=1):
            kernel = layers.Conv2d(start, end, window, stride, window // 2, use_bias=False, key=next(keys))
            norm = eqx.nn.inference_mode(layers.GroupNorm(1, end))
            return lambda x: norm(kernel(x))

        stem, short, first, second = conv(3, 4, 7, 2), conv(4, 8, 1, 2), conv(4, 8, 3, 2), conv(8, 8, 3)
        pool, head = layers.MaxPool2d(3, 2, padding=1), layers.Linear(8, 5, key=KEY)

        def network(x):
            x = pool(relu(stem(x)))
            return head(relu(short(x) + second(relu(first(x)))).mean((1, 2)))
    else:
        table, place = layers.Embedding(20, 8, key=next(keys)), layers.Embedding(6, 8, key=next(keys))
        norm, attention = layers.LayerNorm(8), layers.MultiheadAttention(2, 8, key=next(keys))
        up, down = layers.Linear(8, 16, key=next(keys)), layers.Linear(16, 8, key=next(keys))
        head = layers.Linear(8, 5, key=next(keys))

        def network(t):
            x = jax.vmap(norm)(jax.vmap(table)(t) + place.weight)
            x = jax.vmap(norm)(x + attention(x, x, x, mask=jnp.broadcast_to(t > 0, (6, 6))))
            x = jax.vmap(lambda x: norm(x + down(jax.nn.gelu(up(x), approximate=False))))(x)
            return head(jnp.tanh(x[0]))

        return jax.vmap(network)
    return lambda x: jax.vmap(network)(jnp.moveaxis(x, -1, 1))


def haiku(kind, x):
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")

    def conv(x, width, window, stride=1):
        x = hk.Conv2D(width, window, stride, padding=(window // 2,) * 2, with_bias=False)(x)
        return hk.BatchNorm(True, True, 0.9)(x, is_training=hk.running_init())

    def mlp(x):
        return hk.nets.MLP([8, 5])(x)

    def convnet(x):
        x = hk.max_pool(jax.nn.relu(hk.Conv2D(4, 3)(x)), (2, 2, 1), (2, 2, 1), "VALID")
        x = hk.avg_pool(jax.nn.relu(hk.Conv2D(4, 3, padding="VALID")(x)), (2, 2, 1), (2, 2, 1), "VALID")
        return hk.Linear(5)(hk.Flatten()(x))

    def resnet(x):
        x = hk.max_pool(jax.nn.relu(conv(x, 4, 7, 2)), (3, 3, 1), (2, 2, 1), "SAME")
        x = jax.nn.relu(conv(x, 8, 1, 2) + conv(jax.nn.relu(conv(x, 8, 3, 2)), 8, 3))
        return hk.Linear(5)(x.mean((1, 2)))

    def bert(t):
        def norm(x):
            return hk.LayerNorm(-1, True, True)(x)

        x = norm(hk.Embed(20, 8)(t) + hk.Embed(6, 8)(jnp.arange(6)))
        attention = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())
        x = norm(x + attention(x, x, x, mask=(t > 0)[:, None, None, :]))
        x = norm(x + hk.Linear(8)(jax.nn.gelu(hk.Linear(16)(x), approximate=False)))
        return hk.Linear(5)(jnp.tanh(x[:, 0]))

    model = hk.without_apply_rng(hk.transform_with_state({f.__name__: f for f in (mlp, convnet, resnet, bert)}[kind]))
    shapes = jax.eval_shape(lambda: model.init(KEY, x))
    params, state = jax.tree.map(lambda s: jnp.abs(jax.random.normal(KEY, s.shape)) / 4 + 0.1, shapes)
    return lambda x: model.apply(params, state, x)[0]


def keras(kind, x):
    keras = pytest.importorskip("keras", reason="keras is not installed")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend than JAX")
    layers = keras.layers
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    if kind == "mlp":
        x = layers.Dense(8, "relu")(inputs)
    elif kind == "convnet":
        x = layers.MaxPooling2D(2)(layers.Conv2D(4, 3, padding="same", activation="relu")(inputs))
        x = layers.Flatten()(layers.AveragePooling2D(2)(layers.Conv2D(4, 3, activation="relu")(x)))
    elif kind == "resnet":

        def conv(x, width, window, stride=1):
            x = layers.Conv2D(width, window, stride, padding="same", use_bias=False)(x)
            return layers.BatchNormalization()(x)

        x = layers.MaxPooling2D(3, 2, padding="same")(layers.ReLU()(conv(inputs, 4, 7, 2)))
        x = layers.Add()([conv(x, 8, 1, 2), conv(layers.ReLU()(conv(x, 8, 3, 2)), 8, 3)])
        x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    else:
        x = layers.LayerNormalization()(layers.Embedding(20, 8)(inputs) + RNG.standard_normal((6, 8), np.float32))
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
        x = layers.LayerNormalization()(x + layers.Dense(8)(layers.Dense(16, "gelu")(x)))[:, 0]
    return keras.Model(inputs, layers.Dense(5)(x))


INPUTS = {"mlp": FLAT, "convnet": IMAGES, "resnet": IMAGES, "bert": TOKENS}
FRAMEWORKS = {"linen": linen, "nnx": nnx_, "equinox": equinox, "haiku": haiku, "keras": keras}


EACH = [(framework, kind) for framework in FRAMEWORKS for kind in INPUTS]
REWRITTEN = {("linen", "resnet"), ("equinox", "bert"), ("haiku", "resnet"), ("keras", "resnet"), ("nnx", "convnet")}


@pytest.mark.parametrize(
    ("framework", "kind"), [pytest.param(*each, marks=() if each in REWRITTEN else pytest.mark.long) for each in EACH]
)
def test_onnx_runtime_gives_the_networks_numbers(framework, kind, tmp_path):
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    x = INPUTS[kind]
    network = FRAMEWORKS[framework](kind, x)
    size = to_onnx(tmp_path / "a.onnx", lambda x: network(x), x)
    assert size == (tmp_path / "a.onnx").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    other = np.roll(x[::-1], 1, axis=1)  # not what it was compared on
    (got,) = session.run(None, {session.get_inputs()[0].name: other})
    want = np.asarray(network(other))
    assert got.shape == want.shape == (2, 5)
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_page_has_a_row_for_each_framework():
    rows = re.findall(r"\| `to_onnx` of ([\w ]+) \|(.*)\|", (ROOT / "docs/inference.md").read_text())
    assert [name.lower().split()[-1] for name, _ in rows] == list(FRAMEWORKS)


@pytest.mark.parametrize("padding", ["SAME", [(1, 2), (0, 1), (2, 0)]])
def test_pooling_is_rewritten_to_windows_over_two_axes(padding):
    x = RNG.standard_normal((2, 5, 6, 7, 3), np.float32)

    def pooled(x):
        return nn.max_pool(jax.nn.relu(x) - x, (3, 2, 3), (2, 1, 2), padding)

    fn = rewritten(pooled, x)
    np.testing.assert_array_equal(fn(x), pooled(x))
    windows = re.findall(r"window_dimensions=\(([\d, ]+)\)", str(jax.make_jaxpr(fn)(x)))
    assert windows == ["1, 3, 2", "1, 3"]


@pytest.mark.parametrize(
    "lookup",
    [
        lambda t, i: jax.vmap(lambda i: t[i])(i),
        lambda t, i: jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_slice(t, (0, i), (9, 1))))(i),
        lambda t, i: t[i],  # not written in that way, and left alone
        lambda t, i: t[:, i],
        lambda t, i: jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_slice(t, (i, 0), (2, 7))))(i),
    ],
)
def test_lookups_are_the_same_rewritten(lookup):
    table, places = jnp.asarray(RNG.standard_normal((9, 7), np.float32)), jnp.array([[0, 6, 3], [-1, 20, 5]], jnp.int32)
    fn = rewritten(lookup, table, places)
    np.testing.assert_array_equal(fn(table, places), lookup(table, places))


def test_a_network_that_cannot_be_converted_is_not_written(tmp_path):
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with pytest.raises(ValueError, match=r"(?s)nothing was written:.*by name: no model.*operations: no model"):
        to_onnx(tmp_path / "a.onnx", lambda x: jax.pure_callback(np.negative, x, x), FLAT)
    assert not list(tmp_path.iterdir())
