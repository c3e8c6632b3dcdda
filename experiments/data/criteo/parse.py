"""Parsing of lines into labels and keys: 32 bits that represent a value of a feature."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv

from experiments.data.criteo.columns import CATEGORICAL, FEATURES, NUMERIC, Options, bucket
from experiments.data.criteo.reader import Layout

KINDS = ("blank", "encoding", "columns", "label", "number", "category")
_ASCII = bytes(range(128)) + bytes(128)  # by byte: itself, or 0 if it is none of ASCII's
_CATEGORY = re.compile(rb"[0-9a-fA-F]{8}")
_NUMBER = re.compile(rb"-?[0-9]+")


class Malformed(NamedTuple):
    """A line that is skipped.

    Attributes:
      line: its number in what was parsed, from 0.
      kind: one of `KINDS`.
      why: what is wrong with it.
    """

    line: int
    kind: str
    why: str


class Rows(NamedTuple):
    """The valid lines.

    Attributes:
      lines: `(n,)`, their numbers in what was parsed, from 0.
      label: `(n,)`, uint8, 0 or 1.
      keys: `(39, n)`, uint32: the bucket of a number, or the category as a number; 0 where missing.
      missing: `(39, n)`, bool.
      malformed: the other lines, in order.
    """

    lines: np.ndarray
    label: np.ndarray
    keys: np.ndarray
    missing: np.ndarray
    malformed: list[Malformed]


def parse(content: bytes, layout: Layout, options: Options) -> Rows:
    """Labels and keys of the valid lines, and the errors of the others.

    Args:
      content: whole lines, each with its `\\n`.
      layout: of a line.
      options: of the buckets.
    """
    table, torn = _fields(_plain(content), layout)
    lines = np.delete(np.arange(table.num_rows + len(torn)), torn)
    label = _column(table["label"], _labels, _label)
    columns = [_column(table[name], _numbers, _number) for name in NUMERIC]
    columns += [_column(table[name], _categories, _category) for name in CATEGORICAL]
    keys = np.empty((len(FEATURES), table.num_rows), np.uint32)
    for row, column in enumerate(columns):
        numeric = row < len(NUMERIC)
        keys[row] = bucket(column.values, options).view(np.uint32) if numeric else column.values
    missing = np.stack([column.missing for column in columns])
    bad = np.union1d(np.flatnonzero(label.missing), np.concatenate([column.bad for column in (label, *columns)]))
    if not len(bad) and not torn:
        return Rows(lines, label.values, keys, missing, [])
    malformed = _malformed(content, layout, np.union1d(lines[bad], torn).astype(np.int64).tolist())
    good = np.delete(np.arange(table.num_rows), bad)
    return Rows(lines[good], label.values[good], keys[:, good], missing[:, good], malformed)


class _Column(NamedTuple):
    """A field of all lines: which have none, the values, 0 where there is none, and the rows that have a bad one."""

    missing: np.ndarray
    values: np.ndarray
    bad: np.ndarray


def _plain(content: bytes) -> bytes:
    """The lines without what the CSV reader would see more in than other bytes; no field with a zero byte is good."""
    if b"\r" in content:  # it would end a line at each
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\0")
    # It would pass over a byte-order mark, and fail at a line that has a wrong number of fields and is not UTF-8.
    return content if content.isascii() else content.translate(_ASCII)


def _fields(content: bytes, layout: Layout) -> tuple[pa.RecordBatch, list[int]]:
    """The fields as they are, null where empty, and the lines that have too many or too few of them."""
    torn: list[int] = []

    def leave_out(row: pyarrow.csv.InvalidRow) -> str:
        torn.append(row.number - 1)
        return "skip"

    table = pyarrow.csv.read_csv(
        pa.BufferReader(content),
        pyarrow.csv.ReadOptions(use_threads=False, block_size=len(content) + 1, column_names=layout.names),
        pyarrow.csv.ParseOptions(
            delimiter=layout.delimiter, quote_char=False, ignore_empty_lines=False, invalid_row_handler=leave_out
        ),
        pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(layout.names, pa.binary()),
            include_columns=["label", *FEATURES],
            strings_can_be_null=True,
            null_values=[""],
        ),
    )
    columns = {name: table[name].chunk(0) for name in table.column_names}
    return pa.RecordBatch.from_pydict(columns), torn


def _column(
    field: pa.BinaryArray,
    convert: Callable[[pa.BinaryArray, np.ndarray], np.ndarray],
    convert_one: Callable[[bytes], int | None],
) -> _Column:
    """A field by `convert`; where that raises ValueError, value by value."""
    text = np.frombuffer(field.buffers()[2] or b"", np.uint8)
    missing = field.is_null().to_numpy(zero_copy_only=False)
    none = np.empty(0, np.int64)
    try:
        return _Column(missing, convert(field, text), none)
    except ValueError:  # rare: at most a few of many millions of fields are bad
        values = [0 if value is None else convert_one(value) for value in field.to_pylist()]
        bad = [row for row, value in enumerate(values) if value is None]
        kind = np.uint32 if convert is _categories else np.int32 if convert is _numbers else np.uint8
        return _Column(missing, np.array([value or 0 for value in values], kind), np.array(bad, np.int64))


def _labels(field: pa.BinaryArray, text: np.ndarray) -> np.ndarray:
    digits = text[: len(field)] - ord("0")  # uint8: what is below "0" wraps around
    if field.null_count or len(text) != len(field) or digits.max(initial=0) > 1:
        raise ValueError
    return digits


def _numbers(field: pa.BinaryArray, text: np.ndarray) -> np.ndarray:
    if not np.all((text - ord("0") < 10) | (text == ord("-"))):  # the cast takes 0x10 too
        raise ValueError
    return field.view(pa.string()).cast(pa.int32()).fill_null(0).to_numpy()


def _categories(field: pa.BinaryArray, text: np.ndarray) -> np.ndarray:
    offsets = np.frombuffer(field.buffers()[1], np.int32)[: len(field) + 1]
    lengths = np.diff(offsets)
    if np.any((lengths != 0) & (lengths != 8)):
        raise ValueError
    octets = _PAIRS[text[: offsets[-1]].view("<u2")]
    if octets.max(initial=0) > 255:
        raise ValueError
    values = np.zeros(len(field), np.uint32)
    values[lengths != 0] = octets.astype(np.uint8).view(">u4")
    return values


def _label(text: bytes) -> int | None:
    return {b"0": 0, b"1": 1}.get(text)


def _number(text: bytes) -> int | None:
    return int(text) if _NUMBER.fullmatch(text) and -(2**31) <= int(text) < 2**31 else None


def _category(text: bytes) -> int | None:
    return int(text, 16) if _CATEGORY.fullmatch(text) else None


def _pairs() -> np.ndarray:
    """By two characters, the first one low: the byte they stand for, 256 where they stand for none."""
    table = np.full(1 << 16, 256, np.uint16)
    digits = b"0123456789abcdefABCDEF"
    for high in digits:
        for low in digits:
            table[high + 256 * low] = int(bytes([high, low]), 16)
    return table


_PAIRS = _pairs()


def _malformed(content: bytes, layout: Layout, numbers: list[int]) -> list[Malformed]:
    ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))
    found = []
    for number in numbers:
        start = ends[number - 1] + 1 if number else 0
        found.append(Malformed(number, *_complaint(content[start : ends[number]].removesuffix(b"\r"), layout)))
    return found


def _complaint(line: bytes, layout: Layout) -> tuple[str, str]:
    """The kind of a bad line, and what is wrong with it."""
    if not line:
        return "blank", "it is blank"
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return "encoding", f"it is not UTF-8 text: {error.reason} at byte {error.start}"
    fields = line.split(layout.delimiter.encode())
    if len(fields) != len(layout.names):
        return "columns", f"it has {len(fields)} fields instead of {len(layout.names)}"
    for name, text in zip(layout.names, fields, strict=True):
        if name == "label" and _label(text) is None:
            return "label", f"its label is {_quote(text)}, not 0 or 1"
        if name in NUMERIC and text and _number(text) is None:
            return "number", f"{name} is {_quote(text)}, not a whole number of 32 bits"
        if name in CATEGORICAL and text and _category(text) is None:
            return "category", f"{name} is {_quote(text)}, not 8 hexadecimal digits"
    raise AssertionError(f"nothing is wrong with {line!r}")


def _quote(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace"))
