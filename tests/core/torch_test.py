"""Models of PyTorch: columns are outputs in each kind of layer, and what torchax makes of a model is pruned."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sa_plus_plus as sapp
from sa_plus_plus import blocks
from sa_plus_plus.contrib.torch import kernel_views

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nn = torch.nn
pytestmark = pytest.mark.usefixtures("standard_promotion")


class Conv1D(nn.Module):
    """A linear layer stored as inputs by outputs, as transformers has it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12, 12))

    def forward(self, x):
        return x @ self.weight


def images(rank):
    return torch.ones(1, 12, *[3] * rank)


CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
FLAT = torch.ones(1, 12)
# The layer, its input, its weight. All are square and have no bias, so that only the types tell.
LAYERS = {
    "linear": (lambda: nn.Linear(12, 12, bias=False), FLAT, "weight"),
    "transformers": (Conv1D, FLAT, "weight"),
    "cell": (lambda: nn.RNNCell(12, 12, bias=False), FLAT, "weight_ih"),
    "recurrent": (lambda: nn.RNN(12, 12, bias=False), FLAT, "weight_ih_l0"),
    **{
        f"{make.__name__}, {options}": (
            lambda make=make, options=options: make(12, 12, 3, padding=1, bias=False, **options),
            images(rank),
            "weight",
        )
        for rank, makes in CONVOLUTIONS.items()
        for make in makes
        for options in ({}, {"groups": 3})
        if not (options and make is makes[1])
    },
}


def kernels(model):
    return {name: np.asarray(weight.detach()) for name, weight in model.named_parameters()}


def plan_of(model, params):
    views = kernel_views(model, params)
    options = {"block": 1, "sparsity": 0.5, "min_blocks": 1}
    return sapp.plan(params, views=views, where=views.__contains__, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_columns_are_the_outputs_of_a_layer(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", types.SimpleNamespace(Conv1D=Conv1D))
    make, x, weight = LAYERS[name]
    model, column = make(), 4
    layer = plan_of(model, kernels(model)).pruned[weight]
    assert not layer.assumed
    matrix = np.zeros(blocks.matrix_shape(layer.shape, layer.view), np.float32)
    matrix[:, column] = 1
    filled = np.asarray(blocks.from_matrices(jnp.asarray(matrix), layer.shape, layer.view))
    model.load_state_dict({weight: torch.from_numpy(filled.copy())}, strict=False)
    with torch.no_grad():
        y = model(x)
    y = (y[0] if isinstance(y, tuple) else y).reshape(12, -1)
    assert torch.nonzero(y.any(1)).flatten().tolist() == [column]


def test_columns_of_fused_attention_are_those_of_query_key_and_value():
    model = nn.MultiheadAttention(12, 2, bias=False)
    plan = plan_of(model, kernels(model))
    assert list(plan.pruned) == ["in_proj_weight", "out_proj.weight"]
    layer = plan.pruned["in_proj_weight"]
    assert blocks.matrix_shape(layer.shape, layer.view) == (12, 36)
    matrix = jnp.zeros((12, 36)).at[:, 24 + 4].set(1)
    model.in_proj_weight.data = torch.from_numpy(np.array(blocks.from_matrices(matrix, layer.shape, layer.view)))
    model.out_proj.weight.data = torch.eye(12)
    token = torch.ones(1, 1, 12)
    with torch.no_grad():
        y = model(token, token, token)[0]
    assert torch.nonzero(y.flatten()).flatten().tolist() == [4]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.dense, self.head = nn.Embedding(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.head.weight = self.words.weight
        self.depthwise = nn.Conv2d(12, 24, 3, groups=12)
        self.up = nn.ConvTranspose2d(12, 12, 3, groups=3)
        self.position = nn.Parameter(torch.ones(12, 12))


@pytest.mark.parametrize("tied", [True, False], ids=["one name", "both names"])
def test_only_kernels_of_layers_are_pruned(tied):
    model = Tied()
    params = {n: np.asarray(w.detach()) for n, w in model.named_parameters(remove_duplicate=tied)}
    assert ("head.weight" in params) == (not tied)
    assert list(plan_of(model, params).pruned) == ["dense.weight"]


def test_what_is_no_model_or_not_its_weights_is_refused():
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got dict"):
        kernel_views({}, {})
    with pytest.raises(
        ValueError, match=r"none of the 1 arrays is the weight of a layer of this Linear: .* fc\.weight"
    ):
        kernel_views(nn.Linear(3, 4), {"fc.weight": np.ones((4, 3))})
    with pytest.raises(ValueError, match=r"weight has the shape \(3, 4\), but \(4, 3\) in the model"):
        kernel_views(nn.Linear(3, 4), {"weight": np.ones((3, 4))})


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 32, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(32), nn.Hardswish()
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 32, 1)
        self.up = nn.ConvTranspose2d(32, 32, 2, stride=2)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        x = self.point(self.act(self.depthwise(torch.relu(self.norm(self.conv(x))))))
        x = self.up(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_a_torch_model_is_trained_pruned_and_served(tmp_path):
    torchax = pytest.importorskip("torchax", reason="torchax is not installed")
    torch.manual_seed(0)
    model = Network().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 1.5)
    x = jax.random.normal(jax.random.key(0), (4, 8, 4, 4))
    weights, fn = torchax.extract_jax(model)
    params = {name: weights[name] for name, _ in model.named_parameters()}
    rest = {name: weight for name, weight in weights.items() if name not in params}

    def outputs():
        with torch.no_grad():
            return model(torch.from_numpy(np.array(x))).numpy()

    np.testing.assert_allclose(jax.jit(fn)(weights, (x,)), outputs(), rtol=1e-4, atol=1e-5)
    views = kernel_views(model, params)
    sp = sapp.magnitude(
        block=4,
        sparsity=0.75,
        phases=sapp.phases.custom(3, [("dense", 1), ("sparse", 2)]),
        min_blocks=16,
        views=views,
        where=views.__contains__,
    )
    tx = sapp.sparsify(sapp.reset_on(optax.sgd(0.01)), sp)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.mean(fn(rest | params, (x,)) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    plan = sp.plan(params)
    assert set(plan.pruned) == {
        *("conv.weight", "point.weight", "up.weight", "head.weight"),
        *("attention.in_proj_weight", "attention.out_proj.weight"),
    }
    sapp.check_pruned(params, plan)
    model.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in params.items()}, strict=False)
    want = outputs()
    fast = sapp.specialize(lambda x: fn(rest | params, (x,)), x, plan=plan, mode="always")
    np.testing.assert_allclose(fast(x), want, rtol=1e-4, atol=1e-5)
    assert sum(choice.sparse for choice in fast.choices) == len(plan.pruned) - 1, fast  # the transposed one is not
    fast.save(tmp_path / "network")
    np.testing.assert_array_equal(sapp.serve.load(tmp_path / "network")(x), fast(x))
