"""The examples that a network is pruned with: lines of text as tokens, or images."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sa_plus_plus.contrib.prune.networks import gather
from sa_plus_plus.contrib.transformers import images
from sa_plus_plus.contrib.transformers.directories import Published
from sa_plus_plus.contrib.transformers.encoder import Bert
from sa_plus_plus.contrib.transformers.text import TOKENIZER, lines_of, tokenizer_in

Arrays = dict[str, np.ndarray]
LONGEST = 128  # tokens of a sentence or a piece of text, unless another length is asked for
MOST_HELD_OUT = 1000


class Examples(NamedTuple):
    """Examples as arrays of a network's arguments, by name.

    Attributes:
      train: those to learn from.
      held_out: those to measure by: a tenth, at most 1,000.
      said: what became of the text, a sentence.
    """

    train: Arrays
    held_out: Arrays
    said: str


def from_text(published: Published, file: pathlib.Path, length: int = 0) -> Examples:
    """Examples from a text file.

    For BERT each line is one; equal lines count once, and lines of more tokens than the length are cut. For GPT-2 the
    whole text is cut into pieces of the length.

    Args:
      published: the network, whose directory has a tokenizer.
      file: text with a sentence a line, plain or compressed by gzip.
      length: in tokens. 0 for that of the longest line rounded up to a multiple of 8, at most 128 or what the model
        itself cuts to; for GPT-2 128.

    Raises:
      ImportError: without the package `tokenizers`.
      FileNotFoundError: if there is no tokenizer.
      ValueError: if the length is out of range; if the file is no text, or there is too little of it; or if the
        tokenizer is another network's.
    """
    model = published.model
    if length and not 3 <= length <= model.context:
        raise ValueError(
            f"a length of {length} tokens is out of range: the context of the network in {published.folder} is "
            f"{model.context} tokens, and at least 3 are needed"
        )
    inner = published.inner if (published.inner / TOKENIZER).is_file() else published.folder
    tokenizer = tokenizer_in(inner)
    if (size := tokenizer.get_vocab_size()) > model.vocabulary:
        raise ValueError(
            f"{inner / TOKENIZER} has {size:,} different tokens, and the network {model.vocabulary:,}: it is another's"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    lines = lines_of(file)
    if isinstance(model, Bert):
        return _sentences(published, tokenizer, list(dict.fromkeys(lines)), file, length)
    return _pieces(tokenizer, lines, file, length or min(LONGEST, model.context))


def from_images(published: Published, folder: pathlib.Path) -> Examples:
    """Examples from a folder of images, which take height × width × channels bytes of memory each.

    Args:
      published: a ViT.
      folder: of the images, which may be in folders of their own.

    Raises:
      ImportError: without the package `pillow`.
      ValueError: if there are too few, one cannot be read, or it is not known how to prepare them.
    """
    resample = images.preparation(published).resample
    found = images.files_in(folder)
    return _split({"image": images.pixels(found, published.image, resample)}, folder, f"{len(found):,} images")


def _sentences(published: Published, tokenizer: Any, lines: list[str], file: pathlib.Path, length: int) -> Examples:
    ids = [encoding.ids for encoding in tokenizer.encode_batch(lines)]
    if not length:
        most = published.length or LONGEST
        length = min(-(-max(map(len, ids)) // 8) * 8, LONGEST, most, published.model.context)
    tokens = np.zeros((len(ids), length), np.int32)
    for row, found in zip(tokens, ids, strict=True):
        kept = found[:length]
        row[: len(kept)] = kept
        row[len(kept) - 1] = found[-1]  # the end's own token
    arrays = {"tokens": tokens, "real": np.array([min(len(found), length) for found in ids], np.int32)}
    cut = sum(len(found) > length for found in ids)
    said = f"{len(ids):,} different lines, {cut:,} of them cut to {length} tokens, the others shorter"
    return _split(arrays, file, said)


def _pieces(tokenizer: Any, lines: Sequence[str], file: pathlib.Path, length: int) -> Examples:
    encodings = tokenizer.encode_batch([f"{line}\n" for line in lines], add_special_tokens=False)
    tokens = np.array([token for encoding in encodings for token in encoding.ids], np.int32)
    if (count := len(tokens) // length) < 2:
        raise ValueError(
            f"{file} has {len(tokens):,} tokens, and two pieces of {length} are needed, one of them to measure by: "
            "give more text or a smaller length"
        )
    pieces = {"tokens": tokens[: count * length].reshape(count, length)}
    return _split(pieces, file, f"{len(tokens):,} tokens, in {count:,} pieces of {length}")


def _split(arrays: Arrays, file: pathlib.Path, said: str) -> Examples:
    """Hold out a tenth, drawn at random."""
    count = len(next(iter(arrays.values())))
    if count < 2:
        raise ValueError(f"{file} has {count} example, and two are needed, one of them to measure by")
    order = np.random.default_rng(0).permutation(count)
    first = min(max(count // 10, 1), MOST_HELD_OUT)
    return Examples(gather(arrays, order[first:]), gather(arrays, order[:first]), f"{said}; {first:,} are held out")


def calibration(examples: Arrays, count: int, batch: int) -> list[tuple[np.ndarray, ...]]:
    """Batches of typical inputs for pruning without training, none of them with padding.

    Sentences of less than the median length are left out, and longer ones cut to it: padding would count as input.

    Args:
      examples: arrays by name, in the order of the network's arguments.
      count: about how many examples.
      batch: how many in each batch.
    """
    if "real" in examples:
        tokens, real = examples["tokens"], examples["real"]
        length = int(np.median(real))
        rows = np.flatnonzero(real >= length)
        cut = tokens[rows, :length]
        cut[:, -1] = tokens[rows, real[rows] - 1]
        examples = {"tokens": cut, "real": np.full(len(rows), length, np.int32)}
    there = len(next(iter(examples.values())))
    batch = min(batch, there)
    starts = range(0, min(count, there) - batch + 1, batch)
    return [tuple(x[start : start + batch] for x in examples.values()) for start in starts]
