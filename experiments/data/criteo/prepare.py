"""Conversion of a click log to ids on disk.

The file is read once. The first pass counts the values of the training part and stages every row as keys; the second
turns these keys into ids.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from experiments.data.criteo.columns import FEATURES, NUMERIC, PARTS, Options, parts
from experiments.data.criteo.parse import KINDS, Rows, parse
from experiments.data.criteo.prepared import FORMAT, MANIFEST, VALUES, file_of, read_manifest
from experiments.data.criteo.reader import BLOCK, Block, InputError, Layout, blocks, layout
from experiments.data.criteo.vocabulary import Count, Vocabulary, encode, tally, vocabulary
from experiments.utils.files import sha256

_EXAMPLES = 5  # line numbers to name of each kind of malformed line
_START, _HOPELESS = 1 << 16, 100  # bytes to examine first, and the number of lines of which one must be valid
_SECONDS = 2.0  # between two reports of progress
_T = TypeVar("_T")
_R = TypeVar("_R")


def prepare(
    source: str | os.PathLike,
    output: str | os.PathLike,
    options: Options | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    block: int = BLOCK,
    progress: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Split the rows of a click log into parts, assign ids to their values, and write both.

    Nothing is to be seen under the name of the output until it is complete. Until then there is a directory beside it,
    which needs as much room again: some 165 bytes a row.

    Args:
      source: the file: lines of label, I1..I13, C1..C26, divided by tabs, or a CSV file with a header; plain, gzip or
        Zstandard.
      output: the directory to make.
      options: every choice; None for the usual ones.
      overwrite: whether to replace what an earlier preparation wrote there.
      threads: to parse and to encode on; by default as many as there are cores. The output does not depend on them.
      block: bytes to parse at a time; nor on this.
      progress: what is called with a sentence every few seconds.

    Returns:
      The manifest, as it is in `manifest.json`.

    Raises:
      FileExistsError: if the output exists, and is not to be replaced, or is no earlier preparation.
      BlockingIOError: if another process is preparing the same output.
      InputError: if the source is damaged, or has more malformed lines than the options allow.
      ValueError: if there are no threads, or blocks of no bytes.
    """
    options, source, output = options or Options(), pathlib.Path(source), pathlib.Path(output).absolute()
    threads = os.cpu_count() or 1 if threads is None else threads
    for name, value in (("threads", threads), ("block", block)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}: the click log should be there")
    said, before = _Progress(progress), source.stat()
    with _unfinished(output, overwrite) as folder:
        with _Workers(threads) as workers:
            digest = workers.start(sha256, source)
            first = _stage(source, folder / _STAGED, options, workers, block, said)
            manifest = _write(folder, first, options, workers, said)
            manifest["source"] = {"name": source.name, "bytes": before.st_size, "sha256": digest.result()}
        after = source.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise InputError(f"{source} changed while it was read; prepare it when it is complete")
        (folder / _STAGED).unlink()
        text = json.dumps(manifest, indent=2) + "\n"
        with open(folder / MANIFEST, "wb") as file:
            file.write(text.encode())
            _sync(file)
    return manifest


_STAGED = "staged"


class _First(NamedTuple):
    """The result of the first pass."""

    rows: list[int]
    clicks: list[int]
    lines: int
    malformed: dict[str, dict[str, Any]]
    words: list[Vocabulary]


class _Workers:
    """Threads that take work in order and return results in order."""

    def __init__(self, threads: int) -> None:
        self._pool, self._ahead = concurrent.futures.ThreadPoolExecutor(threads), threads + 1

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)  # what waits is of no use after an error, and else nothing waits

    def start(self, function: Callable[[_T], _R], item: _T) -> concurrent.futures.Future[_R]:
        return self._pool.submit(function, item)

    def map(self, function: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        """Like `map`, but reads only a few items ahead, so that memory does not depend on their number."""
        waiting: collections.deque[concurrent.futures.Future[_R]] = collections.deque()
        for item in items:
            waiting.append(self.start(function, item))
            if len(waiting) > self._ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Progress:
    """Reports the progress of a pass every few seconds."""

    def __init__(self, say: Callable[[str], Any] | None) -> None:
        self._say, self._next = say, time.monotonic() + _SECONDS

    def each(self, what: str, items: Iterable[_T], rows: Callable[[_T], int]) -> Iterator[_T]:
        """The items, with a progress report after each."""
        started, done = time.monotonic(), 0
        for item in items:
            done += rows(item)
            yield item
            if time.monotonic() > self._next:
                self._tell(what, done, started)
        self._tell(what, done, started)

    def _tell(self, what: str, done: int, started: float) -> None:
        now = time.monotonic()
        self._next = now + _SECONDS
        if self._say is not None:
            self._say(f"{what}: {done:,} rows, {done / max(now - started, 1e-9):,.0f} rows/s")


class _Parsed(NamedTuple):
    """A block after the first pass over it."""

    first: int
    lines: int
    rows: Rows
    part: np.ndarray
    tallies: list[np.ndarray]


def _stage(
    source: pathlib.Path, staged: pathlib.Path, options: Options, workers: _Workers, size: int, said: _Progress
) -> _First:
    """Count the values in the file, and write its rows as keys."""
    form = layout(source)
    _check_start(source, form, options)
    total = None
    if options.order == "chronological":
        total = sum(block.lines for block in blocks(source, form.header, size))
    counts = [Count() for _ in FEATURES]
    rows, clicks, lines = np.zeros(len(PARTS), np.int64), np.zeros(len(PARTS), np.int64), 0
    malformed = {kind: {"lines": 0, "first": []} for kind in KINDS}
    parsed = workers.map(lambda block: _parse(block, form, total, options), blocks(source, form.header, size))
    with open(staged, "wb") as file:
        for block in said.each("reading", parsed, lambda block: len(block.part)):
            lines += block.lines
            _note(malformed, block, source, form, options)
            rows += np.bincount(block.part, minlength=len(PARTS))
            clicks += np.bincount(block.part[block.rows.label == 1], minlength=len(PARTS))
            for count, new in zip(counts, block.tallies, strict=True):
                count.add(new)
            for array in (block.part, block.rows.label, block.rows.keys, np.packbits(block.rows.missing, axis=1)):
                np.lib.format.write_array(file, array, allow_pickle=False)
    if lines - rows.sum() > options.max_malformed * lines or not rows.any():
        raise InputError(_refusal(source, malformed, lines))
    for part, n in zip(PARTS, rows, strict=True):
        if not n:
            raise InputError(f"{source} has {rows.sum()} good lines, too few: none of them is for {part}")
    least = [options.numeric_minimum_count if name in NUMERIC else options.minimum_count for name in FEATURES]
    words = [vocabulary(count.total(), n) for count, n in zip(counts, least, strict=True)]
    return _First(rows.tolist(), clicks.tolist(), lines, malformed, words)


def _check_start(source: pathlib.Path, form: Layout, options: Options) -> None:
    """Refuse a wrong kind of file at the start, not after reading all of it."""
    for block in itertools.islice(blocks(source, form.header, _START), 1):
        rows = parse(block.content, form, options)
        if block.lines >= _HOPELESS and not len(rows.lines):
            why = rows.malformed[0].why
            raise InputError(f"{source} is no click log: its first {block.lines} lines are malformed, the first: {why}")


def _parse(block: Block, form: Layout, total: int | None, options: Options) -> _Parsed:
    rows = parse(block.content, form, options)
    part = parts(block.first, block.lines, total, options)[rows.lines]
    train = part == 0
    tallies = [tally(keys[train & ~missing]) for keys, missing in zip(rows.keys, rows.missing, strict=True)]
    return _Parsed(block.first, block.lines, rows, part, tallies)


def _note(
    malformed: dict[str, dict[str, Any]], block: _Parsed, source: pathlib.Path, form: Layout, options: Options
) -> None:
    """Count the malformed lines of a block; with `strict`, refuse the first."""
    for bad in block.rows.malformed:
        number = 1 + form.header + block.first + bad.line
        if options.strict:
            raise InputError(f"{source}, line {number}: {bad.why}")
        entry = malformed[bad.kind]
        entry["lines"] += 1
        if len(entry["first"]) < _EXAMPLES:
            entry["first"].append(number)


def _refusal(source: pathlib.Path, malformed: dict[str, dict[str, Any]], lines: int) -> str:
    if not lines:
        return f"{source} has a header and no lines"
    kinds = [
        f"{entry['lines']} by {kind} (line {', '.join(map(str, entry['first']))})"
        for kind, entry in malformed.items()
        if entry["lines"]
    ]
    count = sum(entry["lines"] for entry in malformed.values())
    return (
        f"{source} has {count} malformed lines among its first {lines}, more than are allowed: {'; '.join(kinds)}; "
        "see these lines, or allow a larger share by max_malformed"
    )


def _write(folder: pathlib.Path, first: _First, options: Options, workers: _Workers, said: _Progress) -> dict[str, Any]:
    """Write what the staged rows become, and describe it."""
    with contextlib.ExitStack() as stack:
        outputs = [
            [
                stack.enter_context(_Output(folder / file_of(part, "ids"), (rows, len(FEATURES)), np.int32)),
                stack.enter_context(_Output(folder / file_of(part, "label"), (rows,), np.uint8)),
            ]
            for part, rows in zip(PARTS, first.rows, strict=True)
        ]
        values = np.concatenate([words.keys for words in first.words])
        listed = stack.enter_context(_Output(folder / VALUES, values.shape, np.uint32))
        listed.add(values)
        staged = stack.enter_context(open(folder / _STAGED, "rb"))
        encoded = workers.map(lambda block: _encode(block, first.words), _staged(staged))
        for block in said.each("writing", encoded, lambda block: sum(len(label) for _, label in block)):
            for (ids_file, label_file), (ids, label) in zip(outputs, block, strict=True):
                ids_file.add(ids)
                label_file.add(label)
        files = {output.name: output.close() for output in [*(file for files in outputs for file in files), listed]}
    return {
        "format": FORMAT,
        "rows": dict(zip(PARTS, first.rows, strict=True)),
        "clicks": dict(zip(PARTS, first.clicks, strict=True)),
        "lines": first.lines,
        "malformed": first.malformed,
        "vocabulary": {name: words.size for name, words in zip(FEATURES, first.words, strict=True)},
        "files": files,
        "options": dataclasses.asdict(options),
    }


def _staged(file: IO[bytes]) -> Iterator[list[np.ndarray]]:
    end = os.fstat(file.fileno()).st_size
    while file.tell() < end:
        yield [np.lib.format.read_array(file, allow_pickle=False) for _ in range(4)]


def _encode(block: list[np.ndarray], words: list[Vocabulary]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids and labels of a block, by part."""
    part, label, keys, packed = block
    ids = np.empty(keys.shape, np.int32)
    for j, known in enumerate(words):
        ids[j] = encode(known, keys[j], np.unpackbits(packed[j], count=len(part)).view(bool))
    ids = np.ascontiguousarray(ids.T)
    chosen = [np.flatnonzero(part == p) for p in range(len(PARTS))]
    return [(ids[rows], label[rows]) for rows in chosen]


class _Output:
    """An array written from its beginning to its end, as .npy."""

    def __init__(self, path: pathlib.Path, shape: tuple[int, ...], kind: type[np.generic]) -> None:
        self.name, self._shape, self._size = path.name, shape, 0
        self._file, self._sha = open(path, "wb"), hashlib.sha256()  # noqa: SIM115 -- closed by __exit__
        header = io.BytesIO()
        about = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, about)
        self._put(header.getbuffer())

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def add(self, values: np.ndarray) -> None:
        if values.size:
            self._put(np.ascontiguousarray(values).data.cast("B"))

    def close(self) -> dict[str, Any]:
        """Size and checksum, for the manifest."""
        _sync(self._file)
        self._file.close()
        return {"bytes": self._size, "sha256": self._sha.hexdigest()}

    def _put(self, content: memoryview) -> None:
        self._file.write(content)
        self._sha.update(content)
        self._size += len(content)


@contextlib.contextmanager
def _unfinished(output: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """A new directory that becomes the output on success, and is deleted otherwise.

    One that a killed process left is cleared. The lock ends with the process that holds it.
    """
    partial, old = (output.parent / f".{output.name}.{what}" for what in ("partial", "old"))
    if old.exists() and not output.exists():
        os.rename(old, output)  # killed between the two renames below
    _check_replaceable(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino != os.stat(partial).st_ino:
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):
            raise BlockingIOError(f"another process is preparing {output}; wait for it, or end it") from None
        try:
            for file in partial.iterdir():
                file.unlink()
            yield partial
            _check_replaceable(output, overwrite)
            if output.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(output, old)
            os.rename(partial, output)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _check_replaceable(output: pathlib.Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists already; choose another output, or ask to overwrite it")
    try:
        read_manifest(output)
    except (OSError, ValueError) as error:
        raise FileExistsError(f"{output} is no earlier preparation, so it is not overwritten: {error}") from error


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
