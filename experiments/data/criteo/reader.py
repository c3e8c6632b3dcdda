"""The lines of a file, plain or compressed, in blocks."""

import os
import pathlib
from collections.abc import Iterator
from typing import IO, NamedTuple

import pyarrow as pa

from experiments.data.criteo.columns import CATEGORICAL, FEATURES, NUMERIC
from experiments.utils.files import compression

BLOCK = 16 << 20  # bytes: large enough to be worth a thread's while, small enough to have several at once


class InputError(ValueError):
    """The file is invalid."""


class Layout(NamedTuple):
    """The format of a line.

    Attributes:
      delimiter: between fields.
      names: of the fields, in order.
      header: whether the first line holds the names.
    """

    delimiter: str
    names: tuple[str, ...]
    header: bool


class Block(NamedTuple):
    """Whole lines.

    Attributes:
      first: number of the first, from 0, a header not counted.
      lines: how many.
      content: the lines, each with its `\\n`.
    """

    first: int
    lines: int
    content: bytes


def layout(path: pathlib.Path) -> Layout:
    """The layout inferred from the first line of a file.

    Raises:
      InputError: if the file is empty, damaged, or has a header of other names.
    """
    with _open(path) as file:
        start = _read(file, 1 << 16, path, 0)
    if not start:
        raise InputError(f"{path} is empty; expected lines of a label, 13 numbers and 26 categories")
    line = start.split(b"\n")[0].rstrip(b"\r").decode(errors="replace").removeprefix("\ufeff")
    delimiter = "\t" if "\t" in line else ","
    names = [name.strip().lower() for name in line.split(delimiter)]
    if "label" not in names:
        return Layout("\t", ("label", *FEATURES), False)
    known = {name.lower(): name for name in ("label", "Id", *FEATURES)}
    wanted = {name.lower() for name in ("label", *NUMERIC, *CATEGORICAL)}
    if wrong := sorted(wanted - set(names)) + sorted(set(names) - set(known)):
        raise InputError(f"{path} has a header that is not label,I1..I13,C1..C26 with or without Id: see {wrong[:3]}")
    if len(set(names)) < len(names):
        raise InputError(f"{path} has a header with a name twice: {line}")
    return Layout(delimiter, tuple(known[name] for name in names), True)


def blocks(path: pathlib.Path, header: bool, size: int = BLOCK) -> Iterator[Block]:
    """All lines of a file, except its header.

    Args:
      path: of the file, plain or compressed by gzip or Zstandard, as its content says.
      header: whether to leave out the first line.
      size: bytes to read at a time.

    Yields:
      Blocks of about that size.

    Raises:
      InputError: if the file is damaged, or has lines without end.
    """
    first, rest, skip = 0, b"", header
    with _open(path) as file:
        while chunk := _read(file, size, path, first):
            if skip:
                before, found, chunk = (rest + chunk).partition(b"\n")
                rest, skip = (b"", False) if found else (before, True)
            content, rest = _whole_lines(rest, b"" if skip else chunk)
            if len(rest) > max(size, BLOCK):
                raise InputError(f"{path} has a line of more than {len(rest)} bytes after line {first + header}")
            if content:
                yield Block(first, count := content.count(b"\n"), content)
                first += count
    if rest and not skip:
        yield Block(first, 1, rest + b"\n")


def _whole_lines(rest: bytes, chunk: bytes) -> tuple[bytes, bytes]:
    end = chunk.rfind(b"\n") + 1
    return (rest + chunk[:end], chunk[end:]) if end else (b"", rest + chunk)


def _open(path: pathlib.Path) -> IO[bytes]:
    return pa.input_stream(os.fspath(path), compression=compression(path))


def _read(file: IO[bytes], size: int, path: pathlib.Path, line: int) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise InputError(f"{path} is damaged or incomplete after about line {line}: {error}; fetch it again") from error
