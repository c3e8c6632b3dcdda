"""Pruned networks as small files: a parameter tree by its kept blocks, and one safetensors file for all of it."""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.planning import Plan, path_string
from sa_plus_plus.sparse.kernel import BlockSparse, Layout, densify, to_block_sparse

FORMAT = "block-sparse 1"
STORAGE = ("exact", "bfloat16", "int8")
_KEY = "sa_plus_plus"  # of the JSON text in the file's metadata


class Saved(NamedTuple):
    """What `save` has written.

    Attributes:
      bytes: size of the file.
      dense_bytes: of the same arrays in full.
      errors: of each block-sparse kernel by path: the Frobenius norm of what storage changed, relative to the kernel's.
    """

    bytes: int
    dense_bytes: int
    errors: dict[str, float]


def export(params: Any, plan: Plan) -> Any:
    """The same tree with each pruned kernel as a `BlockSparse` of its blocks that are not zero; exact.

    Args:
      params: what `Sparsifier.finalize`, or the loop around `sparsify`, ended with.
      plan: `sp.plan(params)`.

    Raises:
      ValueError: if a layer of the plan is missing from the tree or has another shape.
    """
    layers = plan.pruned
    shapes = {path_string(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, layer in layers.items():
        if shapes.get(path) != layer.shape:
            found = f"has the shape {shapes[path]}" if path in shapes else "is not there"
            raise ValueError(f"the plan has a kernel {path} of shape {layer.shape}, which {found} in this tree")

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        layer = layers.get(path_string(path))
        return leaf if layer is None else to_block_sparse(leaf, layer.block)

    return jax.tree_util.tree_map_with_path(one, params)


def densify_tree(tree: Any) -> Any:
    """The tree with every `BlockSparse` in full: what `export` was given, bit for bit."""
    return jax.tree.map(lambda x: densify(x) if _is_sparse(x) else x, tree, is_leaf=_is_sparse)


def save(
    path: str | os.PathLike[str], tree: Any, *, storage: str = "exact", metadata: Mapping[str, str] | None = None
) -> Saved:
    """Write a parameter tree to one safetensors file, atomically. Needs the package `safetensors`.

    A block-sparse kernel becomes two tensors, `<path>:blocks`, the weights of its kept blocks one after the other
    without padding, and `<path>:index`, `grid_column * grid_rows + grid_row` of each; with `int8`, `<path>:scales` has
    what to multiply each block by. All other leaves are stored as they are. The metadata says in JSON what each kernel
    is and gives a SHA-256 of each tensor.

    Args:
      path: of the file.
      tree: nested dicts (or any pytree) of arrays and `BlockSparse`.
      storage: of block-sparse kernels: `"exact"`; `"bfloat16"`, rounded to 8 bits of mantissa; or `"int8"`, rounded to
        a multiple of the block's largest weight over 127.
      metadata: what else to keep in the file.

    Raises:
      ValueError: for an unknown storage, two leaves of the same path, or weights that are not finite in `int8`.
    """
    if storage not in STORAGE:
        raise ValueError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
    tensors: dict[str, np.ndarray] = {}
    kernels, errors, dense_bytes = {}, {}, 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_sparse):
        name = path_string(keys)
        if name in tensors or name in kernels:
            raise ValueError(f"two leaves have the path {name!r}: rename one of their keys")
        if _is_sparse(leaf):
            parts, errors[name] = _packed(leaf, storage, name)
            tensors |= {f"{name}:{part}": values for part, values in parts.items()}
            kernels[name] = {
                "shape": leaf.shape,
                "block": leaf.layout.block,
                "kept": leaf.layout.kept,
                "dtype": leaf.dtype.name,
                "storage": storage,
                "relative_error": errors[name],
            }
            dense_bytes += int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        else:
            tensors[name] = np.asarray(leaf, order="C")
            dense_bytes += tensors[name].nbytes
    about = {
        "format": FORMAT,
        "kernels": kernels,
        "sha256": {name: _digest(tensor) for name, tensor in tensors.items()},
    }
    text = json.dumps(about)
    texts = {**(metadata or {}), _KEY: text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    content = _safetensors().numpy.save(tensors, metadata=texts)
    write_atomically(pathlib.Path(path), content)
    return Saved(len(content), dense_bytes, errors)


def load(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Read what `save` wrote: nested dicts by the parts of each path, or the structure of `like`.

    Block-sparse kernels come in the dtype they were saved from. Every tensor's checksum is verified and every index
    checked before anything is returned.

    Args:
      path: of the file.
      like: a tree with the same paths, for trees that are not nested dicts; its leaves do not matter.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged or not one of `save`'s, with the name of the tensor; or `like` has other paths.
    """
    tensors, about = _read(pathlib.Path(path))
    leaves: dict[str, Any] = {}
    for name, kernel in about["kernels"].items():
        names = {part: f"{name}:{part}" for part in ("blocks", "index", "scales")}
        parts = {part: tensors.pop(tensor) for part, tensor in names.items() if tensor in tensors}
        try:
            leaves[name] = _unpacked(kernel, parts)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: kernel {name!r} is damaged: {error}") from error
    leaves |= {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    if like is None:
        return _nested(leaves)
    paths = [path_string(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(like, is_leaf=_is_sparse)]
    if set(paths) != set(leaves):
        different = sorted(set(paths) ^ set(leaves))
        raise ValueError(f"{path} and the tree to load it into differ in {', '.join(different)}")
    structure = jax.tree.structure(like, is_leaf=_is_sparse)
    return jax.tree.unflatten(structure, [leaves[name] for name in paths])


def _is_sparse(x: Any) -> bool:
    return isinstance(x, BlockSparse)


def _packed(w: BlockSparse, storage: str, name: str) -> tuple[dict[str, np.ndarray], float]:
    """The tensors that hold a kernel, and what rounding costs."""
    blocks, layout = np.asarray(w.blocks), w.layout
    parts = {"index": layout.columns * np.int32(layout.grid[0]) + layout.rows}
    if storage == "exact":
        return parts | {"blocks": blocks[layout.real]}, 0.0
    wide = blocks.astype(np.float64)
    if storage == "bfloat16":
        rounded = blocks.astype(jnp.bfloat16)
        parts |= {"blocks": rounded[layout.real]}
        back = rounded.astype(np.float64)
    else:
        if not np.isfinite(wide).all():
            raise ValueError(f"kernel {name!r} has weights that are not finite, which int8 cannot hold")
        largest = np.abs(wide).max((1, 2), initial=0)
        scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        rounded = np.rint(wide / scales[:, None, None]).clip(-127, 127).astype(np.int8)
        parts |= {"blocks": rounded[layout.real], "scales": scales}
        back = rounded * scales.astype(np.float64)[:, None, None]
    norm = np.linalg.norm(wide)
    return parts, float(np.linalg.norm(back - wide) / norm) if norm else 0.0


def _unpacked(about: Mapping[str, Any], parts: Mapping[str, np.ndarray]) -> BlockSparse:
    """The kernel that `_packed` took apart; whatever does not fit raises."""
    blocks, index, scales = parts["blocks"], parts["index"], parts.get("scales")
    shape, block = tuple(about["shape"]), blk.as_block(about["block"])
    grid_r, grid_c = blk.grid_shape(shape, block)
    if index.ndim != 1 or index.dtype != np.int32:
        raise ValueError(f"its index is {index.dtype} of shape {index.shape}, not a list of int32")
    columns, rows = np.divmod(index, grid_r)
    if index.size and not 0 <= index.min() <= index.max() < grid_r * grid_c:
        raise ValueError(f"its index runs from {index.min()} to {index.max()}, beyond a grid of {grid_r}×{grid_c}")
    if (np.diff(index) <= 0).any():
        raise ValueError("its index does not rise")
    starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=grid_c))])
    layout = Layout(shape, block, rows, starts)
    if blocks.shape != (layout.real.sum(),):
        raise ValueError(f"it has {blocks.size} weights where its {layout.kept} blocks take {layout.real.sum()}")
    dtype = jnp.dtype(about["dtype"])
    full = np.zeros(layout.real.shape, blocks.dtype)
    full[layout.real] = blocks
    if about["storage"] == "int8":
        if scales is None or scales.shape != (layout.kept,):
            raise ValueError("it has no scale for each of its blocks")
        full = full * scales[:, None, None]
    return BlockSparse(jnp.asarray(full.astype(dtype)), layout)


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All tensors of a file, their checksums verified, and what its metadata says of them."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "numpy") as file:
            texts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or not a safetensors file: {error}") from error
    text = texts.get(_KEY)
    if text is None:
        raise ValueError(f"{path} was not written by sa_plus_plus.save: its metadata has no {_KEY!r}")
    if hashlib.sha256(text.encode()).hexdigest() != texts.get("sha256"):
        raise ValueError(f"{path} is damaged: its metadata does not have the checksum written beside it")
    about = json.loads(text)
    if about["format"] != FORMAT:
        raise ValueError(f"{path} has the format {about['format']!r}; this version reads {FORMAT!r}")
    for name in sorted({*tensors, *about["sha256"]}):
        if name not in tensors or _digest(tensors[name]) != about["sha256"].get(name):
            raise ValueError(f"{path}: tensor {name!r} is damaged: it does not have the checksum in the metadata")
    return tensors, about


def _digest(tensor: np.ndarray) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    head = f"{tensor.dtype.name} {tensor.shape} ".encode()
    return hashlib.sha256(head + tensor.tobytes()).hexdigest()


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = leaf
    return tree


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """The file appears under its name only when it is complete."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _safetensors() -> Any:
    try:
        import safetensors.numpy  # noqa: PLC0415 - optional: only files need it
    except ImportError as error:
        raise ImportError("files of pruned networks need the package safetensors: pip install safetensors") from error
    return safetensors
