"""Criteo's click data: rows per second of preparation, with its memory, and rows per second in batches.

The log is made from a real sample's columns, each shuffled on its own, with ever new values in the larger vocabularies.

python -m benchmarks.criteo_data --sample criteo_head_10k.tsv.gz
python -m benchmarks.criteo_data --sample criteo_head_10k.tsv.gz --rows=45840617 --name=criteo_data_full

The second command has as many rows as the challenge's log, and takes 20 GB of disk.
"""

import gzip
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from absl import app, flags

from benchmarks import timing
from experiments import data
from experiments.data.criteo import criteo
from experiments.outputs import progress

_SAMPLE = flags.DEFINE_string("sample", None, "A file of real rows, gzip.", required=True)
_ROWS = flags.DEFINE_integer("rows", 2_500_000, "Rows of the log to make of it.")
_NAME = flags.DEFINE_string("name", "criteo_data", "Name of the result file.")

BATCH = 32_768
CHUNK = 100_000
LARGE = {2: 0.3, 3: 0.1, 11: 0.25, 15: 0.2, 20: 0.2, 23: 0.02, 25: 0.02}  # by category: share of values that are new


def make_log(path: pathlib.Path, sample: pathlib.Path, rows: int) -> None:
    """Write a log with this many rows."""
    lines = gzip.decompress(sample.read_bytes()).decode().splitlines()
    columns = [pa.array(values) for values in zip(*(line.split("\t") for line in lines), strict=True)]
    rng = np.random.default_rng(0)
    pools = {14 + category: _pool(rng, int(share * rows)) for category, share in LARGE.items()}
    options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    schema = pa.schema([(str(j), pa.string()) for j in range(len(columns))])
    with pyarrow.csv.CSVWriter(path, schema, write_options=options) as writer:
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            arrays = []
            for j, column in enumerate(columns):
                array = column.take(pa.array(rng.integers(0, len(column), count)))
                if j in pools:  # the cube makes some of them frequent
                    fresh = pools[j].take(pa.array((len(pools[j]) * rng.random(count) ** 3).astype(np.int64)))
                    array = pa.compute.if_else(pa.array(rng.random(count) < 0.7), fresh, array)
                arrays.append(array)
            writer.write_table(pa.table(arrays, schema))


def _pool(rng: np.random.Generator, count: int) -> pa.Array:
    text = rng.bytes(4 * count).hex().encode()
    offsets = np.arange(0, 8 * count + 1, 8, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(text))


def prepare(path: pathlib.Path, output: pathlib.Path) -> dict[str, float]:
    """Prepare the log in a separate process."""
    command = [sys.executable, "-m", "experiments.data.criteo", "prepare", "--input", str(path)]
    command += ["--output", str(output)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),  # all threads together: steadier than wall time where other work shares the cores
        "rows_per_second": round(_ROWS.value / seconds),
        "peak_mebibytes": round(after.ru_maxrss / 1024),
    }


def batches(output: pathlib.Path) -> dict[str, float]:
    """Batches from the prepared data."""
    iterator = data.train_iterator(criteo(output).train, BATCH, 0)
    started = time.perf_counter()
    next(iterator)
    first = time.perf_counter() - started
    seconds = timing.alternate({"batch": lambda: next(iterator)}, rounds=11)["batch"]
    return {"first_batch_seconds": round(first, 4), "rows_per_second": round(BATCH / float(np.median(seconds)))}


def epoch(output: pathlib.Path) -> dict[str, float]:
    """All batches of an epoch, without training steps between them."""
    source = criteo(output).train
    iterator, count = data.train_iterator(source, BATCH, 0), len(source) // BATCH
    started = time.perf_counter()
    for _ in range(count):
        next(iterator)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "batches": count,
        "seconds": round(seconds, 2),
        "rows_per_second": round(count * BATCH / seconds),
        "peak_mebibytes": round(peak / 1024),  # pages of the mapped columns included
    }


def far_epochs(rows: int = 33_000_000) -> dict[str, float]:
    """The order of as many training rows as in the whole data set, and the first batch of a late epoch."""
    iterator = data.train_iterator(_Numbers(rows), BATCH, 0)
    next(iterator)
    iterator.set_state(iterator.get_state() | {"step": 24 * rows // BATCH})
    started = time.perf_counter()
    next(iterator)
    first = time.perf_counter() - started
    seconds = timing.alternate({"order": lambda: next(iterator)}, rounds=11)["order"]
    return {
        "rows": rows,
        "first_batch_seconds": round(first, 4),
        "rows_per_second": round(BATCH / float(np.median(seconds))),
    }


class _Numbers:
    """A source of nothing but the numbers of its examples."""

    in_memory, draws = True, 0

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def gather(self, rows: np.ndarray, random: np.ndarray | None = None) -> data.Batch:
        del random
        return {"row": rows}


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as folder:
        log, output = pathlib.Path(folder, "log.txt"), pathlib.Path(folder, "criteo")
        make_log(log, pathlib.Path(_SAMPLE.value), _ROWS.value)
        content: dict[str, Any] = {"rows": _ROWS.value, "bytes": log.stat().st_size}
        content |= {"cores": os.cpu_count(), "load": os.getloadavg()}
        content["prepare"] = prepare(log, output)
        manifest = json.loads((output / "manifest.json").read_text())
        content["ids"] = sum(manifest["vocabulary"].values())
        content["prepared_bytes"] = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        content["batches"] = {"size": BATCH, **batches(output)}
        content["epoch"] = epoch(output)
        content["order alone"] = far_epochs()
    parts = ("prepare", "batches", "epoch", "order alone")
    rows = [{"what": part, "rows_per_second": content[part]["rows_per_second"]} for part in parts]
    progress.console().print(progress.table(f"Criteo, {_ROWS.value:,} rows", rows))
    print(timing.save(_NAME.value, content))


if __name__ == "__main__":
    app.run(main)
