"""Files that are written completely or not at all."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import IO, Any


def write_atomically(path: pathlib.Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write(file)` fill a file that appears under its name only when it is complete."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
