"""Text for a transformer: the lines of a file, and tokens."""

import gzip
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

TOKENIZER = "tokenizer.json"


def lines_of(file: pathlib.Path) -> list[str]:
    """The lines of a text file, plain or compressed by gzip, without the empty ones.

    Args:
      file: its path.

    Raises:
      ValueError: if there is no such file, or it is not UTF-8 text with at least one line.
    """
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as text with a sentence a line: {error}") from error
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if not lines:
        raise ValueError(f"{file} has no lines with text")
    return lines


def tokenizer_in(folder: pathlib.Path) -> Any:
    """The tokenizer of the package `tokenizers` in a directory.

    Args:
      folder: with a file `tokenizer.json`.

    Raises:
      ImportError: without the package `tokenizers`.
      FileNotFoundError: if there is no such file.
      ValueError: if it cannot be read.
    """
    try:
        import tokenizers  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("text needs the package tokenizers: pip install tokenizers") from error
    file = folder / TOKENIZER
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer: there is no file {TOKENIZER}, which "
            "`AutoTokenizer.from_pretrained(directory).save_pretrained(directory)` of transformers writes"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """Texts as tokens, cut to a length and padded to it.

    Args:
      tokenizer: of the package `tokenizers`.
      texts: at least one.
      length: number of tokens, those at both ends included.

    Returns:
      `tokens` `(texts, length)`, uint16 where they fit, else int32; and `real` `(texts,)` int32, how many are not
      padding.

    Raises:
      ValueError: if there is no text, or the length is less than 3: both ends and a token.
    """
    if not texts:
        raise ValueError("there is no text to tokenize")
    if length < 3:
        raise ValueError(f"length must be at least 3 tokens, the first, the last and one between them; got {length}")
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    small = tokenizer.get_vocab_size() <= np.iinfo(np.uint16).max
    tokens = np.zeros((len(ids), length), np.uint16 if small else np.int32)
    for row, found in zip(tokens, ids, strict=True):
        row[: len(found)] = found
    return {"tokens": tokens, "real": np.array(list(map(len, ids)), np.int32)}
