"""How well runs' sentence embeddings retrieve, beside those of the published encoder.

    python -m experiments.main --config=configs/minilm.py --workdir=runs/minilm
    python -m experiments.embedding_quality --runs=runs/minilm --pairs=pairs.tsv.gz

A line of the file of pairs ends with a query and the text that belongs to it, separated by tabs. For each query, its
own text is searched among all by the cosine: recall at 1 and at 10, and the mean reciprocal rank. `cosine` is that of
the queries' embeddings to the published ones, and `neighbours` the share of each query's ten nearest other queries that
stay among them. The table also goes to `--output`, as JSON.
"""

import pathlib

from absl import flags

from experiments import cli
from experiments.data.sentences import pairs_of
from experiments.models import sentences
from experiments.outputs import progress, report
from experiments.retrieval import embedded, of_run, quality, runner, tokenized
from experiments.utils import files

_RUNS = flags.DEFINE_list("runs", [], "Directories of runs of the task sentence_embedding.")
_PAIRS = flags.DEFINE_string("pairs", "", "File of pairs; by default from the docstrings of the standard library.")
_MODEL = flags.DEFINE_string("model", "", "Directory of the published encoder; by default that of its package.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Take the first so many pairs; 0 for all.", lower_bound=0)
_OUTPUT = flags.DEFINE_string("output", "", "Where the table goes as JSON; empty for nowhere.")


def main(argv: list[str]) -> None:
    del argv  # cli.run has refused any
    console, rows = progress.console(), {}
    with cli.input_errors():
        paths = {path: of_run(pathlib.Path(path), _MODEL.value) for path in _RUNS.value}
        encoder = sentences.load(_MODEL.value)
        pairs = tokenized(encoder, pairs_of(_PAIRS.value), _LIMIT.value)
    console.print(f"{len(pairs.queries['real']):,} pairs", highlight=False)
    published = embedded(runner(encoder.model, encoder.params), pairs)
    for name, found in {"published": (encoder.model, encoder.params), **paths}.items():
        ours = published if name == "published" else embedded(runner(*found), pairs)
        rows[name] = quality(ours, published)
        console.print(name, "  ".join(f"{key} {value:.4f}" for key, value in rows[name].items()), highlight=False)
    cells = [{"network": name, **{key: f"{x:.3f}" for key, x in row.items()}} for name, row in rows.items()]
    console.print(progress.table(pathlib.Path(_PAIRS.value).name or "docstrings", cells))
    if _OUTPUT.value:
        files.write_json(pathlib.Path(_OUTPUT.value), {"rows": rows, "versions": report.versions()})


if __name__ == "__main__":
    cli.run(main)
