"""Criteo's click log, prepared and read, against a plain program that does the same line by line."""

import collections
import fcntl
import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from commands import ROOT
from real_data import FILES

from experiments import data
from experiments.data.criteo import criteo
from experiments.data.criteo.columns import CATEGORICAL, FEATURES, NUMERIC, PARTS, Options, bucket, parts
from experiments.data.criteo.parse import KINDS, parse
from experiments.data.criteo.prepare import prepare
from experiments.data.criteo.reader import InputError, layout

SAMPLE = FILES / "criteo" / "criteo_head_10k.tsv.gz"
LENIENT = Options(max_malformed=0.5)


def make_lines(n, seed=0):
    """Lines of fields: frequent, rare and missing values, small, large and negative numbers."""
    rng = np.random.default_rng(seed)
    pools = [[f"{v:08x}" for v in rng.integers(0, 2**32, size)] for size in rng.integers(1, 60, 26)]
    pools[0] += ["00000000", "ffffffff"]
    largest = 10 ** rng.uniform(0.5, 9, 13)
    lines = []
    for _ in range(n):
        fields = [str(rng.integers(2))]
        fields += [str(int(rng.random() ** 4 * most) - 3) if rng.random() < 0.8 else "" for most in largest]
        fields += [pool[int(len(pool) * rng.random() ** 2)] if rng.random() < 0.9 else "" for pool in pools]
        lines.append(fields)
    return lines


def tabbed(lines, end=b"\n"):
    return b"".join(b"\t".join(field.encode() for field in line) + end for line in lines)


def headed(lines, number=False):
    head = ["Id"] * number + ["label", *FEATURES]
    rows = [[str(10_000_000 + i)] * number + line for i, line in enumerate(lines)]
    return "".join(",".join(row) + "\n" for row in [head, *rows]).encode()


FORMATS = {
    "plain": tabbed,
    "crlf": lambda lines: tabbed(lines, b"\r\n"),
    "no last end": lambda lines: tabbed(lines)[:-1],
    "gzip": lambda lines: gzip.compress(tabbed(lines)),
    "two gzips": lambda lines: gzip.compress(tabbed(lines[:7])) + gzip.compress(tabbed(lines[7:])),
    "zstd": lambda lines: pa.compress(tabbed(lines), "zstd", asbytes=True),
    "csv": headed,
    "csv with mark": lambda lines: "\ufeff".encode() + headed(lines),
    "csv with Id": lambda lines: headed(lines, number=True),
    "csv, crlf, gzip": lambda lines: gzip.compress(headed(lines).replace(b"\n", b"\r\n")),
}


def plainly(content, options):
    """By part, ids and labels; the sizes of the vocabularies; the numbers of the bad lines by kind."""
    lines = content.split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines
    rows, bad = {}, collections.defaultdict(list)
    for number, line in enumerate(lines):
        row, kind = one_line(line.removesuffix(b"\r"), options)
        if kind:
            bad[kind].append(number + 1)
        else:
            rows[number] = row
    if options.order == "random":
        draws = np.random.Generator(np.random.Philox(key=options.seed)).random(len(lines))
    else:
        draws = [(i + 0.5) / len(lines) for i in range(len(lines))]
    ends = (options.train, options.train + options.validation, 2)
    part_of = {number: next(i for i in range(3) if draws[number] < ends[i]) for number in rows}
    ids_of = []
    for j, name in enumerate(FEATURES):
        values = (rows[number][1][j] for number in rows if part_of[number] == 0)
        counts = collections.Counter(value for value in values if value is not None)
        least = options.numeric_minimum_count if name in NUMERIC else options.minimum_count
        kept = sorted((v for v in counts if counts[v] >= least), key=lambda v: (-counts[v], v % 2**32))
        ids_of.append({None: 1} | {value: 2 + place for place, value in enumerate(kept)})
    result = []
    for part in range(3):
        chosen = [rows[number] for number in rows if part_of[number] == part]
        ids = [[ids_of[j].get(value, 0) for j, value in enumerate(values)] for _, values in chosen]
        result.append((np.array(ids, np.int32).reshape(-1, 39), np.array([label for label, _ in chosen])))
    return result, tuple(1 + len(known) for known in ids_of), dict(bad)


def one_line(line, options):
    if line == b"":
        return None, "blank"
    try:
        fields = line.decode("utf-8").split("\t")
    except UnicodeDecodeError:
        return None, "encoding"
    if len(fields) != 40:
        return None, "columns"
    if fields[0] not in ("0", "1"):
        return None, "label"
    values = []
    for field in fields[1:14]:
        if field == "":
            values.append(None)
            continue
        if not re.fullmatch("-?[0-9]+", field, re.ASCII) or not -(2**31) <= int(field) < 2**31:
            return None, "number"
        x = int(field)
        if x > options.threshold:
            x = options.threshold + 1 + math.floor((math.log(x) / math.log(options.base)) ** options.exponent)
        values.append(x)
    for field in fields[14:]:
        if field != "" and not re.fullmatch("[0-9a-fA-F]{8}", field):
            return None, "category"
        values.append(int(field, 16) if field else None)
    return (int(fields[0]), values), None


def assert_prepared(folder, expected):
    found, (parts_, sizes, bad) = criteo(folder, verify=True), expected
    assert found.vocabulary == sizes
    assert {k: v["lines"] for k, v in found.manifest["malformed"].items() if v["lines"]} == {
        k: len(v) for k, v in bad.items()
    }
    assert all(found.manifest["malformed"][kind]["first"] == numbers[:5] for kind, numbers in bad.items())
    for name, source, (ids, label) in zip(PARTS, found[:3], parts_, strict=True):
        assert found.manifest["rows"][name] == len(source) == len(label)
        assert found.manifest["clicks"][name] == label.sum()
        batch = source.gather(np.arange(len(source)))
        np.testing.assert_array_equal(batch["ids"], ids)
        np.testing.assert_array_equal(batch["label"], label)


def written(path, content):
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A file of 400 good lines."""
    return written(tmp_path_factory.mktemp("log") / "log.txt", tabbed(make_lines(400)))


@pytest.fixture
def prepared(log, tmp_path):
    prepare(log, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("form", FORMATS)
def test_formats(tmp_path, form):
    lines = make_lines(300, seed=1)
    source = written(tmp_path / "log", FORMATS[form](lines))
    manifest = prepare(source, tmp_path / "new" / "out", block=5000)
    assert_prepared(tmp_path / "new" / "out", plainly(tabbed(lines), Options()))
    assert manifest == json.loads((tmp_path / "new" / "out" / "manifest.json").read_text())
    assert manifest["source"]["bytes"] == len(FORMATS[form](lines))
    assert os.listdir(tmp_path / "new") == ["out"]


OPTIONS = [
    Options(seed=3, minimum_count=2, numeric_minimum_count=3),
    Options(train=0.5, validation=0.2, test=0.3, threshold=5, exponent=1.5, base=3.0),
    Options(order="chronological", minimum_count=1),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options(tmp_path, options):
    content = tabbed(make_lines(500, seed=2))
    manifest = prepare(written(tmp_path / "log", content), tmp_path / "out", options, block=20_000)
    assert_prepared(tmp_path / "out", plainly(content, options))
    assert Options(**manifest["options"]) == options


def spoiled(rng, line):
    """A line with something wrong, or something odd that is right."""
    fields = list(line)
    number, category = rng.integers(1, 14), rng.integers(14, 40)
    ways = {
        "blank": lambda: b"",
        "few": lambda: "\t".join(fields[:-1]).encode(),
        "many": lambda: "\t".join([*fields, "00000000"]).encode(),
        "comma": lambda: ",".join(fields).encode(),
        "latin": lambda: b"\t".join([*(f.encode() for f in fields[:-1]), b"caf\xe9abcd"]),
        "latin and few": lambda: b"\t".join([*(f.encode() for f in fields[:-2]), b"caf\xe9abcd"]),
        "latin and many": lambda: "\t".join(fields).encode() + b"\t\xff\xfe",
        "latin alone": lambda: b"\xff",
        "accent": lambda: "\t".join([*fields[:-1], "abcdefé"]).encode(),
        "accent and few": lambda: "\t".join([*fields[:-2], "abcdefé"]).encode(),
        "space": lambda: b"   ",
        "return": lambda: "\t".join(fields).encode().replace(b"\t", b"\r\t", 1),
        "zero": lambda: "\t".join(fields).encode().replace(b"\t", b"\0\t", 1),
    }
    at = {
        "labels": (0, ("2", "", "1.0", "-1", "01", "x", '"1"')),
        "numbers": (number, ("0x1f", "1.5", "+1", " 1", "-", "--1", "1-", "1e3", "2147483648", "9" * 30, "nan")),
        "categories": (category, ("0123456", "012345678", "0123456g", "-1234567", "0x123456", " 1234567", "x" * 16)),
        "fine": (number, ("007", "-0", "2147483647", "-2147483648", "000000000000000000001")),
        "upper": (category, ("ABCDEF01",)),
    }
    way = rng.choice([*ways, *at])
    if way in ways:
        return ways[way]()
    where, texts = at[way]
    fields[where] = rng.choice(texts)
    return "\t".join(fields).encode()


@pytest.mark.parametrize("seed", range(6))
def test_malformed_lines_are_counted_and_left_out(tmp_path, seed):
    rng = np.random.default_rng(seed)
    lines = [
        spoiled(rng, line) if rng.random() < 0.2 else "\t".join(line).encode() for line in make_lines(250, seed=10)
    ]
    content = (b"\r\n" if seed % 2 else b"\n").join([*lines, b""])
    expected = plainly(content, LENIENT)
    assert set(expected[2]) <= set(KINDS)
    source = written(tmp_path / "log", content)
    prepare(source, tmp_path / "out", LENIENT, block=(700, 10_000, 10**6)[seed % 3])
    assert_prepared(tmp_path / "out", expected)
    with pytest.raises(InputError, match=r"malformed lines among its first 250, more than are allowed: .* \(line "):
        prepare(source, tmp_path / "too many")
    first = min(numbers[0] for numbers in expected[2].values())
    with pytest.raises(InputError, match=rf"log, line {first}: (it|its label|[IC]\d+) "):
        prepare(source, tmp_path / "strict", Options(strict=True, max_malformed=0.5), block=3000)
    assert sorted(os.listdir(tmp_path)) == ["log", "out"]


@pytest.mark.parametrize(
    ("place", "text", "message"),
    [
        (0, "2", "its label is '2', not 0 or 1"),
        (5, "1.5", "I5 is '1.5', not a whole number of 32 bits"),
        (39, "zz", "C26 is 'zz', not 8 hexadecimal digits"),
        (1, "1\r", r"I1 is '1\r', not a whole"),
        (39, "00000000\t", "it has 41 fields instead of 40"),
    ],
)
def test_strict_says_what_is_wrong(tmp_path, place, text, message):
    lines = make_lines(30)
    lines[16][place] = text
    for content, number in ((tabbed(lines), 17), (headed(lines).replace(b"\t", b","), 18)):
        source = written(tmp_path / "log", content)
        with pytest.raises(InputError, match=re.escape(f"line {number}: {message}")):
            prepare(source, tmp_path / "out", Options(strict=True), block=2000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (b"\n\n\n", "3 malformed lines among its first 3.*3 by blank"),
        (b"a,b,c\n" * 99, "99 by columns"),
        (b"a,b,c\n" * 9_000_000, r"no click log: its first \d{5} lines are malformed, the first: it has 1 fields inst"),
        (headed([]), "a header and no lines"),
        (b"label,I1\n0,1\n", r"a header that is not label,I1..I13,C1..C26 with or without Id: see \['c1', 'c10'"),
        (headed([]).replace(b"C26", b"C26,C27"), r"see \['c27'\]"),
        (headed([]).replace(b"C26", b"C26,C26"), "a name twice"),
        (tabbed(make_lines(2)), "has 2 good lines, too few: none of them is for"),
        (gzip.compress(tabbed(make_lines(90)))[:-4], "damaged or incomplete"),
        (gzip.compress(tabbed(make_lines(90)))[:-900], "damaged or incomplete"),
        (gzip.compress(tabbed(make_lines(90)))[:-8] + bytes(8), "damaged or incomplete"),
        (pa.compress(tabbed(make_lines(90)), "zstd", asbytes=True)[:-50], "damaged or incomplete"),
        (bytes(20 << 20), "a line of more than"),
    ],
)
def test_files_that_are_no_click_logs(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        prepare(written(tmp_path / "log", content), tmp_path / "out", Options(max_malformed=0.9))
    assert os.listdir(tmp_path) == ["log"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*/log: the click log should be there"):
        prepare(tmp_path / "log", tmp_path / "out")


def test_a_file_that_changes(tmp_path):
    source = written(tmp_path / "log", tabbed(make_lines(100)))
    with pytest.raises(InputError, match="log changed while it was read"):
        prepare(source, tmp_path / "out", progress=lambda _: os.utime(source, (1, 1)))
    assert os.listdir(tmp_path) == ["log"]


@pytest.mark.parametrize("choice", ["threads", "block"])
def test_no_threads_and_no_blocks(log, tmp_path, choice):
    with pytest.raises(ValueError, match=f"{choice} must be at least 1, got 0"):
        prepare(log, tmp_path / "out", **{choice: 0})


@pytest.mark.parametrize("options", [LENIENT, Options(order="chronological", max_malformed=0.5)])
def test_output_depends_on_neither_blocks_nor_threads(tmp_path, options):
    lines = make_lines(600, seed=4)
    lines[77] = lines[301] = ["x"]
    lines[0] = lines[400] = ["\ufeff" + lines[0][0], *lines[0][1:]]  # an encoding's mark, which readers pass over
    source = written(tmp_path / "log", tabbed(lines))
    manifests = [
        prepare(source, tmp_path / f"{block}", options, threads=threads, block=block)
        for block, threads in ((1, 2), (999, 1), (20_000, 3), (10**7, 2))
    ]
    assert all(manifest == manifests[0] for manifest in manifests)
    assert manifests[0]["malformed"]["label"] == {"lines": 2, "first": [1, 401]}


def test_shares():
    n = 300_000
    for options in (Options(), Options(seed=1), Options(order="chronological")):
        part = np.concatenate([parts(first, n // 3, n, options) for first in range(0, n, n // 3)])
        np.testing.assert_array_equal(part[1001:1777], parts(1001, 776, n, options))
        shares = np.bincount(part) / n
        np.testing.assert_allclose(shares, [0.72, 0.18, 0.10], atol=1e-9 if options.order == "chronological" else 4e-3)
    assert np.all(np.diff(part.astype(int)) >= 0)
    one, other = (parts(0, n, None, Options(seed=seed)) == 0 for seed in (0, 1))
    assert np.mean(one & other) == pytest.approx(0.72**2, abs=5e-3)


def test_buckets():
    numbers = np.array([-(2**31), -3, -1, 0, 1, 2, 3, 4, 5, 20, 21, 1000, 2**31 - 1], np.int32)
    expected = [-(2**31), -3, -1, 0, 1, 2, 3 + 1, 3 + 1, 3 + 2, 3 + 8, 3 + 9, 3 + 47, 3 + 461]
    assert bucket(numbers, Options()).tolist() == expected
    assert bucket(numbers, Options(threshold=2**31 - 1)).tolist() == numbers.tolist()
    assert bucket(numbers[-1:], Options(base=1.0001, exponent=3.0)).tolist() == [2**31 - 1]
    many = np.arange(1, 100_000, dtype=np.int32)
    assert np.all(np.diff(bucket(many, Options())) >= 0)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"train": 0.8}, "sum to 1, got"),
        ({"train": 1.0, "validation": 0.0, "test": 0.0}, "shares above 0"),
        ({"order": "sorted"}, "'random' or 'chronological', got 'sorted'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"minimum_count": 0}, "minimum_count must be at least 1, got 0"),
        ({"threshold": 0}, "threshold must be at least 1, got 0"),
        ({"base": 1.0}, "base must be above 1, got 1.0"),
        ({"exponent": math.nan}, "exponent must be above 0, got nan"),
        ({"max_malformed": 1.0}, r"share in \[0, 1\), got 1.0"),
    ],
)
def test_choices_that_cannot_be(choice, message):
    with pytest.raises(ValueError, match=message):
        Options(**choice)


def program(*arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else ["-m", "experiments.data.criteo", "prepare"])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("reports", [1, 2])
def test_killed(log, tmp_path, reports):
    """At the end of each pass: with rows staged, and with all files but the manifest written."""
    code = (
        "import os, sys, itertools\n"
        "from experiments.data.criteo.prepare import prepare\n"
        "count = itertools.count(1)\n"
        f"prepare(*sys.argv[1:], progress=lambda _: next(count) == {reports} and os.kill(os.getpid(), 9))\n"
    )
    output = tmp_path / "out"
    assert program(log, output, code=code).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".out.partial"]
    assert "staged" in os.listdir(tmp_path / ".out.partial")
    for folder in (output, tmp_path / ".out.partial"):
        with pytest.raises(FileNotFoundError, match="is no prepared data; prepare them by"):
            criteo(folder)
    prepare(log, output)
    assert_prepared(output, plainly(log.read_bytes(), Options()))
    assert os.listdir(tmp_path) == ["out"]


def test_killed_while_replacing(prepared, log):
    os.rename(prepared, prepared.parent / ".out.old")
    with pytest.raises(FileExistsError):
        prepare(log, prepared)
    criteo(prepared, verify=True)


def test_one_at_a_time(log, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    lock = os.open(tmp_path / ".out.partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match=r"another process is preparing .*/out; wait for it"):
        prepare(log, tmp_path / "out")
    os.close(lock)
    prepare(log, tmp_path / "out")


def test_what_exists_is_replaced_only_on_request(prepared, log, tmp_path):
    before = criteo(prepared)
    with pytest.raises(FileExistsError, match="/out exists already; choose another output, or ask to overwrite it"):
        prepare(log, prepared)
    with pytest.raises(InputError, match="empty"):
        prepare(written(tmp_path / "empty", b""), prepared, overwrite=True)
    assert criteo(prepared, verify=True).manifest == before.manifest
    prepare(log, prepared, Options(seed=1), overwrite=True)
    assert criteo(prepared, verify=True).manifest["options"]["seed"] == 1
    assert sorted(os.listdir(tmp_path)) == ["empty", "out"]


def test_what_is_no_preparation_is_never_replaced(log, tmp_path):
    (tmp_path / "mine").mkdir()
    prepare(log, tmp_path / "mine")  # nothing in it yet
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    for output in (tmp_path / "mine", log):
        with pytest.raises(FileExistsError, match="is no earlier preparation, so it is not overwritten"):
            prepare(log, output, overwrite=True)


def change(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), FileNotFoundError, "is no prepared data"),
        (lambda f: (f / "manifest.json").write_text("{"), ValueError, "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1}'), ValueError, "format 1, not 'criteo-1'"),
        (lambda f: (f / "manifest.json").write_text('{"format": "criteo-1"}'), ValueError, "manifest.json is damaged"),
        (lambda f: (f / "test_ids.npy").unlink(), ValueError, "no file .*test_ids.npy, though manifest.json lists it"),
        (lambda f: os.truncate(f / "train_ids.npy", 999), ValueError, "train_ids.npy has 999 bytes instead of"),
        (lambda f: change(f / "train_label.npy", 0), ValueError, "train_label.npy is damaged"),
        (lambda f: change(f / "values.npy", 23), ValueError, "values.npy (has|is damaged)"),
        (lambda f: change(f / "validation_ids.npy", -1), None, "validation_ids.npy has checksum"),
    ],
)
def test_damaged_output_is_refused(prepared, damage, error, message):
    damage(prepared)
    if error is None:
        criteo(prepared)  # sizes are right
    with pytest.raises(error or ValueError, match=message):
        criteo(prepared, verify=error is None)


def test_sizes_of_the_manifest_are_checked(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    for key, name in (("rows", "train"), ("vocabulary", "C3")):
        changed = json.loads(json.dumps(manifest))
        changed[key][name] += 1
        (prepared / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"\.npy has \("):
            criteo(prepared)


def test_batches(prepared):
    source = criteo(prepared).train
    n = len(source)
    batches = [next(iterator) for iterator in [data.train_iterator(source, n // 2, 0)] for _ in range(2)]
    assert {name: (x.shape, x.dtype) for name, x in batches[0].items()} == {
        "ids": ((n // 2, 39), np.int32),
        "label": ((n // 2,), np.uint8),
    }
    seen = np.concatenate([np.column_stack([b["ids"], b["label"]]) for b in batches])
    order = np.random.default_rng((0, 0)).permutation(n)[: len(seen)]
    np.testing.assert_array_equal(seen, np.column_stack([source.arrays["ids"], source.arrays["label"]])[order])
    with pytest.raises(ValueError, match="read-only"):
        source.arrays["ids"][0] = 0
    evaluated = list(data.eval_batches(criteo(prepared).test, 32))
    assert sum(batch["weight"].sum() for batch in evaluated) == len(criteo(prepared).test)


def test_command(log, tmp_path):
    done = program("--input", log, "--output", tmp_path / "out", "--seed=5", "--minimum_count=2")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{tmp_path}/out: \d+ to train on, \d+ to validate .*; 0 lines left out\n", done.stdout)
    assert re.search(r"^reading: 400 rows, [\d,]+ rows/s$", done.stderr, re.MULTILINE)
    assert_prepared(tmp_path / "out", plainly(log.read_bytes(), Options(seed=5, minimum_count=2)))
    for arguments, message in (
        (("--output", tmp_path / "out"), "exists already"),
        (("--output", tmp_path / "new", "--train=0.9"), "sum to 1"),
    ):
        done = program("--input", log, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith("Cannot run: ")
        assert message in done.stderr


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"{SAMPLE} is not here; SAPP_TEST_DATA says where to look")
def test_real_rows(tmp_path):
    content = gzip.decompress(SAMPLE.read_bytes())
    prepare(SAMPLE, tmp_path / "out", Options(strict=True))
    assert_prepared(tmp_path / "out", plainly(content, Options()))
    rows = parse(content, layout(SAMPLE), Options())
    published = {"C3": 5520, "C4": 4032, "C7": 3184, "C10": 2986, "C12": 5283, "C16": 4723, "C21": 5036, "C24": 2524}
    distinct = {
        name: len(np.unique(rows.keys[j][~rows.missing[j]])) for j, name in enumerate(FEATURES) if name in CATEGORICAL
    }
    assert published.items() <= distinct.items()
    assert sum(distinct.values()) == 43_579
    assert rows.missing[:13].mean() == pytest.approx(0.209, abs=5e-4)
    assert rows.missing[13:].mean() == pytest.approx(0.114, abs=5e-4)
    assert rows.label.mean() == pytest.approx(0.218, abs=5e-4)
