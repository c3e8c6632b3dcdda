"""Checkpoints of safetensors: one file, several in a directory, or what `sapp.save` writes."""

import functools
import json
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.contrib.commands.checkpoint import PLAN, Checkpoint, record, recorded
from sa_plus_plus.files import copied_without_weights, write_atomically, write_directory_atomically
from sa_plus_plus.planning import LeafPlan, Plan, path_string
from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.files import container
from sa_plus_plus.sparse.files.serialization import export, load, save, todense

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OURS = "sa_plus_plus"  # key of the metadata of `sapp.save`


def read_file(path: pathlib.Path) -> Checkpoint:
    """The checkpoint in one file.

    Args:
      path: of the file.

    Raises:
      ValueError: if it is damaged, or holds something else.
    """
    tensors, metadata = _read(path)
    planned = recorded(path, metadata.get(PLAN))
    if _OURS in metadata:
        stored = load(path)
        write = functools.partial(_save, metadata)
        return Checkpoint(path, "file of sapp.save", todense(stored), write, planned or _stored(stored))
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return Checkpoint(path, "safetensors", tensors, functools.partial(_write_one, metadata), planned)


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files in a directory that make up one checkpoint; none if it has no such files.

    Args:
      folder: the directory.

    Raises:
      ValueError: if there are several and nothing says that they belong together, or one of those named is not there.
    """
    if (folder / ONE).exists():
        return [folder / ONE]
    if (folder / INDEX).exists():
        try:
            names = sorted({*json.loads((folder / INDEX).read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / INDEX} has no weight_map of the tensors' files: {error!r}") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{folder} lacks {missing[0]}, one of the {len(names)} files that {INDEX} names")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        listed = ", ".join(file.name for file in found[:3])
        raise ValueError(f"{folder} has {len(found)} safetensors files and no {INDEX}: give one of them ({listed}, …)")
    return found


def read_directory(folder: pathlib.Path, files: Iterable[pathlib.Path]) -> Checkpoint:
    """The checkpoint in a directory.

    Args:
      folder: the directory.
      files: of `files_in`.

    Raises:
      ValueError: if one is damaged, or two have a tensor of the same name.
    """
    tensors: dict[str, np.ndarray] = {}
    about: dict[str, tuple[dict[str, str], list[str]]] = {}
    planned: dict[str, LeafPlan] = {}
    for file in files:
        part, metadata = _read(file)
        if _OURS in metadata:
            raise ValueError(f"{folder} has {file.name} of sapp.save: give that file instead of the directory")
        if twice := part.keys() & tensors.keys():
            raise ValueError(f"{folder}: two files have the tensor {min(twice)!r}")
        tensors |= part
        planned |= recorded(file, metadata.get(PLAN))
        about[str(file.relative_to(folder))] = metadata, [*part]
    return Checkpoint(folder, "safetensors", tensors, functools.partial(_write_all, folder, about), planned)


def _stored(tree: Any) -> dict[str, LeafPlan]:
    """The kernels of which a file has blocks only, as if what it has had been the plan."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, BlockSparse)):
        if isinstance(leaf, BlockSparse):
            path, layout = path_string(keys), leaf.layout
            grid = blk.grid_shape(leaf.shape, layout.block, layout.view)
            sparsity = 1 - layout.density
            found[path] = LeafPlan(path, leaf.shape, layout.block, grid, layout.nse, sparsity, "", layout.view)
    return found


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    safetensors = container.module()
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:  # the latter for dtypes NumPy has not
        raise ValueError(f"{path} is damaged, or has tensors of a type that NumPy has not: {error}") from error


def _content(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], plan: Plan) -> list[Any]:
    own = Plan(tuple(layer for path, layer in plan.pruned.items() if path in tensors))
    texts = {**metadata, PLAN: record(own)}
    content = container.module().numpy.save({k: np.asarray(x, order="C") for k, x in tensors.items()}, metadata=texts)
    head, start = container.in_order(content)
    return [head, memoryview(content)[start:]]


def _write_one(metadata: Mapping[str, str], output: pathlib.Path, params: Any, plan: Plan) -> None:
    content = _content(params, metadata, plan)
    write_atomically(output, lambda file: file.writelines(content))


def _write_all(
    folder: pathlib.Path,
    about: Mapping[str, tuple[Mapping[str, str], list[str]]],
    output: pathlib.Path,
    params: Any,
    plan: Plan,
) -> None:
    def fill(copy: pathlib.Path) -> None:
        for file in copied_without_weights(folder, copy):
            if file.suffix == ".safetensors" and len(file.parts) > 1:  # another module's, in a pipeline of several
                shutil.copyfile(folder / file, copy / file)
        for name, (metadata, tensors) in about.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            _write_one(metadata, copy / name, {tensor: params[tensor] for tensor in tensors}, plan)

    write_directory_atomically(output, fill)


def _save(metadata: Mapping[str, str], output: pathlib.Path, params: Any, plan: Plan) -> None:
    own = {name: text for name, text in metadata.items() if name not in (_OURS, "sha256")}
    save(output, export(params, plan), metadata={**own, PLAN: record(plan)})
