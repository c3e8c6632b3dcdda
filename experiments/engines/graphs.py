"""Dense networks as ONNX graphs for inference.

They use the operators for which engines are optimised: channels-first images, batch normalisation folded into the
convolutions, layer normalisation and GELU as one operator each. (A converter, jax2onnx, drops the padding of flax's
`max_pool`, and decomposes those operators.)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import helper, numpy_helper

from experiments.models import ClickNet, LeNet300, MobileNetV2, ResNet, mobilenet
from experiments.models.sentences import MeanPooled
from sa_plus_plus.contrib.transformers.encoder import EPSILON, Encoder

_OPSET, _IR = 20, 9  # the first opset with Gelu; an IR version that goes with it
_LARGEST = 2**31 - 2**20  # bytes that protobuf can hold, and some for the nodes
_NORM_EPSILON = 1e-5  # epsilon of batch normalisation in most of these networks


class Graph(NamedTuple):
    """A network for inputs of one shape.

    Attributes:
      model: with one input and one output, float32 weights.
      layout: an input of the network's as the graph takes it.
    """

    model: onnx.ModelProto
    layout: Callable[[np.ndarray], np.ndarray]


def graph(model: nn.Module, variables: Any, x: np.ndarray) -> Graph:
    """The graph of `model.apply(variables, x)` for inputs of the shape of `x`.

    Raises:
      ValueError: if no graph is written here for such a network, or it is too large for ONNX.
    """
    for kind, (write, layout) in _WRITTEN.items():
        if isinstance(model, kind):
            return Graph(write(model, variables, layout(x)), layout)
    known = ", ".join(kind.__name__ for kind in _WRITTEN)
    raise ValueError(f"no ONNX graph of {type(model).__name__}, only of {known}")


def _channels_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


class _Writer:
    """Collects nodes: `write("Conv", x, kernel, bias, strides=[2, 2])` is the name of the result.

    Inputs are names of results, or arrays, which become constants of the graph.
    """

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str | np.ndarray, **attributes: Any) -> str:
        names = [self._constant(x) if isinstance(x, np.ndarray) else x for x in inputs]
        result = f"{op}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, names, [result], name=result, **attributes))
        return result

    def _constant(self, x: np.ndarray) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(x, name))
        return name

    def model(self, x: np.ndarray, output: str, *shape: int) -> onnx.ModelProto:
        """The graph from `"x"`, of the shape and type of `x`, to `output`, float32 of `shape`."""
        size = sum(len(constant.raw_data) for constant in self._constants)
        if size >= _LARGEST:
            raise ValueError(f"the weights take {size:,} bytes, and an ONNX file has at most {_LARGEST:,}")
        first = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        last = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, shape)
        body = helper.make_graph(self._nodes, "network", [first], [last], self._constants)
        result = helper.make_model(body, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
        onnx.checker.check_model(result, full_check=True)
        return result


def _resnet(model: ResNet, variables: Any, x: np.ndarray) -> onnx.ModelProto:
    write, params, stats = _Writer(), variables["params"], variables["batch_stats"]

    def convolution(x: str, where: tuple[str, ...], name: str, stride: int = 1) -> str:
        """A convolution with the batch normalisation after it; padded by half its window, as all of these are."""
        p, s = params, stats
        for part in where:
            p, s = p[part], s[part]
        kernel, bias = folded(p[f"conv{name}"]["kernel"], p[f"norm{name}"], s[f"norm{name}"])
        half = kernel.shape[-1] // 2
        return write("Conv", x, kernel, bias, kernel_shape=kernel.shape[2:], strides=[stride] * 2, pads=[half] * 4)

    y = write("Relu", convolution("x", (), "_stem", 1 if model.small_images else 2))
    if not model.small_images:
        y = write("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for i, blocks in enumerate(model.stages, 1):
        for j in range(1, blocks + 1):
            where, stride = (f"stage{i}_block{j}",), 2 if i > 1 and j == 1 else 1
            strides = (1, stride, 1) if model.bottleneck else (stride, 1)
            branch = y
            for n, each in enumerate(strides, 1):
                branch = convolution(branch, where, str(n), each)
                branch = write("Relu", branch) if n < len(strides) else branch
            if "conv_shortcut" in params[where[0]]:
                y = convolution(y, where, "_shortcut", stride)
            y = write("Relu", write("Add", branch, y))
    y = write("Flatten", write("GlobalAveragePool", y))
    y = write("Gemm", y, *_dense(params["head"]))
    return write.model(x, y, len(x), model.classes)


def _mobilenet(model: MobileNetV2, variables: Any, x: np.ndarray) -> onnx.ModelProto:
    write, params, stats = _Writer(), variables["params"], variables["batch_stats"]

    def convolution(x: str, where: tuple[str, ...], name: str, stride: int = 1, clipped: bool = True) -> str:
        """A convolution with the batch normalisation and, if `clipped`, the ReLU6 after it."""
        p, s = params, stats
        for part in where:
            p, s = p[part], s[part]
        kernel, bias = folded(p[f"conv_{name}"]["kernel"], p[f"norm_{name}"], s[f"norm_{name}"], model.epsilon)
        half, groups = kernel.shape[-1] // 2, len(kernel) if name == "depthwise" else 1
        options = {"kernel_shape": kernel.shape[2:], "strides": [stride] * 2, "group": groups}
        options |= {"auto_pad": "SAME_UPPER"} if model.same else {"pads": [half] * 4}
        y = write("Conv", x, kernel, bias, **options)
        return write("Clip", y, np.zeros((), np.float32), np.array(6, np.float32)) if clipped else y

    y, channels = convolution("x", (), "stem", 2), mobilenet.STEM
    for i, stage in enumerate((mobilenet.Stage(*fields) for fields in model.stages), 1):
        for j in range(1, stage.blocks + 1):
            where, stride, width = (f"stage{i}_block{j}",), stage.stride if j == 1 else 1, stage.width
            branch = convolution(y, where, "expand") if stage.factor > 1 else y
            branch = convolution(branch, where, "depthwise", stride)
            branch = convolution(branch, where, "project", clipped=False)
            y = write("Add", branch, y) if (stride, width) == (1, channels) else branch
            channels = width
    y = write("Flatten", write("GlobalAveragePool", convolution(y, (), "head")))
    y = write("Gemm", y, *_dense(params["head"]))
    return write.model(x, y, len(x), model.classes)


def folded(kernel: Any, norm: Any, stats: Any, epsilon: float = _NORM_EPSILON) -> tuple[np.ndarray, np.ndarray]:
    """Kernel `(out, in, height, width)` and bias of a convolution with the batch normalisation after it."""
    kernel, scale, shift, mean, variance = (
        np.asarray(a, np.float64) for a in (kernel, norm["scale"], norm["bias"], stats["mean"], stats["var"])
    )
    factor = scale / np.sqrt(variance + epsilon)
    return (kernel * factor).transpose(3, 2, 0, 1).astype(np.float32), (shift - mean * factor).astype(np.float32)


def _encoder(model: Encoder, variables: Any, x: np.ndarray) -> onnx.ModelProto:
    write, params = _Writer(), variables["params"]
    y = _layers(write, "x", params, x.shape[:2], model.layers, model.heads, EPSILON)
    y = write("Gemm", write("Gather", y, np.array(0), axis=1), *_dense(params["head"]))
    return write.model(x, y, len(x), model.classes)


def _sentences(model: MeanPooled, variables: Any, x: np.ndarray) -> onnx.ModelProto:
    write, bert, params = _Writer(), model.encoder, variables["params"]["encoder"]
    tables = [
        np.asarray(params[f"{name}_embedding"]["embedding"], np.float32) for name in ("token", "position", "type")
    ]
    real = write("Cast", write("Not", write("Equal", "x", np.zeros((), x.dtype))), to=onnx.TensorProto.FLOAT)
    mask = write("Unsqueeze", real, np.array([1, 2]))
    mask = write("Mul", write("Sub", np.ones((), np.float32), mask), np.array(np.finfo(np.float32).min))
    y = write("Gather", tables[0], "x", axis=0)
    y = write("Add", y, tables[1][: x.shape[1]] + tables[2][0])
    y = write("LayerNormalization", y, *_norm(params["norm"]), axis=-1, epsilon=bert.epsilon)
    y = _layers(write, y, params, x.shape, bert.layers, bert.heads, bert.epsilon, mask)
    weighted = write("Mul", y, write("Unsqueeze", real, np.array([2])))
    total = write("ReduceSum", weighted, np.array([1]), keepdims=0)
    return write.model(x, write("LpNormalization", total, axis=-1, p=2), len(x), bert.width)


def _layers(
    write: _Writer,
    y: str,
    params: Any,
    shape: tuple[int, ...],
    layers: int,
    heads: int,
    epsilon: float,
    mask: str | None = None,
) -> str:
    """Layers with normalisation after each sum, of tokens `(batch, sequence)`; the mask is added to the scores."""
    width = params["layer1"]["out"]["bias"].shape[0]

    def dense(x: str, layer: Any) -> str:
        kernel, bias = _dense(layer)
        return write("Add", write("MatMul", x, kernel), bias)

    def normalised(x: str, y: str, norm: Any) -> str:
        return write("LayerNormalization", write("Add", x, y), *_norm(norm), axis=-1, epsilon=epsilon)

    def split(x: str, layer: Any, order: tuple[int, ...]) -> str:
        return write(
            "Transpose", write("Reshape", dense(x, layer), np.array([*shape, heads, width // heads])), perm=order
        )

    for i in range(1, layers + 1):
        layer = params[f"layer{i}"]
        q, v = (split(y, layer[name], (0, 2, 1, 3)) for name in ("query", "value"))
        k = split(y, layer["key"], (0, 2, 3, 1))
        scores = write("Div", write("MatMul", q, k), np.array(np.sqrt(width // heads), np.float32))
        scores = scores if mask is None else write("Add", scores, mask)
        mixed = write("Transpose", write("MatMul", write("Softmax", scores, axis=-1), v), perm=(0, 2, 1, 3))
        mixed = write("Reshape", mixed, np.array([*shape, width]))
        y = normalised(y, dense(mixed, layer["out"]), layer["norm1"])
        y = normalised(y, dense(write("Gelu", dense(y, layer["up"])), layer["down"]), layer["norm2"])
    return y


def _norm(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(norm["scale"], np.float32), np.asarray(norm["bias"], np.float32)


def _dense(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(layer["kernel"], np.float32), np.asarray(layer["bias"], np.float32)


def _lenet(model: LeNet300, variables: Any, x: np.ndarray) -> onnx.ModelProto:
    write, params = _Writer(), variables["params"]
    layers = [params[f"Dense_{i}"] for i in range(len(params))]
    return write.model(x, _perceptron(write, write("Flatten", "x"), layers), len(x), model.classes)


def _click(model: ClickNet, variables: Any, x: np.ndarray) -> onnx.ModelProto:
    write, params = _Writer(), variables["params"]
    rows = write("Add", "x", np.asarray(model.rows(jnp.zeros(x.shape[1:], x.dtype))))
    table = np.asarray(params["table"]["embedding"], np.float32)
    y = write("Reshape", write("Gather", table, rows, axis=0), np.array([len(x), -1]))
    layers = [params[f"hidden{i}"] for i in range(1, len(model.widths) + 1)]
    return write.model(x, write("Reshape", _perceptron(write, y, [*layers, params["logit"]]), np.array([-1])), len(x))


def _perceptron(write: _Writer, y: str, layers: Sequence[Any]) -> str:
    """Dense layers with ReLU between them."""
    for layer in layers[:-1]:
        y = write("Relu", write("Gemm", y, *_dense(layer)))
    return write("Gemm", y, *_dense(layers[-1]))


_WRITTEN: dict[type[nn.Module], tuple[Callable[..., onnx.ModelProto], Callable[[np.ndarray], np.ndarray]]] = {
    ResNet: (_resnet, _channels_first),
    Encoder: (_encoder, np.ascontiguousarray),
    MeanPooled: (_sentences, np.ascontiguousarray),
    LeNet300: (_lenet, np.ascontiguousarray),
    ClickNet: (_click, np.ascontiguousarray),
    MobileNetV2: (_mobilenet, _channels_first),
}
