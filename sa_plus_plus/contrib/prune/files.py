"""The directory of the pruned network: it appears when it is complete; until then work is kept beside it."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sa_plus_plus.contrib.transformers.directories import WEIGHTS, json_of
from sa_plus_plus.files import write_atomically

REPORT = "pruning"  # the folder of all that is new in the output
_OTHER_FORMATS = {  # ends of files of weights in other formats
    *(".bin", ".ckpt", ".gguf", ".h5", ".mlmodel", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pt", ".pth", ".tflite"),
    ".safetensors",
}
_RUN, _LOCK, _FILES = "run.json", "lock", "files"
_FORMAT = 1


def check_output(folder: pathlib.Path, output: pathlib.Path) -> None:
    """Refuse an output that would overwrite something.

    Args:
      folder: the directory of the dense network.
      output: the directory to be made.

    Raises:
      ValueError: if it is the network's own directory, or within it.
      FileExistsError: if there is something already.
    """
    own, new = folder.resolve(), output.resolve()
    if own == new or own in new.parents:
        raise ValueError(f"--output={output} is the directory of the dense network or in it: give another")
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"--output={output} is already there: give another, or delete it")


def unfinished(output: pathlib.Path) -> pathlib.Path:
    """The directory in which work is kept until it is done.

    Args:
      output: the directory to be made.
    """
    return output.absolute().with_name(f"{output.absolute().name}.unfinished")


@contextlib.contextmanager
def working(output: pathlib.Path, run: Mapping[str, Any]) -> Iterator[bool]:
    """The directory for unfinished work, for this process alone: whether there is work to go on with.

    Args:
      output: the directory to be made.
      run: what decides the result, for JSON.

    Raises:
      ValueError: if there is unfinished work of another version or with other options, or another process works on it.
      OSError: if the directory cannot be made.
    """
    work = unfinished(output)
    remedy = f"delete {work}, or give another --output"
    if work.exists() and not (work / _RUN).exists() and {file.name for file in work.iterdir()} - {_LOCK}:
        raise FileExistsError(f"{work}, where work is kept until it is done, is already there: {remedy}")
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is at work in {work}: wait for it, or give another --output") from error
        yield _goes_on(work / _RUN, {"format": _FORMAT, **run}, remedy)


def _goes_on(file: pathlib.Path, run: dict[str, Any], remedy: str) -> bool:
    """Whether there is a record of the same run; without any it is made."""
    if file.exists():
        found = json_of(file)
        if found.get("format") != _FORMAT:
            raise ValueError(f"{file} is of another version of this command: {remedy}")
        if differing := [key for key in {**run, **found} if run.get(key) != found.get(key)]:
            key = differing[0]
            raise ValueError(
                f"{file.parent} has unfinished work with {key} {found.get(key)!r}, and this is with {run.get(key)!r}: "
                f"{remedy}"
            )
        return True
    write_atomically(file, lambda opened: opened.write(json.dumps(run, indent=2).encode()))
    return False


def copied(folder: pathlib.Path, inner: pathlib.Path, output: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """Copy all files but the weights. Returns the copy, and the files left out: the same weights in other formats.

    Args:
      folder: the directory of the dense network.
      inner: the directory of its weights.
      output: the directory to be made.
    """
    copy, left_out = unfinished(output) / _FILES, list[str]()

    def ignore(name: str, names: Collection[str]) -> set[str]:
        here = pathlib.Path(name)
        weights = {n for n in names if pathlib.Path(n).suffix in _OTHER_FORMATS and (here / n).is_file()}
        left_out.extend(str((here / n).relative_to(folder)) for n in sorted(weights) if here / n != inner / WEIGHTS)
        return weights | ({REPORT, ".git", ".cache"} & {*names} if here == folder else set())

    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=ignore)
    for path, *_ in os.walk(copy):  # a copy of a read-only directory is one too
        os.chmod(path, 0o777 & ~_umask())
    (copy / REPORT).mkdir()
    return copy, left_out


def publish(copy: pathlib.Path, output: pathlib.Path) -> None:
    """Give the complete directory its name, and delete what was kept beside it.

    Args:
      copy: by `copied`.
      output: the directory to be made.
    """
    copy.rename(output.absolute())
    shutil.rmtree(unfinished(output), ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
