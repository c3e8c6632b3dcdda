"""Conversion of a kernel to the tensors of a file, rounded or exact, and back, with validation."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus import blocks as blk
from sa_plus_plus.sparse.array import BlockSparse, Layout
from sa_plus_plus.sparse.files.container import misfit, shortened
from sa_plus_plus.sparse.int8 import round_to_int8
from sa_plus_plus.views import View, as_view

STORAGE = ("exact", "bfloat16", "int8")
STORABLE = (  # dtypes that come back from a safetensors file as they were
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
)
PARTS = ("blocks", "index", "scales")  # suffixes of a kernel's tensors, after its path and a colon
_DESCRIPTION = {"shape": [int], "block": [int], "kept": int, "dtype": str, "storage": str}


def is_narrowed(dtype: np.dtype) -> bool:
    """Whether JAX would convert this dtype to a narrower one, such as float64 unless `jax_enable_x64` is set."""
    return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True) != dtype


def as_jax(array: np.ndarray) -> Any:
    """The values as a JAX array; unchanged if JAX would narrow them."""
    return array if is_narrowed(array.dtype) else jax.device_put(array)  # jnp.asarray compiles a copy for each shape


def _check_size(shape: tuple[int, ...], block: blk.Block, kept: int, weights: int, view: View | None = None) -> None:
    """Refuse kernels that would take far more memory than their weights: a small file could request any amount.

    Writing and reading use the same limit, so that every saved kernel can be loaded.
    """
    *stack, grid_r, each = blk.full_grid(shape, block, view)
    grid_c = each * math.prod(stack)
    if math.prod(shape) > 2**40 or grid_r * grid_c >= 2**31 or grid_c > 2**24:
        raise ValueError(
            f"its shape {shape} in blocks of {block} is too large: at most 2**40 weights, 2**31 - 1 blocks and "
            "2**24 blocks across can be stored"
        )
    if max(kept, 1) * math.prod(block) > 2**24 + 64 * weights:
        raise ValueError(f"its {kept} blocks of {block} are nearly all padding around {weights} weights: use smaller")


def encode(w: BlockSparse, storage: str, name: str) -> tuple[dict[str, np.ndarray], float]:
    """The tensors that hold a kernel, and the error of rounding.

    Args:
      w: of a dtype in `STORABLE`.
      storage: one of `STORAGE`.
      name: for errors.

    Returns:
      By name in `PARTS`: `index` int32 `(nse,)`, `blocks` without padding, and for int8 `scales` float32 `(nse,)`; and
      the Frobenius norm of the rounding error, relative to the kernel's.

    Raises:
      ValueError: if it is too large for its weights, or `storage` cannot hold these.
    """
    blocks, layout = np.asarray(w.blocks), w.layout
    try:
        _check_size(layout.shape, layout.block, layout.nse, int(layout.real.sum()), layout.view)
    except ValueError as error:
        raise ValueError(f"kernel {name!r} cannot be stored: {error}") from error
    parts = {"index": layout.columns * np.int32(layout.grid[0]) + layout.indices}
    if storage == "exact":
        return parts | {"blocks": blocks[layout.real]}, 0.0
    instead = 'use storage="exact"'
    if not jnp.issubdtype(blocks.dtype, jnp.floating):
        raise ValueError(f"kernel {name!r} is {blocks.dtype}, and {storage} is for floating types: {instead}")
    wide = blocks.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"kernel {name!r} has weights that are not finite, which {storage} cannot hold: {instead}")
    scales = None
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # looked for below
        if storage == "bfloat16":
            rounded = blocks.astype(jnp.bfloat16)
        else:
            rounded, scales = round_to_int8(wide, (1, 2))
            scales = scales.reshape(-1)
            if not scales.all():
                small = np.abs(wide[scales == 0]).max()
                raise ValueError(
                    f"kernel {name!r} has a block of weights up to {small:.0e}, too small for {storage}: {instead}"
                )
            parts |= {"scales": scales}
        back = _widened(rounded, scales, blocks.dtype).astype(np.float64)
    top = np.abs(wide).max(initial=0)
    if not np.isfinite(back).all():
        raise ValueError(f"kernel {name!r} has weights up to {top:.0e}, too large for {storage}: {instead}")
    parts |= {"blocks": rounded[layout.real]}
    # Both relative to the largest weight: squares of the weights themselves may leave the range of float64.
    return parts, float(np.linalg.norm((back - wide) / top) / np.linalg.norm(wide / top)) if top else 0.0


def _widened(blocks: np.ndarray, scales: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Blocks as stored, in the kernel's own dtype."""
    return (blocks if scales is None else blocks * scales[:, None, None]).astype(dtype)


def parts_of(about: Any) -> tuple[str, ...]:
    """Which tensors a kernel has, of those in `PARTS`.

    Args:
      about: its description in a file.

    Raises:
      ValueError: if that is none.
    """
    wanted = _DESCRIPTION | ({"view": [[int]]} if isinstance(about, dict) and "view" in about else {})
    if found := misfit(about, wanted, "description"):
        raise ValueError(f"its {found}")
    if about["storage"] not in STORAGE:
        raise ValueError(f"its storage is {shortened(about['storage'])}; this version reads {', '.join(STORAGE)}")
    return PARTS if about["storage"] == "int8" else PARTS[:2]


def decode(about: Mapping[str, Any], parts: Mapping[str, np.ndarray]) -> BlockSparse:
    """The kernel from the result of `encode`.

    Args:
      about: its description, checked by `parts_of`: its `shape`, `block`, `kept`, `storage` and `dtype`, perhaps its
        `view`.
      parts: the first result of `encode`.

    Raises:
      ValueError: if these do not fit together.
    """
    for part in PARTS[:2]:
        if part not in parts:
            raise ValueError(f"it has no tensor for its {part}")
    blocks, index, scales = parts["blocks"], parts["index"], parts.get("scales")
    shape, block, storage, dtype = tuple(about["shape"]), blk.as_block(about["block"]), about["storage"], about["dtype"]
    if not shape or min(shape) < 1:
        raise ValueError(f"its shape is {shortened(about['shape'])}, not a list of positive integers")
    if dtype not in STORABLE:
        raise ValueError(f"its dtype is {shortened(dtype)}; this version reads {', '.join(STORABLE)}")
    view = None
    if "view" in about:
        if len(about["view"]) != 3:
            raise ValueError(f"its view is {shortened(about['view'])}, not three lists of axes")
        view = as_view(View(*map(tuple, about["view"])), len(shape))
    if index.ndim != 1 or index.dtype != np.int32:
        raise ValueError(f"its index is {index.dtype} of shape {index.shape}, not a list of int32")
    if about["kept"] != index.size:
        raise ValueError(f"its index has {index.size} blocks, where it keeps {shortened(about['kept'])}")
    _check_size(shape, block, index.size, blocks.size, view)  # before anything is allocated for it
    *stack, grid_r, each = blk.full_grid(shape, block, view)
    grid_c = each * math.prod(stack)
    columns, rows = np.divmod(index, grid_r)
    if index.size and not 0 <= index.min() <= index.max() < grid_r * grid_c:
        raise ValueError(f"its index runs from {index.min()} to {index.max()}, beyond a grid of {grid_r}×{grid_c}")
    if (np.diff(index) <= 0).any():
        raise ValueError("its index is not strictly increasing")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=grid_c))])
    layout = Layout(shape, block, rows, indptr, view)
    if blocks.shape != (layout.real.sum(),):
        raise ValueError(f"it has {blocks.size} weights where its {layout.nse} blocks take {layout.real.sum()}")
    if storage == "int8" and (scales is None or scales.shape != (layout.nse,) or scales.dtype != np.float32):
        raise ValueError("it has no scale for each of its blocks")
    if blocks.dtype.name != (dtype if storage == "exact" else storage):
        raise ValueError(f"its blocks are {blocks.dtype}, though it is {dtype} in storage {storage!r}")
    full = np.zeros(layout.real.shape, blocks.dtype)
    full[layout.real] = blocks
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        wide = _widened(full, scales, jnp.dtype(dtype))
        if storage != "exact" and not np.isfinite(wide).all():
            raise ValueError(f"it has weights or scales that are not finite in {dtype}, which {storage} never has")
    return BlockSparse(as_jax(wide), layout)
