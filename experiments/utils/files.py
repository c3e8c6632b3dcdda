"""Result files, and checksums of files."""

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from sa_plus_plus.files import write_atomically

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}


def sha256(path: pathlib.Path) -> str:
    """A file's checksum, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compression(path: pathlib.Path) -> str | None:
    """How a file is compressed by its first bytes, in Arrow's terms; None if it is not. Its name may say otherwise."""
    with path.open("rb") as file:
        start = file.read(4)
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write JSON; NaN and infinities, which JSON lacks, as null."""
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(x: Any) -> Any:
    """The same tree with None for every NaN and infinity."""
    if isinstance(x, Mapping):
        return {k: finite(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [finite(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
