"""What the files of a data set hold, to notice when a run goes on that they have changed."""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping

from experiments.utils.files import sha256

_SIZES = 32  # files of a directory whose sizes are looked at


def fingerprint(files: Iterable[pathlib.Path]) -> dict[str, str]:
    """By path, the SHA-256 sum of each file.

    Of a directory, whose files may be too many to be read, it is the sum of their names and of the sizes of some.

    Raises:
      OSError: if one of them cannot be read.
    """
    return {str(path): _of_directory(path) if path.is_dir() else sha256(path) for path in files}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The paths, in order, whose content is not what it was before; they may have other names than before."""
    if [*before.values()] == [*now.values()]:
        return []
    new = [path for path, digest in now.items() if digest not in before.values()]
    gone = [path for path, digest in before.items() if digest not in now.values()]
    return new or gone or [*now]  # the last where they have but changed places


def _of_directory(path: pathlib.Path) -> str:
    names = sorted(os.listdir(path))
    sizes = [(path / name).stat().st_size for name in names[:: max(1, len(names) // _SIZES)] if (path / name).exists()]
    return hashlib.sha256(repr((names, sizes)).encode("utf-8", "surrogateescape")).hexdigest()
