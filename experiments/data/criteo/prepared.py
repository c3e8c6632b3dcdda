"""Reading of prepared data."""

import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.data.criteo.columns import FEATURES, FIRST, PARTS
from experiments.data.sources import Arrays
from experiments.utils.files import sha256

FORMAT = "criteo-1"
MANIFEST, VALUES = "manifest.json", "values.npy"


class Criteo(NamedTuple):
    """Prepared data.

    Attributes:
      train: the rows to train on: `ids` `(39,)`, int32, each counted within its feature, side by side in the file, so
        that an example is had by one look into memory; `label` uint8, 0 or 1.
      validation: the rows to validate on.
      test: the rows to test on.
      vocabulary: by feature, I1..I13 and C1..C26: the number of its ids. 0 is for values that training lacks or has too
        rarely, 1 for none, and the others are for its values, the most frequent first.
      manifest: all that `manifest.json` says.
    """

    train: Arrays
    validation: Arrays
    test: Arrays
    vocabulary: tuple[int, ...]
    manifest: dict[str, Any]


def criteo(directory: str | os.PathLike, verify: bool = False) -> Criteo:
    """The data written by `python -m experiments.data.criteo prepare`.

    Args:
      directory: its output.
      verify: whether to read all files and compare their checksums too, not their sizes and shapes only.

    Returns:
      The three parts, mapped into memory, and the size of each feature's vocabulary.

    Raises:
      FileNotFoundError: if there is no complete preparation there.
      ValueError: if a file is not as it was written.
    """
    folder = pathlib.Path(directory).expanduser()
    manifest = read_manifest(folder)
    for name, written in manifest["files"].items():
        _check(folder / name, written, verify)
    vocabulary = tuple(manifest["vocabulary"][name] for name in FEATURES)
    _mapped(folder / VALUES, (sum(vocabulary) - FIRST * len(FEATURES),), np.uint32)
    parts: dict[str, Arrays] = {}
    for part in PARTS:
        rows = manifest["rows"][part]
        ids = _mapped(folder / file_of(part, "ids"), (rows, len(FEATURES)), np.int32)
        parts[part] = Arrays({"ids": ids, "label": _mapped(folder / file_of(part, "label"), (rows,), np.uint8)})
    return Criteo(**parts, vocabulary=vocabulary, manifest=manifest)


def file_of(part: str, what: str) -> str:
    """The name of the file with a part's `ids` or `label`."""
    return f"{part}_{what}.npy"


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The content of `manifest.json`.

    Raises:
      FileNotFoundError: if there is none: it is written last.
      ValueError: if it is damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no file {path}: {folder} is no prepared data; prepare them by "
            "`python -m experiments.data.criteo prepare --input FILE --output DIRECTORY`"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; prepare the data again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} is of format {found!r}, not {FORMAT!r}; prepare the data again")
    expected = {VALUES, *(file_of(part, what) for part in PARTS for what in ("ids", "label"))}
    if (
        set(manifest.get("files", ())) != expected
        or set(manifest.get("rows", ())) != set(PARTS)
        or set(manifest.get("vocabulary", ())) != set(FEATURES)
    ):
        raise ValueError(f"{path} is damaged: files, parts or features are missing; prepare the data again")
    return manifest


def _check(path: pathlib.Path, written: dict[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise ValueError(f"no file {path}, though {MANIFEST} lists it; prepare the data again")
    size = path.stat().st_size
    if size != written["bytes"]:
        raise ValueError(f"{path} has {size} bytes instead of {written['bytes']}; prepare the data again")
    if verify:
        found = sha256(path)
        if found != written["sha256"]:
            raise ValueError(f"{path} has checksum {found} instead of {written['sha256']}; prepare the data again")


def _mapped(path: pathlib.Path, shape: tuple[int, ...], kind: type[np.generic]) -> np.ndarray:
    """A file's array, memory-mapped."""
    try:
        array = np.load(path, mmap_mode="r" if shape != (0,) else None, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; prepare the data again") from error
    if array.shape != shape or array.dtype != kind:
        raise ValueError(f"{path} has {array.shape} {array.dtype} instead of {shape} {kind.__name__}; prepare it again")
    return np.asarray(array)  # the class of maps costs time at every use
