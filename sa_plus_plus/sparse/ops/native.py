"""Block-sparse matmul by the compiled CPU kernel in `csrc`, if it was built."""

import ctypes
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.sparse.array import Layout
from sa_plus_plus.sparse.ops.activation import Activation
from sa_plus_plus.sparse.ops.inference import inference

# In the order in which the compiled kernel numbers them in a sequence.
CONV, NARROW_CONV, DEPTHWISE, ATTENTION, LAYER_NORM, MAX_POOL, SUM_POOL, ROUND, LOOK_UP = KINDS = (
    "sa_plus_plus_block_sparse_conv",
    "sa_plus_plus_narrow_block_sparse_conv",
    "sa_plus_plus_depthwise_conv",
    "sa_plus_plus_attention",
    "sa_plus_plus_layer_norm",
    "sa_plus_plus_max_pool",
    "sa_plus_plus_sum_pool",
    "sa_plus_plus_round_images",
    "sa_plus_plus_look_up",
)
SEQUENCE = "sa_plus_plus_sequence"
CALL_TARGETS = (*KINDS, SEQUENCE)
DTYPES = (np.dtype(np.float32), np.dtype(jnp.bfloat16))
_X_DTYPES = (*DTYPES, np.dtype(np.uint8))  # in the order in which the compiled kernel numbers them
LIMIT = "SAPP_TARGET"  # in the environment: see `limit_targets`
ACTIVATIONS = get_args(Activation)  # in the order in which the compiled kernel numbers them
_UNDERIVED = (
    "the compiled kernel, which is for inference: differentiate the function that `specialize` was given, or a product "
    "by `block_sparse_matmul`, which has first derivatives"
)
NARROW = 64  # the largest magnitude in int8 blocks of 7 bits
WIDE = 16  # columns of a block in bfloat16 and int8: a multiple of this many


@functools.cache
def unavailable_reason() -> str | None:
    """Why there is no compiled kernel, or None if there is one; it is loaded at the first call."""
    built = _built()
    if not built:
        return "it was not compiled when the package was installed, which takes a C++17 compiler"
    try:
        library = ctypes.CDLL(str(built[-1]))
        made_for, here = library.sa_plus_plus_ffi_version(), _ffi_version()
        handlers = {target: getattr(library, target) for target in CALL_TARGETS}
    except (OSError, AttributeError, TypeError) as error:
        return f"{built[-1].name} cannot be loaded: {error}"
    # With a kernel built for another interface, XLA's whole CPU backend would fail to start.
    if made_for > here or made_for // 1000 != here // 1000:
        return f"{built[-1].name} was compiled for version {made_for} of XLA's interface, this jaxlib has {here}"
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    if limit := os.environ.get(LIMIT):
        _limit(library, limit, f"{LIMIT}={limit}: ")
    return None


class Target(NamedTuple):
    """A set of instructions that the kernel is compiled for: a row of `csrc/targets.def`.

    Attributes:
      name: of the target.
      extends: the target whose instructions it adds to.
      supported: whether this processor has them.
      dtypes: of `x` in products.
      start: a block costs its rows and as many more as are this many bytes of `x`, at least one.
      limit: int8 blocks are fastest if no entry is larger: 64 where products are summed in 16 bits, otherwise 127.
      columns: width of the blocks that are multiplied the fastest, at least `WIDE`.
    """

    name: str
    extends: str
    supported: bool
    dtypes: tuple[np.dtype, ...]
    start: int
    limit: int
    columns: int

    def cost(self, rows: int, itemsize: int) -> int:
        """How long a block takes, in rows.

        Args:
          rows: of the block.
          itemsize: bytes of an entry of `x`.
        """
        return rows + max(1, self.start // itemsize)


@functools.cache
def targets() -> tuple[Target, ...]:
    """The table of targets, the best first."""
    return _table(_library())


def _table(library: ctypes.CDLL) -> tuple[Target, ...]:
    library.sa_plus_plus_targets.restype = ctypes.c_char_p
    rows = json.loads(library.sa_plus_plus_targets())
    dtypes = [tuple(_X_DTYPES[code] for code in row["types"]) for row in rows]
    return tuple(
        Target(
            row["name"],
            row["extends"],
            bool(row["supported"]),
            types,
            row["start"],
            row["limit"],
            max(WIDE, row["columns"]),
        )
        for row, types in zip(rows, dtypes, strict=True)
    )


def target(dtype: Any) -> Target:
    """The target that products run in.

    Args:
      dtype: of `x`: float32, bfloat16 or uint8.

    Raises:
      RuntimeError: if there is no compiled kernel.
      ValueError: for another type.
    """
    if np.dtype(dtype) not in _X_DTYPES:
        raise ValueError(f"products are of x in float32, bfloat16 or uint8, not {np.dtype(dtype)}")
    return targets()[_library().sa_plus_plus_target(_X_DTYPES.index(np.dtype(dtype)))]


def limit_targets(name: str | None) -> None:
    """Use no other targets from now on than one and those that it extends.

    Args:
      name: of the target, or None for no limit. The environment variable `SAPP_TARGET` is the limit at first.

    Raises:
      RuntimeError: if there is no compiled kernel.
      ValueError: if this processor does not support it.
    """
    _limit(_library(), name)


def _limit(library: ctypes.CDLL, name: str | None, given: str = "") -> None:
    if not library.sa_plus_plus_limit_targets(name and name.encode()):
        supported = ", ".join(target.name for target in _table(library) if target.supported)
        raise ValueError(f"{given}there is no target {name!r} here: this processor supports {supported}")


@functools.cache
def bf16_is_faster() -> bool:
    """Whether products are faster in bfloat16 than in float32, measured once: on some processors they are slower."""
    library = _library()
    library.sa_plus_plus_nanoseconds.restype = ctypes.c_double
    single, half = (library.sa_plus_plus_nanoseconds(code) for code in (0, 1))
    return bool(half < single)


def set_threads(count: int) -> None:
    """How many threads the kernel may use; 0: as many as XLA has."""
    _library().sa_plus_plus_set_threads(ctypes.c_int64(count))


def _library() -> ctypes.CDLL:
    if why := unavailable_reason():
        raise RuntimeError(f"there is no compiled kernel: {why}")
    return ctypes.CDLL(str(_built()[-1]))  # the one that is loaded


def _built() -> list[pathlib.Path]:
    return sorted(pathlib.Path(__file__).parent.parent.glob("_native.*"))


def _ffi_version() -> int:
    """`1000 * major + minor` of the foreign function interface in the installed jaxlib."""
    header = (pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    major, minor = (int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)[1]) for part in ("MAJOR", "MINOR"))  # type: ignore[index]
    return 1000 * major + minor


class Epilogue(NamedTuple):
    """What is applied to a product before it is stored: `activation(sums * scale + bias + (residual - zero) * factor)`.

    Attributes:
      dtype: of the result: float32, bfloat16, or uint8, which holds `round(.) + zero`, clamped to 0 to 255.
      activation: applied last.
      unit: the value of 1 in a uint8 result, before and after the activation; the above formula is in this unit.
      zero: the zero point in a uint8 result and its borders.
      residual_factor: factor of the residual.
      residual_zero: the zero point in the residual.
      border: `((top, bottom), (left, right))`, zeros around each image of the result.
    """

    dtype: Any = np.float32
    activation: Activation = "none"
    unit: float = 1.0
    zero: int = 0
    residual_factor: float = 1.0
    residual_zero: int = 0
    border: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))


def matmul(x: jax.Array, blocks: jax.Array, bias: jax.Array | None, layout: Layout, relu: bool) -> jax.Array:
    """`x (batch, rows) @ w (rows, cols)`, plus bias, with optional ReLU, in float32.

    Args:
      x: `(batch, rows)`; read as float32. A narrower `x` is widened first, which XLA fuses with its producer.
      blocks: `(kept, b_r, b_c)`, float32 or bfloat16.
      bias: `(cols,)`.
      layout: the block positions of `w`.
      relu: whether to apply `max(., 0)`.
    """
    matrix = Layout(layout.matrix, layout.block, layout.indices, layout.indptr)
    image = x.astype(jnp.float32)[None, None]
    return conv(image, blocks, matrix, bias=bias, epilogue=Epilogue(activation="relu" if relu else "none"))[0, 0]


def conv(
    x: jax.Array,
    blocks: jax.Array,
    layout: Layout,
    *,
    strides: tuple[int, int] = (1, 1),
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - immutable
    in_place: bool = False,
    narrow: bool = False,
) -> jax.Array:
    """Convolution of already padded images with an epilogue; patches are never materialised.

    Args:
      x: `(batch, height, width, channels)`, float32, bfloat16 or uint8.
      blocks: `(kept, b_r, b_c)` float32 or bfloat16 for `x` in float32; otherwise bfloat16 or int8, as
        `interleave_rows` returns them.
      layout: the block positions of the kernel `(k_h, k_w, channels, outputs)` or `(channels, outputs)`; `b_r`
        divides `k_w * channels` where `k_h > 1`.
      strides: down and across.
      scale: `(outputs,)` float32.
      bias: `(outputs,)` float32.
      residual: like the result, without borders.
      epilogue: the operations that follow the product.
      in_place: whether the result may overwrite the residual, which is in the caches, if it has the same type and no
        borders. XLA copies a residual that is needed later.
      narrow: whether no entry of int8 blocks is beyond -64 to 64, which some targets make use of.

    Returns:
      `(batch, rows + top + bottom, columns + left + right, outputs)`.
    """
    k_h, k_w = layout.shape[:2] if len(layout.shape) == 4 else (1, 1)
    (down, across), (batch, height, width, _) = strides, x.shape
    border = (top, bottom), (left, right) = epilogue.border
    rows, columns = (max((n - k) // s + 1, 0) for n, k, s in ((height, k_h, down), (width, k_w, across)))
    shape = (batch, rows + sum(border[0]), columns + sum(border[1]), layout.shape[-1])
    integers = {"window_rows": k_h, "window_columns": k_w, "stride_down": down, "stride_across": across}
    integers |= {"activation": ACTIVATIONS.index(epilogue.activation)}
    integers |= {"top": top, "bottom": bottom, "left": left, "right": right}
    floats = {"residual_scale": epilogue.residual_factor, "residual_zero": epilogue.residual_zero}
    floats |= {"y_zero": epilogue.zero, "y_unit": epilogue.unit}
    scale, bias = (jnp.zeros(0, jnp.float32) if a is None else a.astype(jnp.float32) for a in (scale, bias))
    if residual is None:
        residual, in_place = jnp.zeros(0, epilogue.dtype), False
    elif in_place := in_place and (residual.size, residual.dtype) == (math.prod(shape), epilogue.dtype):
        residual = residual.reshape(shape)
    y = _called(
        NARROW_CONV if narrow else CONV,
        jax.ShapeDtypeStruct(shape, epilogue.dtype),
        (x, blocks, layout.indices, layout.indptr, scale, bias, residual),
        _in_64_bits(integers) | {name: np.float32(n) for name, n in floats.items()},
        aliases={6: 0} if in_place else None,
    )
    return _varying(y, x, blocks, scale, bias, residual)


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: Activation = "none",
) -> jax.Array:
    """Each channel of images convolved with windows of its own: `activation(sums + bias + residual)`, in float32.

    Args:
      x: `(batch, height, width, channels)`.
      kernel: `(k_h, k_w, outputs)`, a multiple of the channels; the outputs of a channel are together.
      strides: down and across.
      dilation: from one row and column of the window to the next.
      padding: `((top, bottom), (left, right))`, zeros, which are not copied around the images.
      bias: `(outputs,)`.
      residual: like the result.
      activation: applied last.

    Returns:
      `(batch, rows, columns, outputs)`.
    """
    axes = zip(x.shape[1:3], padding, kernel.shape, dilation, strides, strict=False)
    sizes = [max((n + sum(pads) - (k - 1) * d - 1) // s + 1, 0) for n, pads, k, d, s in axes]
    out = jax.ShapeDtypeStruct((x.shape[0], *sizes, kernel.shape[2]), jnp.float32)
    bias, residual = (jnp.zeros(0, jnp.float32) if a is None else a for a in (bias, residual))
    options = {"stride_down": strides[0], "stride_across": strides[1], "dilation_down": dilation[0]}
    options |= {"dilation_across": dilation[1], "top": padding[0][0], "left": padding[1][0]}
    options |= {"activation": ACTIVATIONS.index(activation)}
    y = _called(DEPTHWISE, out, (x, kernel, bias, residual), _in_64_bits(options))
    return _varying(y, x, kernel, bias, residual)


def _called(
    target: str, out: Any, operands: Sequence[Any], options: Mapping[str, Any], aliases: dict[int, int] | None = None
) -> Any:
    """A call of the compiled kernel; under `jax.vmap` one after the other."""
    call = jax.ffi.ffi_call(target, out, vmap_method="sequential", input_output_aliases=aliases)
    return underived(functools.partial(call, **options))(*operands)


def _in_64_bits(options: Mapping[str, int]) -> dict[str, Any]:
    return {name: np.int64(n) for name, n in options.items()}


def _varying(y: jax.Array, *operands: jax.Array) -> jax.Array:
    """Under `jax.shard_map` a result varies over devices if any operand does."""
    varying = set().union(*(jax.typeof(operand).manual_axis_type.varying for operand in operands))
    return jax.lax.pcast(y, tuple(varying), to="varying") if varying else y


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    scale: float,
    out: jax.ShapeDtypeStruct,
    sizes: Sequence[int],
    strides: Sequence[Sequence[int]],
) -> jax.Array:
    """`softmax(scale * q kᵀ + bias) v` in each head. All axes of operands and result but the last may be in any order.

    Args:
      q: queries, `depth` last; float32 or bfloat16, like `k`, `v` and the result.
      k: keys, `depth` last.
      v: values, `width` last.
      bias: float32, `keys` last; None for none.
      scale: of the scores.
      out: shape and dtype of the result, `width` last.
      sizes: three of heads, the number of queries and of keys, `depth`, `width`, and how many keys the first query
        sees; each of the others sees one more than the one before it.
      strides: of `q`, `k`, `v`, `bias` and the result: one along each axis of the heads, one along queries or keys, in
        entries; 0 along an axis that the array does not have.
    """
    bias = jnp.zeros(0, jnp.float32) if bias is None else bias
    flat = np.array(strides, np.int64).reshape(-1)
    options = {"sizes": np.array(sizes, np.int64), "strides": flat, "scale": np.float32(scale)}
    y = _called(ATTENTION, out, (q, k, v, bias), options)
    return _varying(y, q, k, v, bias)


def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    epsilon: float,
    centred: bool,
    dtype: Any,
    factor: float = 1.0,
    zero: int = 0,
) -> jax.Array:
    """`(x - mean) / sqrt(variance + epsilon) * scale + shift` along the last axis.

    Args:
      x: float32 or bfloat16, of one axis or more.
      scale: float32, one for each entry of the last axis.
      shift: like `scale`.
      epsilon: as above.
      centred: whether the mean is subtracted; otherwise it counts as 0, in the variance too.
      dtype: of the result: float32, bfloat16, or uint8, which holds `round(. / factor) + zero`, clamped to 0 to 255.
      factor: the value of 1 in uint8.
      zero: the zero point in uint8.
    """
    options: dict[str, Any] = {"centred": np.int64(centred), "epsilon": np.float32(epsilon)}
    options |= {"factor": np.float32(1 / factor), "zero": np.float32(zero)}
    y = _called(LAYER_NORM, jax.ShapeDtypeStruct(x.shape, dtype), (x, scale, shift), options)
    return _varying(y, x, scale, shift)


def max_pool(
    x: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> jax.Array:
    """Max pooling of images; positions beyond their edges are ignored.

    Args:
      x: `(batch, height, width, channels)`, float32, bfloat16 or uint8.
      window: its height and width.
      strides: down and across.
      padding: `((top, bottom), (left, right))`.
    """
    return _pool(MAX_POOL, x, window, strides, padding)


def sum_pool(
    x: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
) -> jax.Array:
    """Sum pooling of images; arguments as for `max_pool`, `x` in float32."""
    return _pool(SUM_POOL, x, window, strides, padding)


def _pool(target: str, x: jax.Array, window: Any, strides: Any, padding: Any) -> jax.Array:
    axes = zip(x.shape[1:3], padding, window, strides, strict=True)
    sizes = [max((n + sum(pads) - k) // s + 1, 0) for n, pads, k, s in axes]
    out = jax.ShapeDtypeStruct((x.shape[0], *sizes, x.shape[3]), x.dtype)
    options = {"window_rows": window[0], "window_columns": window[1], "stride_down": strides[0]}
    options |= {"stride_across": strides[1], "top": padding[0][0], "left": padding[1][0]}
    return _called(target, out, (x,), _in_64_bits(options))


def round_images(
    x: jax.Array,
    dtype: Any,
    factor: float = 1.0,
    zero: int = 0,
    border: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    channels: int | None = None,
) -> jax.Array:
    """Images in float32, bfloat16, or uint8 as `round(x / factor) + zero`, padded with zeros.

    Args:
      x: `(batch, height, width, channels)`, float32.
      dtype: float32, bfloat16 or uint8.
      factor: the value of 1 in uint8.
      zero: the zero point in uint8.
      border: `((top, bottom), (left, right))`.
      channels: of the result; by default those of `x`.
    """
    sizes = [n + sum(pads) for n, pads in zip(x.shape[1:3], border, strict=True)]
    out = jax.ShapeDtypeStruct((x.shape[0], *sizes, channels or x.shape[3]), dtype)
    scale, shift = map(np.float32, (1 / factor, zero) if dtype == np.uint8 else (1, 0))
    options = _in_64_bits({"top": border[0][0], "left": border[1][0]}) | {"scale": scale, "zero": shift}
    return _called(ROUND, out, (x,), options)


def look_up(x: jax.Array, places: jax.Array) -> jax.Array:
    """`y[..., k] = x[..., places[k]]`.

    Args:
      x: `(..., columns)`, float32, bfloat16 or uint8.
      places: `(k,)` int32, each from 0 to `columns - 1`.
    """
    out = jax.ShapeDtypeStruct((*x.shape[:-1], places.size), x.dtype)
    return _varying(_called(LOOK_UP, out, (x, places), {}), x, places)


def sequence(
    program: np.ndarray, operands: Sequence[jax.Array], out: Sequence[jax.ShapeDtypeStruct], memory: int
) -> list[jax.Array]:
    """Several calls of the kernel in one.

    Args:
      program: int64, as `csrc/sequence.h` describes it. Its buffers are the operands, the results, and the memory.
      operands: of any types.
      out: shapes and dtypes of the results.
      memory: bytes that the steps use, 0 for none.
    """
    scratch = [jax.ShapeDtypeStruct((memory,), np.uint8)] * (memory > 0)
    call = jax.ffi.ffi_call(SEQUENCE, [*out, *scratch])

    @jax.custom_batching.sequential_vmap  # without the memory among the results: a batch would have one for each row
    def run(*operands: jax.Array) -> list[jax.Array]:
        return list(call(*operands, program=program)[: len(out)])

    return [_varying(y, *operands) for y in underived(run)(*operands)]


def underived(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; where JAX differentiates it, an error says that the compiled kernel has no derivative."""
    return inference(run, _UNDERIVED)


def code_of(dtype: Any) -> int:
    """The number of a type in a program: bytes have one, with a sign or without."""
    return (*_X_DTYPES, np.dtype(np.int32)).index(np.dtype(np.uint8 if dtype == np.int8 else dtype))


def interleave_rows(blocks: np.ndarray) -> np.ndarray:
    """Blocks as the kernel reads them for `x` in bfloat16 or uint8: four bytes of each column are contiguous.

    Args:
      blocks: `(kept, b_r, b_c)` bfloat16 or int8; `b_r` a multiple of 2 or 4, `b_c` of `WIDE`.

    Returns:
      `(kept, b_r / group, b_c, group)`.
    """
    group = 4 // blocks.dtype.itemsize
    kept, b_r, b_c = blocks.shape
    return np.ascontiguousarray(blocks.reshape(kept, b_r // group, group, b_c).swapaxes(2, 3))
