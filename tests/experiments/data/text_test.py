"""Text in windows, bits per byte over exactly the bytes held out, and a run of the byte decoder's config."""

import io
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
import scipy.special
from rich.console import Console

import sa_plus_plus as sapp
from configs import bytes_gpt, vit_b16_imagenet, vit_cifar10
from experiments import data, inspect, runs, tasks
from experiments.data import catalog
from experiments.outputs import progress
from experiments.training import evaluation, program, sharding
from experiments.training.setup import prepare, prepare_without_data

pytestmark = pytest.mark.usefixtures("standard_promotion")
TEXT = np.random.default_rng(0).integers(1, 128, 2011, np.uint8).tobytes()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


def folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def text_of(source):
    """The bytes that the windows of a source predict, one after another."""
    batch = source.gather(np.arange(len(source)))
    return b"".join(t[:n].tobytes() for t, n in zip(batch["targets"], batch["length"], strict=True))


def test_windows_predict_every_held_out_byte_once_from_the_one_before(file):
    dataset = catalog.text(str(file), context=64, held_out=0.1)
    assert text_of(dataset.test) == TEXT[-201:]
    assert text_of(dataset.train) == TEXT[:-201]
    batches = list(data.eval_batches(dataset.test, 3))
    lengths = np.concatenate([b["length"] * (b["weight"] > 0) for b in batches])
    assert lengths.tolist() == [64, 64, 64, 9, 0, 0]
    tokens, targets = (batches[0][name].reshape(-1) for name in ("tokens", "targets"))
    np.testing.assert_array_equal(tokens, [0, *targets[:-1]])


def test_training_windows_are_full_and_move_with_the_epoch(file):
    source = catalog.text(str(file), context=64, held_out=0.1).train
    batches = data.train_iterator(source, 29, seed=0)
    first, second = next(batches), next(batches)  # an epoch each
    for batch in (first, second):
        assert (batch["length"] == 64).all()
        for window in batch["targets"]:
            assert window.tobytes() in TEXT[:-201]
    assert {w.tobytes() for w in first["targets"]} != {w.tobytes() for w in second["targets"]}


def test_batches_are_a_function_of_seed_and_step_and_go_on_from_a_state(file):
    source = catalog.text(str(file), context=64, held_out=0.1).train
    whole, resumed = (data.train_iterator(source, 8, seed=3) for _ in range(2))
    batches = [next(whole) for _ in range(9)]
    for batch in batches[:4]:
        np.testing.assert_array_equal(next(resumed)["tokens"], batch["tokens"])
    later = data.train_iterator(source, 8, seed=3)
    later.set_state(json.loads(json.dumps(resumed.get_state())))
    for batch in batches[4:]:
        np.testing.assert_array_equal(next(later)["tokens"], batch["tokens"])
    other = next(data.train_iterator(source, 8, seed=4))
    assert np.any(other["tokens"] != batches[0]["tokens"])


def test_a_folder_is_split_by_file_wherever_it_is(tmp_path):
    texts = {f"{'ab'[i % 2]}/{i}.txt": b"%d " % i * 40 for i in range(20)}
    others = {"a/image.png": b"\x89PNG\0", ".git/config": b"hidden " * 40, "b/.hidden": b"hidden " * 40, "empty": b""}
    datasets = [
        catalog.text(folder(tmp_path / where, texts | more), context=16, held_out=0.3)
        for where, more in (("one", others), ("two/below", {}))
    ]
    for part in ("train", "test"):
        one, two = (text_of(getattr(dataset, part)) for dataset in datasets)
        assert one == two
        assert b"hidden" not in one
    train, test = text_of(datasets[0].train), text_of(datasets[0].test)
    assert all((content in train) != (content in test) for content in texts.values())
    assert len(train) + len(test) == sum(map(len, texts.values()))


def test_the_standard_library_is_there():
    dataset = catalog.text(context=256)
    held_out = len(dataset.test) / (len(dataset.train) + len(dataset.test))
    assert len(dataset.train) * 256 > 5_000_000
    assert 0.02 < held_out < 0.1
    assert dataset.example["tokens"].shape == (1, 256)
    assert b"import" in text_of(dataset.test)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (None, {}, "no file or folder {root}: it should be text to train on"),
        ({}, {}, "no text in {root}: there are no files in it"),
        ({"a": b"", "b": b"\0"}, {}, "no text in {root}: all 2 files in it are empty or have zero bytes"),
        ({"a": b"too short"}, {}, r"{root} has \d bytes to train on, fewer than a window of context=128: give more"),
        ({"a": TEXT}, {"held_out": 1e-9}, "{root} has 0 bytes to test on, fewer than a window"),
        ({"a": TEXT}, {"held_out": 1.0}, r"held_out is the share of the text to test on and must be in \(0, 1\)"),
        ({"a": TEXT}, {"context": 0}, "context must be at least 1 byte, got 0"),
    ],
)
def test_text_that_will_not_do_is_said(files, options, message, tmp_path):
    root = tmp_path / "text"
    if files is not None:
        root.mkdir()
        folder(root, files)
    config = bytes_gpt.get_config()
    config.data.local = str(root)
    config.data.options.update(options)
    with pytest.raises(ValueError, match=message.format(root=re.escape(str(root)))):
        prepare(config)


@pytest.mark.parametrize(("content", "what"), [(b"\0", "is not text"), (b"short", "5 bytes to train on")])
def test_a_file_that_will_not_do_is_said(content, what, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/a (has )?{what}"):
        catalog.text(str(tmp_path / "a"))


def small(file, **changes):
    config = bytes_gpt.get_config()
    config.data.local, config.data.options = str(file), {"context": 16, "held_out": 0.1}
    config.model_options.update({"layers": 1, "width": 16, "hidden": 32, "heads": 2, "dropout": 0.1})
    config.batch_size, config.eval_batch_size, config.steps = 8, 8, 40
    config.log_every, config.eval_every, config.checkpoint_every = 10, 20, 20
    config.optimizer.warmup_steps, config.optimizer.learning_rate = 4, 0.01
    config.sparsifier.block, config.sparsifier.min_blocks = (4, 4), 10
    config.update_from_flattened_dict(changes)
    return config


def test_a_uniform_model_takes_8_bits_per_byte(file):
    dataset = catalog.text(str(file), context=16, held_out=0.1)
    task = tasks.language_modelling(small(file), dataset)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    uniform, state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)

    @jax.jit
    def evaluate(batch):
        return evaluation.weighted_sums(task.outputs(uniform, state, batch, training=False)[0], batch["weight"]), None

    means = task.finish(evaluation.means(evaluate, data.eval_batches(dataset.test, 8)))
    assert means["bits_per_byte"] == pytest.approx(8, abs=1e-5)
    assert means["loss"] == pytest.approx(math.log(256), abs=1e-5)
    assert set(means) == {"bits_per_byte", "loss", "accuracy"}


@pytest.mark.long
def test_the_config_trains_prunes_and_resumes(file, tmp_path, monkeypatch):
    """And what it reports is what the weights that it leaves behind give, byte by byte."""
    setup = prepare(small(file), sharding.make_mesh(devices=jax.devices()[:1]))
    assert {path.split("/")[0] for path in setup.plan.pruned} == {"layer1"}
    assert len(setup.plan.pruned) == 6
    compiled = program.compiled(setup)
    monkeypatch.setattr(program, "compiled", lambda setup: compiled)  # once for both runs
    runs.run(setup, tmp_path / "run", progress.console())
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["metric_name"], result["diverged"]) == ("test_bits_per_byte", False)
    params = sapp.todense(sapp.load(tmp_path / "run/pruned.safetensors"))["params"]
    test = setup.task.dataset.test.gather(np.arange(len(setup.task.dataset.test)))
    logits = np.asarray(jax.jit(setup.task.model.apply)({"params": params}, test["tokens"]))
    nats = scipy.special.logsumexp(logits, axis=-1) - np.take_along_axis(logits, test["targets"][..., None], 2)[..., 0]
    counted = np.arange(16) < test["length"][:, None]
    assert counted.sum() == 201
    assert result["loss"] == pytest.approx(np.mean(nats[counted]), rel=1e-5)
    assert result["metric"] == pytest.approx(result["loss"] / math.log(2), rel=1e-6)
    saved = {path.parent.name: json.loads(path.read_text())["metric"] for path in (tmp_path / "run").rglob("host.json")}
    assert saved["40"] == pytest.approx(-result["metric"], rel=1e-6), "lower is better"
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    for name in ("result.json", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run/checkpoints/40")
    runs.run(setup, tmp_path / "run", progress.console())
    again = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert again == [row for row in rows if json.loads(row)["step"] > 20], "what dropout drops is resumed too"


@pytest.mark.parametrize(
    ("config", "layers", "parameters"),
    [(bytes_gpt, 4, 3_257_856), (vit_cifar10, 6, 4_770_570), (vit_b16_imagenet, 12, 86_567_656)],
    ids=["bytes_gpt", "vit_cifar10", "vit_b16_imagenet"],
)
def test_inspect_shows_what_the_configs_prune(config, layers, parameters):
    setup, screen = prepare_without_data(config.get_config()), io.StringIO()
    inspect.show(setup, Console(file=screen, width=200))
    assert len(setup.plan.pruned) == 6 * layers
    assert {re.sub(r"\d", "", path.split("/")[0]) for path in setup.plan.pruned} == {"layer"}
    for words in ("layer1/query", f"layer{layers}/down", f"{parameters:,}", "90.0"):
        assert words in screen.getvalue()
    looped = config.get_config()
    looped.model_options.scan = True
    assert {path.split("/", 1)[1] for path in prepare_without_data(looped).plan.pruned} == {
        path.split("/", 1)[1] for path in setup.plan.pruned
    }
