"""The dense control of equal cost: its weights and multiply-adds counted by hand, and what has none."""

import importlib
import json
import math
import types

import jax
import numpy as np
import problems
import pytest

from configs import mnist
from experiments import compare, models, runs, tasks
from experiments.models.narrow import narrowed, widest, widths_of
from experiments.outputs import progress
from experiments.training import narrow, sharding
from experiments.training.setup import prepare, prepare_without_data

pytestmark = pytest.mark.usefixtures("standard_promotion")
TEXT = {"data.options.context": 16, "model_options.layers": 1, "model_options.width": 48, "model_options.hidden": 160}
NETWORKS = {
    "LeNet": ("fashion_mnist", {}),
    "ConvNet": ("fashion_mnist", {"model": "ConvNet", "sparsifier.min_blocks": 20}),
    "Autoencoder": ("mnist_autoencoder", {"model_options.width": 64}),
    "ResNet": (
        "cifar10_resnet20",
        {"model_options.stages": (1, 1, 1), "sparsifier.sparsity": 0.7, "sparsifier.min_blocks": 8},
    ),
    "Decoder": ("bytes_gpt", TEXT | {"sparsifier.block": (4, 4)}),
    "ViT": ("vit_cifar10", {"sparsifier.min_blocks": 20}),
    "ClickNet": ("planted", {"data.options.rows": 3000, "data.options.held_out": 1000}),
}


def config_of(name, **changes):
    file, own = NETWORKS[name]
    config = importlib.import_module(f"configs.{file}").get_config()
    for key, value in (own | changes).items():
        if key.startswith("model_options.") and key.removeprefix("model_options.") not in config.model_options:
            with config.unlocked():
                config.model_options[key.removeprefix("model_options.")] = value
        else:
            config.update_from_flattened_dict({key: value})
    return config


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(32, 127, 20_000).astype(np.uint8).tobytes())
    return str(path)


def prepared(name, text, **changes):
    local = {"data.local": text} if name == "Decoder" else {}
    return prepare_without_data(config_of(name, **local, **changes))


def shapes_of(setup):
    """Shapes of the parameters that the model's `init` makes."""
    params, _ = jax.eval_shape(setup.task.init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def kept(shape, block, sparsity, min_blocks):
    """Weights of a pruned kernel by the paper's rule: floor((1 - s) N) of N blocks, all if there are too few."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    count = -(-rows // block[0]) * -(-columns // block[1])
    if count < min_blocks:
        return rows * columns
    return round(rows * columns * math.floor((1 - sparsity) * count + 1e-9) / count)


@pytest.mark.parametrize("name", ["LeNet", "ConvNet", "ResNet", "Decoder", "ClickNet"])
def test_it_has_as_many_weights_as_the_pruned_network(name, text):
    whole = prepared(name, text, **{"sparsifier.name": "dense"})
    options, model, target = whole.config.sparsifier, whole.task.model, 0
    for path, shape in shapes_of(whole).items():
        dense = not path.endswith("kernel") or (options.include and path != options.include)
        target += math.prod(shape) if dense else kept(shape, options.block, options.sparsity, options.min_blocks)
    for cut in narrow.CUTS:
        setup = prepared(name, text, **{"sparsifier.name": "narrow", "sparsifier.narrow.cut": cut})
        found = sum(map(math.prod, shapes_of(setup).values()))
        assert 0.85 * target <= found <= target
        units = max(n for n in range(1, widest(model) + 1) if narrowed(model, n, cut) == setup.narrowed) + 1
        config = narrow.with_options(whole.raw_config, narrowed(model, units, cut))
        wider = prepare_without_data(config, whole.task.dataset)
        assert sum(map(math.prod, shapes_of(wider).values())) > target
        assert not setup.plan.pruned
        assert type(setup.task.model) is type(model)


@pytest.mark.parametrize("name", ["LeNet", "ConvNet"])
def test_it_has_as_many_multiply_adds_as_the_pruned_network(name, text):
    def count(setup):
        kernels = {path: shape for path, shape in shapes_of(setup).items() if path.endswith("kernel")}
        sides = {"Conv_0/kernel": 14, "Conv_1/kernel": 7, "Conv_2/kernel": 4}  # of the results, from 28 pixels
        return {path: sides.get(path, 1) ** 2 * math.prod(shape) for path, shape in kernels.items()}

    whole = prepared(name, text, **{"sparsifier.name": "gradual_magnitude"})
    setup = prepared(name, text, **{"sparsifier.name": "narrow", "sparsifier.narrow.equal": "multiply_adds"})
    share = {layer.path: layer.kept / layer.blocks for layer in whole.plan.pruned.values()}
    target = sum(cost * share.get(path, 1) for path, cost in count(whole).items())
    assert 0.85 * target < sum(count(setup).values()) <= target
    by_weights = prepared(name, text, **{"sparsifier.name": "narrow"})
    assert (by_weights.narrowed == setup.narrowed) == (name == "LeNet")  # where each weight is used once


def made(name):
    required = {"vocabulary": (9, 9)} if name == "ClickNet" else {"classes": 10} if name.startswith("ResNet") else {}
    return getattr(models, name)(**required)


@pytest.mark.parametrize("name", [name for name in models.__all__ if name not in ("MobileNetV2", "EfficientNetLite0")])
def test_widths_of_every_model_fall_together(name):
    model = made(name)
    assert narrowed(model, widest(model)) == narrowed(model, widest(model), "cap") == widths_of(model)
    for cut in ("scale", "cap"):
        every = [_numbers(narrowed(model, units, cut)) for units in range(1, widest(model) + 1)]
        assert (np.diff(every, axis=0) >= 0).all()
        assert np.min(every) >= 1
        if "width" in widths_of(model) and hasattr(model, "heads"):
            assert all(narrowed(model, units, cut)["width"] % model.heads == 0 for units in (1, 100, 333))


def test_a_model_of_unknown_widths_is_refused():
    with pytest.raises(ValueError, match="not known which options of MobileNetV2 are widths"):
        widths_of(models.MobileNetV2(classes=10))


def _numbers(widths):
    return np.concatenate([np.atleast_1d(value) for value in widths.values()])


def test_stages_of_a_resnet_may_have_widths_of_their_own():
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)

    def shapes(**options):
        model = models.ResNet20(classes=10, **options)
        return jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(model.init, jax.random.key(0), x))

    assert shapes() == shapes(widths=(16, 32, 64))
    assert shapes(widths=(5, 11, 21))["params"]["stage3_block1"]["conv1"]["kernel"] == (3, 3, 11, 21)
    with pytest.raises(ValueError, match=r"a width for each of its 3 stages, got widths=\(5, 11\)"):
        shapes(widths=(5, 11))


def run_config(**changes):
    config = mnist.get_config()
    config.steps, config.eval_every, config.log_every, config.dense_twin = 4, 4, 2, False
    config.sparsifier.name = "narrow"
    config.update_from_flattened_dict(changes)
    return config


def on_digits(config):
    return prepare(config, sharding.make_mesh(devices=jax.devices()[:1]), problems.digits())


def test_a_run_says_what_was_trained(tmp_path):
    runs.run(on_digits(run_config()), tmp_path, progress.console())
    result = json.loads((tmp_path / "result.json").read_text())
    weights = problems.weights_of(tmp_path / "pruned.safetensors")
    assert weights["Dense_0/kernel"].shape == (784, result["narrowed"]["widths"][0])
    assert result["kept_weights"] == sum(map(np.size, weights.values())) == 27_195
    assert (result["algorithm"], result["real_sparsity"]) == ("narrow", 0)
    assert result["config"]["model_options"] == {}  # as given: the same command resumes


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"init_from": "runs/dense"}, "narrow.*config.init_from=runs/dense does not go with it. Train a smaller dense"),
        ({"distil.weight": 0.5}, "config.distil.weight=0.5 does not go with it"),
        (
            {"sparsifier.sparsity": 0.999, "sparsifier.block": (1, 1)},
            r"narrowest LeNet300, widths=\(1, 1\), has 807 weights, more than the 685 of the pruned network: lower",
        ),
        ({"sparsifier.narrow.equal": "milliseconds"}, "equal='milliseconds' is unknown.*Known: weights, multiply_adds"),
        ({"sparsifier.narrow.cut": "crop"}, "cut='crop' is unknown; did you mean 'cap'"),
        ({"sparsifier.name": "narow"}, "config.sparsifier.name='narow' is unknown; did you mean 'narrow'"),
        ({"sparsifier.block": (900, 900)}, "nothing to prune with block="),
    ],
)
def test_what_has_no_narrow_network_is_said(changes, match):
    with pytest.raises(ValueError, match=match):
        on_digits(run_config(**changes))


def test_models_whose_widths_are_not_known_and_published_weights_are_refused():
    class Unknown:
        pass

    config = run_config()
    task = types.SimpleNamespace(start=None, model=Unknown())
    with pytest.raises(narrow.CannotNarrow, match=r"widths: add it to widths_of in experiments/models/narrow\.py"):
        narrow.widths(config, task, None)
    task = types.SimpleNamespace(start=lambda: None, model=Unknown())
    with pytest.raises(narrow.CannotNarrow, match="'classification', which begins with published weights does not go"):
        narrow.widths(config, task, None)


def test_a_comparison_of_all_goes_on_without_it(monkeypatch, capsys):
    monkeypatch.setattr(tasks, "dataset_of", lambda config: problems.digits())
    changes = {"sparsifier.sparsity": 0.999, "sparsifier.block": (1, 1), "batch_size": 96, "eval_batch_size": 400}
    config = run_config(**changes)
    console = progress.console()
    assert list(compare.prepared(config, ("dense", "narrow"), True, console)) == ["dense"]
    assert "narrow is left out: config.sparsifier.name='narrow': the narrowest LeNet300" in capsys.readouterr().out
    with pytest.raises(narrow.CannotNarrow):
        compare.prepared(config, ("dense", "narrow"), False, console)
    config.sparsifier.sparsity = 0.9
    assert list(compare.prepared(config, ("dense", "narrow"), True, console)) == ["dense", "narrow"]
