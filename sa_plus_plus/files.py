"""Files that are written completely or not at all."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Callable
from typing import IO, Any


def write_atomically(path: pathlib.Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write(file)` fill a file that appears under its name only when it is complete and on the disk.

    Its permissions are those of any new file: `rw-rw-rw-` restricted by the umask or the directory's default.

    Args:
      path: of the file; one that is there is replaced.
      write: called once with the open file.

    Raises:
      FileNotFoundError: if there is no such directory.
      IsADirectoryError: if the path is a directory.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no directory {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} cannot be written: it is a directory; give the path of a file")
    # Not made from the file's own name, which may already have the greatest length allowed.
    unfinished = path.with_name(f".{secrets.token_hex(8)}.unfinished")
    try:
        with unfinished.open("xb") as file:  # not by tempfile, whose files only the owner may read
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    # The file is complete; some systems cannot sync a directory, and that is no failure.
    with contextlib.suppress(OSError):
        sync(path.parent)


def sync(path: pathlib.Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
