"""CSV files as they are found: numbers of any size, odd encodings and compressions, damage."""

import bz2
import csv
import fractions
import gzip

import numpy as np
import pyarrow as pa
import pytest
from sklearn.model_selection import ShuffleSplit

from experiments.data import catalog


def table(tmp_path, content, name="t.csv", **options):
    (tmp_path / name).write_bytes(content)
    return catalog.table(str(tmp_path / name), **options)


def column(texts, labels="ab"):
    """A table of these texts, with labels in turn."""
    rows = (f"{text},{labels[i % len(labels)]}\n" for i, text in enumerate(texts))
    return "".join(["x,y\n", *rows]).encode()


def rows(dataset):
    return dataset.train.arrays["row"][:, 0], dataset.test.arrays["row"][:, 0]


DIGITS = np.random.default_rng(3).integers(-99, 99, 40).tolist()


@pytest.mark.parametrize(
    "texts",
    [
        *([f"{k}e{power}" for k in DIGITS] for power in (-300, -200, 0, 200, 306)),
        [1_700_000_000_000_000_000 + k for k in DIGITS],  # times in nanoseconds
        [(1 if k % 2 else -1) * (2**63 - 1 - abs(k)) for k in DIGITS],  # the range of int64
        [f"{10**15 + k}.5" for k in DIGITS],
        [f" +{abs(k)}. " for k in DIGITS],
    ],
    ids=str,
)
def test_numbers_of_any_size_are_standardised(tmp_path, texts):
    exact = [fractions.Fraction(str(text).strip().replace(".", ".0") if "+" in str(text) else text) for text in texts]
    split = next(ShuffleSplit(1, test_size=0.2, random_state=0).split(np.empty(len(texts))))
    train, test = (np.sort(part) for part in split)
    mean = sum(exact[i] for i in train) / len(train)
    squares = sum((exact[i] - mean) ** 2 for i in train) / len(train)
    for got, part in zip(rows(table(tmp_path, column(texts))), (train, test), strict=True):
        want = [float((exact[i] - mean) ** 2 / squares) ** 0.5 * (1 if exact[i] > mean else -1) for i in part]
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_what_is_constant_in_training_is_zero(tmp_path):
    for texts in (["0.1"] * 40, ["0.1", ""] * 20, ["true"] * 40):
        assert not np.concatenate(rows(table(tmp_path, column(texts)))).any()
    zero = [not np.concatenate(rows(table(tmp_path, column([5] * 39 + [7]), seed=seed))).any() for seed in range(6)]
    assert 0 < sum(zero) < 6, "where the last row is held out, which the split decides"


def test_a_test_row_that_float32_cannot_tell_is_refused(tmp_path):
    """And one that is far in training only makes the others small."""
    told = []
    for seed in range(6):
        try:
            table(tmp_path, column([*[1, 2] * 20, "1e300"]), seed=seed)
        except ValueError as error:
            told.append(str(error))
    assert 0 < len(told) < 6
    assert all("column 'x'" in text and "in row 41, further from the training rows" in text for text in told)


@pytest.mark.parametrize("labels", [["1", "1.0", "nan"], ["true", "True"], ["007", "7"], ["0x10", "16"], ["NA", " "]])
def test_naming_the_target_changes_nothing(tmp_path, labels):
    content = column(range(30), labels)
    unnamed, named = table(tmp_path, content), table(tmp_path, content, target="y")
    assert unnamed.classes == named.classes == len(labels)
    np.testing.assert_array_equal(unnamed.train.arrays["label"], named.train.arrays["label"])


GOOD = column(range(12))
FORMS = {
    "gzip": gzip.compress(GOOD, mtime=0),
    "bzip2": bz2.compress(GOOD),
    "zstd": pa.compress(GOOD, "zstd", asbytes=True),
    "lz4": pa.compress(GOOD, "lz4", asbytes=True),
    "byte-order mark": "\ufeff".encode() + GOOD,
    "crlf": GOOD.replace(b"\n", b"\r\n"),
    "empty lines first": b"\n\r\n" + GOOD,
    "no last end": GOOD[:-1],
}


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t"])
def test_the_content_decides_how_a_file_is_read(tmp_path, name):
    want = rows(table(tmp_path, GOOD))
    for content in (GOOD, *FORMS.values()):
        for part, expected in zip(rows(table(tmp_path, content, name)), want, strict=True):
            np.testing.assert_array_equal(part, expected)


def test_long_fields_and_quotes_within_are_read(tmp_path):
    limit = csv.field_size_limit()
    for text in ("q" * 2_000_000, '"' + "q" * 200_000 + '"', '"two\nlines, ""quoted"""', '5" pipe'):
        content = "z,x,y\n" + "".join(f"{text},{i},{'ab'[i % 2]}\n" for i in range(6))
        assert table(tmp_path, content.encode(), ignore="z").columns == ("x",)
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (column(["1_000", 1] * 6), "column 'x' of .* is not numeric, it has '1_000' in row 1"),
        (column([1, "0x10", "0.5"] * 4), "not numeric, it has '0x10' in row 2"),
        (column([2, "", "true"] * 4), "not numeric, it has 'true' in row 3"),
        (column([1, '"1,5"'] * 6), "not numeric, it has '1,5' in row 2"),
        (column([1, "١"] * 6), "not numeric, it has '١' in row 2"),
        (column(["2020-01-01T00:00:00.123456789"] * 6), "not numeric, it has '2020-01-01 00:00:00.123456789' in row 1"),
        (column([1, "1e400"] * 6), "column 'x' of .* is infinite in row 2"),
        (column([1, "9" * 400] * 6), "infinite in row 2"),
        (column(['"1', *range(9)]), "unexpected end of data, in what begins in line 2; is a quote not closed"),
        (GOOD + b'9,"a\n8,b\n', "in what begins in line 14; is a quote not closed"),
        (b'x,y\n1,a\n3,"a\n4,"b\n5,b\n', "in what begins in line 3; is a quote not closed"),
        (b'x,"y\n1,a\n', "in what begins in line 1; is a quote not closed"),
        ("größe,y\n1,a\n".encode("latin-1"), r"not UTF-8 text: line 1, column 1 \('gr.*e'\), has the byte 0xf6; save"),
        ("x,y\n1,a\n2,ä\n".encode("latin-1"), r"not UTF-8 text: line 3, column 2 \('y'\), has the byte 0xe4"),
        ("x,y\n1,a\n".encode("utf-16"), "not UTF-8 text: line 1, column 1 .* has the byte 0xff"),
        (b"x,y\n1,a\n1,a\0\n", r"line 3, column 2 \('y'\), has the byte 0x00, a zero byte"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cannot be read as a CSV file: Truncated"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (b"", "is empty"),
        (b"\r\n\n", "is empty"),
        (b"x,y", "has a header but no rows"),
        (b"x,x,y\n1,2,a\n", "two columns 'x'"),
        (b"x,y,\n1,a,\n2,b,\n", "row 1 of .* has no label in the column ''"),
        (b"x,y\n1,a,2\n", "Expected 2 columns, got 3"),
        (b"x;y\n1;a\n2;b\n", "no column besides the target 'x;y'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        table(tmp_path, content)
    assert f"{tmp_path}/t.csv" in str(error.value)


def test_the_last_column_is_not_left_out_by_accident(tmp_path):
    with pytest.raises(ValueError, match="the column 'y' is the target"):
        table(tmp_path, GOOD, ignore="y")
