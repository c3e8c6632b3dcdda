"""Files of tensors: safetensors with a description in JSON and a checksum of everything, the same bytes each time."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sa_plus_plus.files import write_atomically

FORMAT = "block-sparse 1"
ESCAPED = "block-sparse 2"  # with escaped keys; written only if a key has `~` or `/`
VIEWED = "block-sparse 3"  # with escaped keys and views of kernels; written only if a kernel has a view
_KEY = "sa_plus_plus"  # key of the JSON text in the file's metadata


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write the tensors to one file, atomically. Returns its size.

    Args:
      path: of the file.
      tensors: by name.
      about: their metadata, for JSON; a `sha256` of each tensor is added.
      metadata: further metadata for the file.
    """
    checksums = {name: digest(tensor) for name, tensor in tensors.items()}
    text = json.dumps({**about, "sha256": checksums}, sort_keys=True)
    texts = {**(metadata or {}), _KEY: text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    content = module().numpy.save(dict(tensors), metadata=texts)
    head, start = in_order(content)
    write_atomically(pathlib.Path(path), lambda file: (file.write(head), file.write(memoryview(content)[start:])))
    return len(head) + len(content) - start


def in_order(content: bytes) -> tuple[bytes, int]:
    """A file's head with its metadata sorted, which the library writes in random order; and where the old one ends.

    Args:
      content: of a safetensors file with metadata.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text, end


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All tensors of a file, with verified checksums, and what `write` was told about them.

    Args:
      path: of the file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, not from `write`, or of a newer format.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is a directory or device, not a file: give the path of one that save has written")
    safetensors = module()
    try:
        with safetensors.safe_open(path, "numpy") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:  # the latter for dtypes NumPy has not
        raise ValueError(f"{path} is damaged, or not a safetensors file of NumPy's dtypes: {error}") from error
    text = texts.get(_KEY)
    if text is None:
        raise ValueError(f"{path} was not written by sa_plus_plus.save: its metadata has no {_KEY!r}")
    if hashlib.sha256(text.encode()).hexdigest() != texts.get("sha256"):
        raise ValueError(f"{path} is damaged: its metadata does not have the checksum written beside it")
    about = _described(path, text)
    for name in sorted({*tensors, *about["sha256"]}):
        if name not in tensors or digest(tensors[name]) != about["sha256"].get(name):
            raise ValueError(f"{path}: tensor {name!r} is damaged: it does not have the checksum in the metadata")
    return tensors, about


def _described(path: pathlib.Path, text: str) -> dict[str, Any]:
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: the {_KEY!r} of its metadata is not JSON: {error}") from error
    if not isinstance(about, dict) or "format" not in about:
        raise ValueError(f"{path} is damaged: the {_KEY!r} of its metadata names no format")
    if about["format"] not in (FORMAT, ESCAPED, VIEWED):
        known = ", ".join(map(repr, (FORMAT, ESCAPED, VIEWED)))
        raise ValueError(f"{path} has the format {shortened(about['format'])}; this version reads {known}")
    for part in ("kernels", "sha256"):
        if not isinstance(about.get(part), dict):
            raise ValueError(f"{path} is damaged: the {_KEY!r} of its metadata has no mapping {part!r}")
    return about


def misfit(value: Any, wanted: Any, name: str) -> str | None:
    """What of a value from JSON is not as wanted, as a sentence; None if all of it is.

    >>> misfit({"shape": [3, "4"]}, {"shape": [int]}, "kernel")
    "kernel.shape[1] is '4', not of type int"

    Args:
      value: to be examined.
      wanted: a type; a list with the type of a list's items; or a dict with the type of each key's value.
      name: of the value, for the sentence.
    """
    kind: Any = wanted if isinstance(wanted, type) else type(wanted)
    if type(value) is not kind:  # a bool is no int
        return f"{name} is {shortened(value)}, not of type {kind.__name__}"
    if isinstance(wanted, list):
        parts = [(item, wanted[0], f"{name}[{number}]") for number, item in enumerate(value)]
    elif isinstance(wanted, dict):
        if missing := [key for key in wanted if key not in value]:
            return f"{name} has no {missing[0]!r}"
        parts = [(value[key], each, f"{name}.{key}") for key, each in wanted.items()]
    else:
        return None
    return next((found for part in parts if (found := misfit(*part))), None)


def shortened(value: Any, length: int = 80) -> str:
    """The value's `repr`, cut: values from files may be of any size."""
    try:
        text = repr(value)
    except (RecursionError, ValueError) as error:  # ValueError: an integer of very many digits
        return f"a {type(value).__name__} that cannot be shown ({error})"
    return text if len(text) <= length else f"{text[:length]}…"


def digest(tensor: np.ndarray) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    head = f"{tensor.dtype.name} {tensor.shape} ".encode()
    return hashlib.sha256(head + tensor.tobytes()).hexdigest()


def module() -> Any:
    """The package safetensors.

    Raises:
      ImportError: without it.
    """
    try:
        import safetensors.numpy  # noqa: PLC0415 - optional: only files need it
    except ImportError as error:
        raise ImportError("files of tensors need the package safetensors: pip install safetensors") from error
    return safetensors
