"""Text as bytes: a file, a folder, or the sources of Python's standard library, which every machine has."""

import hashlib
import math
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from experiments.data.sources import Batch, Dataset

_BYTES = 256  # values of a byte
# Left out of the standard library: generated and repetitive files, tests, an editor, packages of others.
_SKIPPED = {"encodings", "pydoc_data", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
_SKIPPED |= {"site-packages", "dist-packages"}
_HEAD = 8192  # bytes of a file that are looked at to see whether it is text


class Windows:
    """Windows of a text: `tokens` `(context,)`, `targets` `(context,)`, the bytes that follow them, and `length`.

    Window i predicts the bytes from `i * context` on, so that all windows together predict every byte once. What comes
    before the first byte is a zero. Only the first `length` targets count: the text may end within the last window.

    Args:
      text: its bytes.
      context: bytes that a window predicts.
      varied: whether windows are moved on at random, by less than `context` and within the text: for training, so that
        each epoch has others.
    """

    in_memory = True

    def __init__(self, text: bytes, context: int, varied: bool = False) -> None:
        self._text, self._context, self.draws = np.frombuffer(b"\0" + text, np.uint8), context, int(varied)

    def __len__(self) -> int:
        return math.ceil((len(self._text) - 1) / self._context)

    def gather(self, rows: np.ndarray, random: np.ndarray | None = None) -> Batch:
        """As `Source.gather`."""
        last, context = len(self._text) - 1, self._context
        starts = rows * context
        if random is not None:
            starts = np.minimum(starts + (random[:, 0] * context).astype(starts.dtype), last - context)
        windows = self._text[np.minimum(starts[:, None] + np.arange(context + 1), last)]
        length = np.minimum(last - starts, context).astype(np.int32)
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:], "length": length}

    def split(self, windows: int) -> tuple["Windows", "Windows"]:
        """The text of the first `windows` windows, varied as this one is, and that of the others, which is not."""
        at = windows * self._context
        parts = self._text[1 : at + 1].tobytes(), self._text[at + 1 :].tobytes()
        return Windows(parts[0], self._context, bool(self.draws)), Windows(parts[1], self._context)


def text_files(path: str, context: int, held_out: float) -> Dataset:
    """Windows of a text file, whose end is held out, or of the text files below a folder, some of which are held out.

    A file is text where its beginning has no zero byte; hidden files are passed over.

    Args:
      path: of the file or the folder.
      context: bytes that a window predicts.
      held_out: share of the bytes, or of the files, that is for testing. Which files that is depends on their paths
        within the folder alone.

    Raises:
      ValueError: if there is no such path, no text there, or less for training or for testing than a window.
    """
    root = pathlib.Path(path).expanduser().absolute()
    if root.is_dir():
        return _by_file(root, list(_below(root, lambda name: not name.startswith("."))), context, held_out)
    if not root.is_file():
        raise ValueError(f"no file or folder {root}: it should be text to train on")
    text = _read(root)
    if not text:
        raise ValueError(f"{root} is not text: it is empty, or has zero bytes")
    stop = round((1 - _checked(held_out)) * len(text))
    return _dataset(root, text[:stop], text[stop:], context, [root])


def standard_library(context: int, held_out: float) -> Dataset:
    """Windows of the sources of the running Python's standard library; otherwise like `text_files` of a folder.

    Versions of Python differ in their sources, so results compare only within one.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = _below(root, lambda name: name not in _SKIPPED and not name.startswith("_sysconfigdata"))  # the machine's
    return _by_file(root, [file for file in files if file.suffix == ".py"], context, held_out)


def _below(root: pathlib.Path, wanted: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """The files below a folder whose name, and those of the folders above it, are wanted."""
    for folder, folders, files in os.walk(root):
        folders[:] = filter(wanted, folders)
        yield from filter(pathlib.Path.is_file, (pathlib.Path(folder, name) for name in filter(wanted, files)))


def _by_file(root: pathlib.Path, files: Sequence[pathlib.Path], context: int, held_out: float) -> Dataset:
    """Training and test text of whole files, in the order of their paths."""
    share = _checked(held_out)
    train, test = list[bytes](), list[bytes]()
    named = sorted((file.relative_to(root).as_posix(), file) for file in files)
    for name, file in named:
        (test if _number(name) < share else train).append(_read(file))
    if not any(train + test):
        what = f"all {len(files)} files in it are empty or have zero bytes" if files else "there are no files in it"
        raise ValueError(f"no text in {root}: {what}")
    return _dataset(root, b"".join(train), b"".join(test), context, [file for _, file in named])


def _dataset(root: pathlib.Path, train: bytes, test: bytes, context: int, files: Sequence[pathlib.Path]) -> Dataset:
    if context < 1:
        raise ValueError(f"context must be at least 1 byte, got {context}")
    for part, text in (("train on", train), ("test on", test)):
        if len(text) < context:
            raise ValueError(
                f"{root} has {len(text)} bytes to {part}, fewer than a window of context={context}: give more text, "
                "a shorter context or another share held_out"
            )
    return Dataset(Windows(train, context, varied=True), Windows(test, context), _BYTES, files=tuple(files))


def _read(file: pathlib.Path) -> bytes:
    """The content of a text file; empty for a file that is not text."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
        return b"" if b"\0" in head else head + opened.read()


def _number(name: str) -> float:
    """A number in [0, 1) drawn from a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48


def _checked(held_out: float) -> float:
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is the share of the text to test on and must be in (0, 1), got {held_out}")
    return held_out
