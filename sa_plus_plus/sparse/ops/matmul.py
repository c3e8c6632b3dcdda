"""Differentiable block-sparse matmul, with the implementation that suits the platform."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from sa_plus_plus import blocks as blk
from sa_plus_plus.sparse.array import BlockSparse, Layout
from sa_plus_plus.sparse.ops import native, xla

Implementation = Literal["xla", "native", "pallas", "dense"]


def block_sparse_matmul(
    x: jax.Array,
    w: BlockSparse,
    *,
    bias: jax.Array | None = None,
    relu: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array:
    """`x @ w`, at a cost in proportion to the blocks kept: `y[..., c] = sum_r x[..., r] w[r, c] (+ bias[c])`.

    Differentiable in `x`, `w.blocks` and `bias` (backwards, once), under `jit` and `vmap`; one compilation serves all
    kernels of equal layout. Sums are accumulated in at least float32 and rounded to the type of `x` at the end.

    Args:
      x: `(..., rows)`, any leading dimensions, including none or an empty one.
      w: a kernel that is read as one matrix, `(rows, cols)`, of the same type as `x`.
      bias: `(cols,)`, added before rounding.
      relu: whether to apply `max(., 0)`, with derivative 0 at 0.
      implementation: `"native"`: the compiled kernel for CPUs, float32 and bfloat16. `"pallas"`: the kernel for GPUs,
        in Pallas's interpreter on a CPU. `"xla"`: plain JAX. `"dense"`: the whole kernel, including zeros. None: the
        fastest available: on CPUs native if it was built and supports the type, on NVIDIA GPUs pallas in bfloat16 and
        float16, otherwise xla.

    Returns:
      `(..., cols)` in the type of `x`.

    Raises:
      ValueError: if shapes or types do not fit, or for an unknown implementation.
      RuntimeError: if the native implementation is requested and was not built.

    >>> import numpy as np
    >>> kernel = np.kron(np.eye(3, dtype=np.float32), np.ones((2, 2), np.float32))
    >>> block_sparse_matmul(jnp.arange(6.0), BlockSparse.fromdense(kernel, 2)).tolist()
    [1.0, 1.0, 5.0, 5.0, 9.0, 9.0]
    """
    if w.layout.matrices > 1:
        raise ValueError(f"w is a stack of {w.layout.matrices} matrices, {w.layout}: multiply by one of them")
    rows, cols = w.layout.matrix
    if x.ndim < 1 or x.shape[-1] != rows:
        raise ValueError(
            f"x must be (..., {rows}) to be multiplied by a kernel of shape {w.shape}, a matrix of {rows} by {cols}; "
            f"got {x.shape}"
        )
    check(x, w, bias)
    flat = x.reshape(math.prod(x.shape[:-1]), rows)
    y = _compiled_product(flat, w.blocks, bias, w.layout, relu, chosen(implementation, x.dtype))
    return y.reshape(*x.shape[:-1], cols)


def check(x: jax.Array, w: BlockSparse, bias: jax.Array | None) -> None:
    """Refuse a kernel, an input and a bias that do not fit together."""
    cols = w.layout.matrix[1]
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != w.dtype:
        raise ValueError(f"x and the kernel must be of one floating type, got {x.dtype} and {w.dtype}: cast either")
    if w.blocks.shape != (w.layout.nse, *w.layout.block):
        raise ValueError(f"blocks must be {(w.layout.nse, *w.layout.block)} as the layout has it, got {w.blocks.shape}")
    if bias is not None and (bias.shape != (cols,) or not jnp.issubdtype(bias.dtype, jnp.floating)):
        raise ValueError(f"bias must be floating and of shape {(cols,)}, got {bias.dtype} {bias.shape}")


def chosen(implementation: Implementation | None, dtype: Any) -> str:
    """The implementation that the argument stands for, `"auto"` for the fastest on the platform."""
    if implementation is None:
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu and dtype in native.DTYPES and (why := native.unavailable_reason()):
            _notice(f"block-sparse products run in plain JAX, not in the compiled kernel, several times as fast: {why}")
        return "auto" if _by_kernels(dtype) else "xla"
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be one of {', '.join(get_args(Implementation))} or None, got {implementation!r}"
        )
    if implementation == "native":
        if dtype not in native.DTYPES:
            raise ValueError(
                f"the native implementation computes in float32 and bfloat16, not {dtype}: use implementation='xla'"
            )
        if why := native.unavailable_reason():
            raise RuntimeError(
                f"there is no native implementation: {why}; install the package again or use implementation='xla'"
            )
    return implementation


@functools.cache
def _notice(text: str) -> None:
    warnings.warn(text, stacklevel=4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _product(
    x: jax.Array, blocks: jax.Array, bias: jax.Array | None, layout: Layout, relu: bool, implementation: str
) -> jax.Array:
    return _forward(x, blocks, bias, layout, relu, implementation)


def _forward(
    x: jax.Array, blocks: jax.Array, bias: jax.Array | None, layout: Layout, relu: bool, implementation: str
) -> jax.Array:
    """The matmul with a batching rule: mapped rows become more rows of one matmul."""

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array, blocks: jax.Array, bias: jax.Array | None) -> jax.Array:
        return _run(x, blocks, bias, layout, relu, implementation)

    @call.def_vmap
    def rule(
        size: int, batched: Any, x: jax.Array, blocks: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, bool]:
        if batched[1] or batched[2]:  # several kernels: plain JAX knows how
            axes = tuple(0 if is_batched else None for is_batched in batched)
            run = functools.partial(_run, layout=layout, relu=relu, implementation="xla")
            return jax.vmap(run, axes, axis_size=size)(x, blocks, bias), True
        y = _forward(x.reshape(size * x.shape[1], x.shape[2]), blocks, bias, layout, relu, implementation)
        return y.reshape(size, x.shape[1], y.shape[1]), True

    return call(x, blocks, bias)


def _run(
    x: jax.Array, blocks: jax.Array, bias: jax.Array | None, layout: Layout, relu: bool, implementation: str
) -> jax.Array:
    def rounded(kernel: Callable[..., jax.Array], **options: Any) -> Callable[..., jax.Array]:
        return lambda *args: kernel(*args, layout=layout, relu=relu, **options).astype(x.dtype)

    plain = rounded(_plain, dense=implementation == "dense")
    kernels: dict[str, Callable[..., jax.Array]] = {}
    if implementation == "auto":
        kernels = {platform: rounded(kernel) for platform, kernel in _by_kernels(x.dtype).items()} | {"default": plain}
    elif implementation == "native":
        kernels = {"cpu": rounded(native.matmul)}
    elif implementation == "pallas":
        on_gpu = rounded(_tiles, interpret=False)
        kernels = {"cuda": on_gpu, "rocm": on_gpu, "cpu": rounded(_tiles, interpret=True)}
    return jax.lax.platform_dependent(x, blocks, bias, **kernels) if kernels else plain(x, blocks, bias)


def _by_kernels(dtype: Any) -> dict[str, Callable[..., jax.Array]]:
    """The kernels for this type by platform. On GPUs, float32 was not measured."""
    kernels: dict[str, Callable[..., jax.Array]] = {}
    if dtype in native.DTYPES and not native.unavailable_reason():
        kernels["cpu"] = native.matmul
    if jnp.dtype(dtype).itemsize == 2 and jax.default_backend() in ("gpu", "cuda"):
        kernels["cuda"] = functools.partial(_tiles, interpret=False)
    return kernels


def _tiles(*args: Any, **options: Any) -> jax.Array:
    from sa_plus_plus.sparse.ops import pallas  # noqa: PLC0415 - for few, and takes a while

    return pallas.matmul(*args, **options)


def _plain(
    x: jax.Array, blocks: jax.Array, bias: jax.Array | None, layout: Layout, relu: bool, dense: bool
) -> jax.Array:
    if not dense:
        return xla.epilogue(xla.matmul(x, blocks, layout), bias, relu)
    w = blk.matrices(BlockSparse(blocks, layout).todense(), layout.view).reshape(layout.matrix)
    return xla.epilogue(jnp.matmul(x, w, preferred_element_type=xla.sum_type(x)), bias, relu)


def _product_forward(
    x: jax.Array, blocks: jax.Array, bias: jax.Array | None, layout: Layout, relu: bool, implementation: str
) -> tuple[jax.Array, Any]:
    y = _forward(x, blocks, bias, layout, relu, implementation)
    return y, (x, blocks, bias, y if relu else None)


def _product_backward(
    layout: Layout, relu: bool, implementation: str, saved: Any, g: jax.Array
) -> tuple[Any, Any, Any]:
    x, blocks, bias, y = saved
    if relu:
        g = jnp.where(y > 0, g, jnp.zeros_like(g))
    transposed, order = layout.transposed
    dx = _forward(g, blocks[order].swapaxes(1, 2), None, transposed, False, implementation)
    d_blocks = xla.weight_gradient(x, g, layout).astype(blocks.dtype)
    d_bias = None if bias is None else _like(jnp.sum(blk.at_least_float32(g), axis=0).astype(bias.dtype), bias)
    return _like(dx, x), _like(d_blocks, blocks), d_bias


def _like(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
    """Under `jax.shard_map`: summed over devices where the primal is the same on all of them, a kernel as a rule."""
    here, there = (jax.typeof(a).manual_axis_type.varying for a in (cotangent, primal))
    if here - there:
        cotangent = jax.lax.psum(cotangent, tuple(here - there))
    return jax.lax.pcast(cotangent, tuple(there - here), to="varying") if there - here else cotangent


_product.defvjp(_product_forward, _product_backward)
_compiled_product = jax.jit(_product, static_argnums=(3, 4, 5))
