"""The directory of the pruned network: it appears when it is complete; until then work is kept beside it."""

import contextlib
import fcntl
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from sa_plus_plus.contrib.transformers.directories import WEIGHTS, json_of
from sa_plus_plus.files import copied_without_weights, write_atomically

REPORT = "pruning"  # the folder of all that is new in the output
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
    copy = unfinished(output) / _FILES
    shutil.rmtree(copy, ignore_errors=True)
    left_out = copied_without_weights(folder, copy, [REPORT])
    (copy / REPORT).mkdir()
    return copy, [str(file) for file in left_out if folder / file != inner / WEIGHTS]


def publish(copy: pathlib.Path, output: pathlib.Path) -> None:
    """Give the complete directory its name, and delete what was kept beside it.

    Args:
      copy: by `copied`.
      output: the directory to be made.
    """
    copy.rename(output.absolute())
    shutil.rmtree(unfinished(output), ignore_errors=True)
