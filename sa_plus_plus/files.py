"""Files and directories that are written completely or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Collection
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


def write_directory_atomically(path: pathlib.Path, fill: Callable[[pathlib.Path], Any]) -> None:
    """Let `fill(folder)` fill an empty directory that gets its name only when it is complete.

    Args:
      path: of the directory, where nothing is.
      fill: called once with the directory under another name.

    Raises:
      FileNotFoundError: if there is no directory to make it in.
      FileExistsError: if there is something.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no directory {path.absolute().parent}")
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} cannot be written: it is already there")
    unfinished = path.absolute().with_name(f".{secrets.token_hex(8)}.unfinished")
    try:
        unfinished.mkdir()
        fill(unfinished)
        unfinished.rename(path.absolute())
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


FORMATS_OF_WEIGHTS = {  # ends of files' names
    *(".bin", ".ckpt", ".gguf", ".h5", ".mlmodel", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pt", ".pth", ".tflite"),
    ".safetensors",
}


def copied_without_weights(folder: pathlib.Path, copy: pathlib.Path, but: Collection[str] = ()) -> list[pathlib.Path]:
    """Copy a directory without its files of weights, in any format; returns what these were, relative to it.

    Args:
      folder: the directory.
      copy: to be made, or an empty directory.
      but: further files and directories in `folder` itself that are left out, and not returned.
    """
    left_out: list[pathlib.Path] = []

    def ignore(name: str, names: Collection[str]) -> set[str]:
        here = pathlib.Path(name)
        weights = {n for n in names if pathlib.Path(n).suffix in FORMATS_OF_WEIGHTS and (here / n).is_file()}
        left_out.extend((here / n).relative_to(folder) for n in sorted(weights))
        return weights | ({*but, ".git", ".cache"} & {*names} if here == folder else set())

    shutil.copytree(folder, copy, ignore=ignore, dirs_exist_ok=True)
    for path, *_ in os.walk(copy):  # a copy of a read-only directory is one too
        os.chmod(path, 0o777 & ~_umask())
    return left_out


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: pathlib.Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
