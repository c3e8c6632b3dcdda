"""Products and convolutions with constant kernels become layers, with contracted axes and channels last."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sa_plus_plus.sparse.compiler.builder import Builder, rewrite
from sa_plus_plus.sparse.compiler.constants import arranged
from sa_plus_plus.sparse.compiler.ir import Call, Constant, Layer, LayerSpec, Step, Traced, Value, Variable
from sa_plus_plus.sparse.compiler.unsupported import MOST_EXPERTS


def find_layers(traced: Traced) -> Traced:
    """The network with layers, between transpositions that bring axes in the order in which layers take them."""
    return rewrite(traced, _Rule)


class _Rule:
    def __init__(self, builder: Builder):
        self.builder = builder
        self.strided: dict[Variable, tuple[Variable, tuple[int, int]]] = {}
        self.padded: dict[Variable, tuple[Variable, Sequence[tuple[int, int, int]]]] = {}

    def __call__(self, step: Step, inputs: tuple[Value, ...]) -> Sequence[Value] | None:
        empty = any(isinstance(value, Constant) and 0 in value.shape for value in inputs)
        if not isinstance(step, Call) or empty:  # a kernel without weights is no layer
            return None
        if step.name == "slice":
            self.slice(step, inputs)
        elif step.name == "pad":
            self.pad(step, inputs)
        elif step.name == "dot_general":
            return self.product(step, inputs)
        elif step.name == "conv_general_dilated":
            return self.convolution(step, inputs)
        return None

    def slice(self, call: Call, inputs: tuple[Value, ...]) -> None:
        """Remember a slice that takes every n-th row and column of images: a product can use it as strides."""
        (x,), (output,) = inputs, call.outputs
        strides = call.params["strides"] or (1,) * len(x.shape)
        whole = all((n - 1) // s + 1 == m for n, s, m in zip(x.shape, strides, output.shape, strict=True))
        images = len(x.shape) == 4 and strides[0] == strides[3] == 1
        if images and whole and not any(call.params["start_indices"]):
            assert isinstance(x, Variable)  # since constant expressions are computed
            self.strided[output] = x, (strides[1], strides[2])

    def pad(self, call: Call, inputs: tuple[Value, ...]) -> None:
        """Remember a padding with zeros: a convolution can have it as its own."""
        (x, zero), config = inputs, call.params["padding_config"]
        if not isinstance(x, Variable) or not isinstance(zero, Constant) or not jnp.issubdtype(x.dtype, jnp.floating):
            return
        if not np.any(zero.value) and all(min(low, high) >= 0 == gap for low, high, gap in config):
            self.padded[call.outputs[0]] = x, config

    def product(self, call: Call, inputs: tuple[Value, ...]) -> Sequence[Value] | None:
        """A product with a constant as a layer; a batched product, such as of experts, as one layer each."""
        (contracted, batch), (left, right), (out,) = call.params["dimension_numbers"], inputs, call.outputs
        x, kernel = (left, right) if isinstance(left, Variable) else (right, left)
        if not contracted[0] or not isinstance(x, Variable) or not isinstance(kernel, Constant):
            return None
        if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (x.dtype, kernel.dtype, out.dtype)):
            return None
        sides = [(c, b) for c, b in zip(contracted, batch, strict=True)]
        (over_x, batch_x), (over_kernel, batch_kernel) = sides if x is left else sides[::-1]
        rest_x, rest_kernel = (
            [i for i in range(len(v.shape)) if i not in (*over, *along)]
            for v, over, along in ((x, over_x, batch_x), (kernel, over_kernel, batch_kernel))
        )
        if x in self.strided and x is left and (over_x, over_kernel, len(kernel.shape)) == ((3,), (0,), 2):
            return self.strided_product(x, kernel, call)
        lengths = tuple(kernel.shape[i] for i in batch_kernel)
        columns = tuple(kernel.shape[i] for i in rest_kernel)
        rows, number = int(np.prod([kernel.shape[i] for i in over_kernel])), int(np.prod(lengths))
        if batch_x and not (0 < number <= MOST_EXPERTS and columns):
            return None
        build, n, m = self.builder, len(batch_x), len(rest_x)
        matrices = arranged(kernel, (*batch_kernel, *over_kernel, *rest_kernel), (number, rows, -1))
        flat: Value = build.transpose(x, (*batch_x, *rest_x, *over_x))
        if n > 1:
            (flat,) = build.inline(lambda x: lax.reshape(x, (number, *x.shape[n:])), flat)

        def layer(x: Value, i: int) -> Value:
            matrix = build.item(matrices, i)
            assert isinstance(x, Variable)
            assert isinstance(matrix, Constant)
            output = build.variable((*x.shape[:m], *columns), out.dtype)
            about = jax.ShapeDtypeStruct(matrix.shape, matrix.dtype)
            spec = LayerSpec(None, x, about, output, columns, precision=call.params["precision"])
            build.steps.append(Layer(spec, matrix.value, origin=matrix.origin, leaves=matrix.leaves))
            return output

        if not batch_x:
            result = layer(flat, 0)
        else:
            result = build.stack([layer(build.item(flat, i), i) for i in range(number)])
            if n > 1:
                (result,) = build.inline(lambda y: lax.reshape(y, (*lengths, *y.shape[1:])), result)
        if left is kernel:  # the kernel's axes come first in the result
            assert isinstance(result, Variable)
            axes = range(len(result.shape))
            return [build.transpose(result, (*axes[:n], *axes[n + m :], *axes[n : n + m]))]
        return [result]

    def strided_product(self, x: Variable, kernel: Constant, call: Call) -> Sequence[Value] | None:
        """A product with every n-th row and column of images as a strided convolution, without a copy."""
        images, strides = self.strided[x]
        (out,), window = call.outputs, arranged(kernel, (0, 1), (1, 1, *kernel.shape))
        options: dict[str, Any] = {"window_strides": strides, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        options |= {"precision": call.params["precision"], "preferred_element_type": out.dtype}
        convolve = functools.partial(lax.conv_general_dilated, padding="VALID", **options)
        shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (images, window)]
        (eqn,) = jax.make_jaxpr(convolve)(*shapes).eqns
        return self.convolved(images, window, eqn.params, out)

    def convolution(self, call: Call, inputs: tuple[Value, ...]) -> Sequence[Value] | None:
        """A convolution with a constant kernel as a layer, channels last in images, kernel and result."""
        (x, kernel), (out,) = inputs, call.outputs
        if not isinstance(x, Variable) or not isinstance(kernel, Constant) or call.params["batch_group_count"] != 1:
            return None
        if not jnp.issubdtype(kernel.dtype, jnp.floating) or not jnp.issubdtype(out.dtype, jnp.floating):
            return None
        return self.convolved(x, kernel, call.params, out)

    def convolved(self, x: Variable, kernel: Constant, params: dict[str, Any], out: Variable) -> list[Value]:
        build, last = self.builder, len(x.shape) - 1
        images, kernels, results = params["dimension_numbers"]
        images, results = ((spec[0], *spec[2:], spec[1]) for spec in (images, results))
        before, config = self.padded.get(x, (x, ()))
        if config and config[images[0]] == config[images[-1]] == (0, 0, 0) and set(params["lhs_dilation"]) == {1}:
            pads = [
                (low + config[i][0], high + config[i][1])
                for i, (low, high) in zip(images[1:-1], params["padding"], strict=True)
            ]
            if all(min(pair) >= 0 for pair in params["padding"]):
                x, params = before, params | {"padding": tuple(pads)}
        kernel = arranged(kernel, (*kernels[2:], kernels[1], kernels[0]))
        spec = (0, last, *range(1, last))
        numbers = lax.ConvDimensionNumbers(spec, (last, last - 1, *range(last - 1)), spec)
        x = build.transpose(x, images)
        output = build.variable([out.shape[i] for i in results], out.dtype)
        about = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
        layer = LayerSpec(params | {"dimension_numbers": numbers}, x, about, output, kernel.shape[-1:])
        build.steps.append(Layer(layer, kernel.value, origin=kernel.origin, leaves=kernel.leaves))
        return [build.transpose(output, np.argsort(results).tolist())]
