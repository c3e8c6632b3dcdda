"""Pruned networks as small files: a parameter tree stored by its kept blocks in one safetensors file."""

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sa_plus_plus.checks import faults
from sa_plus_plus.planning import LeafPlan, Plan, map_layers, path_string
from sa_plus_plus.sparse.array import BlockSparse
from sa_plus_plus.sparse.files import container
from sa_plus_plus.sparse.files.codec import PARTS, STORABLE, STORAGE, as_jax, decode, encode, is_narrowed, parts_of
from sa_plus_plus.sparse.files.container import ESCAPED, FORMAT, VIEWED

NETWORK = "sa_plus_plus network"  # the "kind" in the tensor "about" of files that `sapp.serve` writes
_NAMED = 3  # number of layers named in a warning


class Saved(NamedTuple):
    """The outcome of `save`.

    Attributes:
      bytes: size of the file.
      dense_bytes: size of the same arrays in full.
      errors: for each block-sparse kernel by its path in the file: the Frobenius norm of the storage error, relative to
        the kernel's.
    """

    bytes: int
    dense_bytes: int
    errors: dict[str, float]


def export(params: Any, plan: Plan) -> Any:
    """The same tree with each pruned kernel as a `BlockSparse` of its nonzero blocks.

    Exact, except that a block of only `-0.0` is not kept and is restored as `0.0`, and that JAX converts a float64
    kernel to float32 unless `jax_enable_x64` is set. Warns if a layer keeps more blocks than planned or is not finite;
    `check_pruned` refuses such a network.

    Args:
      params: the result of `Sparsifier.finalize`, or of the loop around `sparsify`.
      plan: `sp.plan(params)`.

    Raises:
      ValueError: if a layer of the plan is missing from the tree or has another shape.
      TypeError: under `jax.jit`, where weights have no values to look at.
    """
    for fault, sentences in faults(params, plan):
        more = f" (and {len(sentences) - _NAMED} more)" if len(sentences) > _NAMED else ""
        warnings.warn(f"{fault}: {'; '.join(sentences[:_NAMED])}{more}", stacklevel=2)

    def one(layer: LeafPlan | None, leaf: Any) -> Any:
        return leaf if layer is None else BlockSparse.fromdense(leaf, layer.block, view=layer.view)

    return map_layers(one, params, plan.pruned)


def todense(tree: Any) -> Any:
    """The tree with every `BlockSparse` in full: the input of `export`, except for the sign of blocks of `-0.0`.

    Args:
      tree: a pytree, such as `export` and `load` return.
    """
    return jax.tree.map(lambda x: _in_full(x) if _is_sparse(x) else x, tree, is_leaf=_is_sparse)


def save(
    path: str | os.PathLike[str], tree: Any, *, storage: str = "exact", metadata: Mapping[str, str] | None = None
) -> Saved:
    """Write a parameter tree to one safetensors file, atomically. Needs the package `safetensors`.

    A block-sparse kernel becomes two tensors: `<path>:blocks`, the concatenated weights of its kept blocks without
    padding, and `<path>:index`, `grid_column * grid_rows + grid_row` of each. With `int8`, `<path>:scales` has the
    scale of each block. All other leaves are stored as they are. The metadata describes each kernel in JSON and has a
    SHA-256 of each tensor.

    A leaf's path is its keys joined by slashes, with `~` and `/` within a key written `~0` and `~1` as in a JSON
    Pointer (RFC 6901): Haiku's `{"mlp/~/linear_0": {"w": x}}` has the path `mlp~1~0~1linear_0/w` and is restored
    unchanged. Keys that are not text are restored as text.

    Args:
      path: of the file.
      tree: nested dicts (or any pytree) of arrays of the dtypes in `STORABLE`, and `BlockSparse` of such.
      storage: of block-sparse kernels: `"exact"`; `"bfloat16"`, rounded to 8 bits of mantissa; or `"int8"`, rounded to
        a multiple of the block's largest weight over 127.
      metadata: further metadata for the file.

    Raises:
      ValueError: for an unknown storage; two leaves of the same path, or a leaf with the name of a kernel's tensor; a
        dtype that such files cannot hold; or weights that are not finite, or would not be, or whose scale would be
        zero, in `bfloat16` or `int8`.
    """
    if storage not in STORAGE:
        raise ValueError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
    tensors: dict[str, np.ndarray] = {}
    kernels, errors, dense_bytes = {}, {}, 0
    for name, leaf in _named(tree).items():
        if _is_sparse(leaf):
            parts, errors[name] = encode(leaf, storage, name)
            tensors |= {f"{name}:{part}": values for part, values in parts.items()}
            kernels[name] = {
                "shape": leaf.shape,
                "block": leaf.layout.block,
                "kept": leaf.layout.nse,
                "dtype": leaf.dtype.name,
                "storage": storage,
                "relative_error": errors[name],
            }
            if leaf.layout.view:
                kernels[name]["view"] = leaf.layout.view
            dense_bytes += int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        else:
            values = np.asarray(leaf, order="C")
            tensors[name] = values.astype(values.dtype.newbyteorder("="), copy=False)  # as it will be read
            dense_bytes += tensors[name].nbytes
    about = {"format": _format(tensors, kernels), "kernels": kernels}
    size = container.write(path, tensors, about, metadata)
    return Saved(size, dense_bytes, errors)


def _format(tensors: Mapping[str, Any], kernels: Mapping[str, Mapping[str, Any]]) -> str:
    """The oldest format that can hold these."""
    if any("view" in kernel for kernel in kernels.values()):
        return VIEWED
    return ESCAPED if any("~" in name for name in tensors) else FORMAT


def load(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Load a file of `save` as nested dicts by the keys of each path, or with the structure of `like`.

    Block-sparse kernels have the dtype they were saved from. Every tensor's checksum is verified and every index
    checked before anything is returned. Leaves are JAX arrays, except those whose dtype JAX would narrow, such
    as float64 and int64 unless `jax_enable_x64` is set: they, and the blocks of such kernels, stay NumPy arrays.

    Args:
      path: of the file.
      like: a tree with the same paths, for trees that are not nested dicts; its leaves do not matter.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged or not from `save`, naming the tensor; if it is a network's, for
        `sa_plus_plus.sparse.files.serve.load`; or if `like` has other paths.
    """
    tensors, about = container.read(path)
    if kind_of(tensors) == NETWORK:
        raise ValueError(f"{path} holds a specialised network, not parameters: read it by sapp.serve.load")
    leaves: dict[str, Any] = {}
    for name, kernel in about["kernels"].items():
        try:
            parts = {part: tensors.pop(f"{name}:{part}") for part in parts_of(kernel) if f"{name}:{part}" in tensors}
            leaves[name] = decode(kernel, parts)
        except ValueError as error:
            raise ValueError(f"{path}: kernel {name!r} is damaged: {error}") from error
    if twice := sorted(leaves.keys() & tensors.keys()):
        raise ValueError(f"{path} is damaged: {twice[0]!r} is both a kernel and a tensor")
    leaves |= {name: as_jax(tensor) for name, tensor in tensors.items()}
    if about["format"] == FORMAT:  # its names are not escaped, so a tilde is literal
        leaves = {name.replace("~", "~0"): leaf for name, leaf in leaves.items()}
    if like is None:
        try:
            return _nested(leaves)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    paths = [_name(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(like, is_leaf=_is_sparse)]
    if set(paths) != set(leaves):
        different = sorted(set(paths) ^ set(leaves))
        raise ValueError(f"{path} and the tree to load it into differ in {', '.join(different)}")
    structure = jax.tree.structure(like, is_leaf=_is_sparse)
    return jax.tree.unflatten(structure, [leaves[name] for name in paths])


def kind_of(tensors: Mapping[str, np.ndarray]) -> Any:
    """What a file of `sapp.serve` calls itself; None for other files.

    Args:
      tensors: the file's.
    """
    about = tensors.get("about", np.zeros(0))
    try:
        return json.loads(about.tobytes())["kind"] if about.dtype == np.uint8 else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _is_sparse(x: Any) -> bool:
    return isinstance(x, BlockSparse)


def _name(path: tuple[Any, ...]) -> str:
    """A leaf's path, its keys escaped."""
    return path_string(tuple(map(_escaped, path)))


def _escaped(key: Any) -> Any:
    if not isinstance(key, jax.tree_util.DictKey):
        return key
    return jax.tree_util.DictKey(str(key.key).replace("~", "~0").replace("/", "~1"))


def _unescaped(key: str) -> str:
    return key.replace("~1", "/").replace("~0", "~")


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by path, checked to be storable and to have unique names."""
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_sparse):
        name = _name(keys)
        if name in leaves:
            raise ValueError(f"two leaves have the path {name!r}: rename one of their keys")
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if dtype.name not in STORABLE:
            raise ValueError(f"leaf {name!r} is {dtype}, which cannot be stored: make it one of {', '.join(STORABLE)}")
        leaves[name] = leaf
    reserved = {f"{name}:{part}": name for name, leaf in leaves.items() if _is_sparse(leaf) for part in PARTS}
    reserved["__metadata__"] = "the file's metadata"  # reserved by the safetensors format
    for name in leaves:
        if name in reserved:
            raise ValueError(f"the leaf {name!r} has the name of a tensor kept for {reserved[name]!r}: rename its key")
    return leaves


def _in_full(w: BlockSparse) -> Any:
    """Like `BlockSparse.todense`, in NumPy if JAX would narrow the weights."""
    if not is_narrowed(w.dtype):
        return w.todense()
    tiles: Any = np.zeros((*w.layout.grid, *w.layout.block), w.dtype)
    tiles[w.layout.indices, w.layout.columns] = w.blocks
    return w.layout.kernel(tiles)


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = map(_unescaped, name.split("/"))
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
            if not isinstance(branch, dict):
                raise ValueError(f"something at {name!r} lies below another leaf: load it into a tree, `like`")
        if last in branch:
            raise ValueError(f"something lies below the leaf {name!r}: load it into a tree, `like`")
        branch[last] = leaf
    return tree
