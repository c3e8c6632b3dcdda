"""Published weights of GPT-2, BERT and ViT in Hugging Face's files, as parameters of the modules here, and back.

    model = Decoder()
    params = checkpoints.load("model.safetensors", model, jax.eval_shape(model.init, key, tokens)["params"])
    checkpoints.save("pruned.safetensors", "model.safetensors", model, params)

Tensors are found by name; nothing is downloaded.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sa_plus_plus import path_string
from sa_plus_plus.contrib.transformers.encoder import Bert
from sa_plus_plus.contrib.transformers.transformer import Decoder, ViT
from sa_plus_plus.files import write_atomically

Shape = tuple[int, ...]
_Form = Callable[[np.ndarray], np.ndarray]


class _Layout(NamedTuple):
    """How an architecture's tensors are named and stored.

    Attributes:
      prefix: of the names, which a file may also have without it.
      names: by modules and single parameters here; `{}` is the number of a layer, from 0.
      outputs_first: whether dense kernels are `(outputs, inputs)`, as PyTorch's `Linear` has them.
      fused: whether query, key and value are side by side in one tensor.
      leading: for parameters that are stored with axes of 1 in front, how many.
    """

    prefix: str
    names: Mapping[str, str]
    outputs_first: bool = True
    fused: bool = False
    leading: Mapping[str, int] = {}


_LAYOUTS: dict[type[nn.Module], _Layout] = {
    Decoder: _Layout(
        "transformer.",
        {
            "token_embedding": "wte",
            "position_embedding": "wpe",
            "layer/norm1": "h.{}.ln_1",
            **dict.fromkeys(("layer/query", "layer/key", "layer/value"), "h.{}.attn.c_attn"),
            "layer/out": "h.{}.attn.c_proj",
            "layer/norm2": "h.{}.ln_2",
            "layer/up": "h.{}.mlp.c_fc",
            "layer/down": "h.{}.mlp.c_proj",
            "norm": "ln_f",
        },
        outputs_first=False,
        fused=True,
    ),
    Bert: _Layout(
        "bert.",
        {
            "token_embedding": "embeddings.word_embeddings",
            "position_embedding": "embeddings.position_embeddings",
            "type_embedding": "embeddings.token_type_embeddings",
            "norm": "embeddings.LayerNorm",
            "layer/query": "encoder.layer.{}.attention.self.query",
            "layer/key": "encoder.layer.{}.attention.self.key",
            "layer/value": "encoder.layer.{}.attention.self.value",
            "layer/out": "encoder.layer.{}.attention.output.dense",
            "layer/norm1": "encoder.layer.{}.attention.output.LayerNorm",
            "layer/up": "encoder.layer.{}.intermediate.dense",
            "layer/down": "encoder.layer.{}.output.dense",
            "layer/norm2": "encoder.layer.{}.output.LayerNorm",
            "pooler": "pooler.dense",
            "head": "classifier",
        },
    ),
    ViT: _Layout(
        "vit.",
        {
            "class_token": "embeddings.cls_token",
            "patch_embedding": "embeddings.patch_embeddings.projection",
            "position_embedding/embedding": "embeddings.position_embeddings",
            "layer/norm1": "encoder.layer.{}.layernorm_before",
            "layer/query": "encoder.layer.{}.attention.attention.query",
            "layer/key": "encoder.layer.{}.attention.attention.key",
            "layer/value": "encoder.layer.{}.attention.attention.value",
            "layer/out": "encoder.layer.{}.attention.output.dense",
            "layer/norm2": "encoder.layer.{}.layernorm_after",
            "layer/up": "encoder.layer.{}.intermediate.dense",
            "layer/down": "encoder.layer.{}.output.dense",
            "norm": "layernorm",
            "head": "classifier",
        },
        leading={"class_token": 2, "position_embedding": 1},
    ),
}
_ENDS = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_OLD_ENDS = {"scale": "gamma", "bias": "beta"}  # old names of BERT's `LayerNorm` parameters, still in its files
_STACKED = "layers/"  # begins the paths of parameters that hold all layers
_FUSED = ("query", "key", "value")


def load(path: str | os.PathLike[str], model: nn.Module, params: Any) -> Any:
    """The parameters of a model, from a file of published weights.

    Args:
      path: of a safetensors file with weights of GPT-2 (for a `Decoder`), BERT (`Bert`) or ViT (`ViT`).
      model: what they are for, of the sizes of the published network, scanned or not.
      params: its parameters or their shapes, `jax.eval_shape(model.init, key, x)["params"]`.

    Returns:
      The same tree, of arrays in the types of `params`. Tensors that the model has no use for are left out.

    Raises:
      ValueError: if there is no such file, it is something else, a tensor is missing or of another shape, or it has
        more layers than the model.
    """
    with _opened(path, model) as file:
        file.check_depth(model.layers)
        return jax.tree_util.tree_map_with_path(lambda keys, leaf: file.parameter(path_string(keys), leaf), params)


def save(path: str | os.PathLike[str], source: str | os.PathLike[str], model: nn.Module, params: Any) -> None:
    """Write a copy of a file of published weights with new values of some parameters, atomically.

    Names, shapes, types and metadata stay, and so do tensors that hold none of these parameters.

    Args:
      path: of the new file.
      source: of the file with the published weights.
      model: as for `load`.
      params: the parameters, or a tree of some of them.

    Raises:
      ValueError: as `load` does.
      OSError: if the new file cannot be written.
    """
    with _opened(source, model) as file:
        tensors = {name: np.array(file.opened.get_tensor(name)) for name in file.opened.keys()}  # noqa: SIM118
        metadata = file.opened.metadata()
        for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
            for part, value in _separately(path_string(keys), np.asarray(leaf)):
                name, form = file.found(part, value.shape)
                form(tensors[name])[...] = value  # a form is a view of the tensor, the parameter's place in it
    content = safetensors.numpy.save(tensors, metadata)
    write_atomically(pathlib.Path(path), lambda file: file.write(content))


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], model: nn.Module) -> Iterator["_File"]:
    layout = next((layout for kind, layout in _LAYOUTS.items() if isinstance(model, kind)), None)
    if layout is None:
        known = ", ".join(kind.__name__ for kind in _LAYOUTS)
        raise ValueError(f"no published weights are known for {type(model).__name__}, only for {known}")
    try:
        with safetensors.safe_open(path, "numpy") as opened:
            yield _File(os.fspath(path), opened, layout)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{os.fspath(path)} cannot be read as a safetensors file: {error}") from error


class _File(NamedTuple):
    """An open file, and how its tensors are named."""

    path: str
    opened: Any
    layout: _Layout

    def check_depth(self, layers: int) -> None:
        """Refuse a file with a deeper network."""
        if self._name(f"layer{layers + 1}/norm1/scale"):
            raise ValueError(f"{self.path} has more layers than the model, which has {layers}")

    def parameter(self, path: str, like: Any) -> jax.Array:
        """The parameter at `path`, of the shape and type of `like`."""
        parts = [self._value(part, shape.shape) for part, shape in _separately(path, np.broadcast_to(0, like.shape))]
        return jnp.asarray(np.stack(parts) if path.startswith(_STACKED) else parts[0], like.dtype)

    def _value(self, path: str, shape: Shape) -> np.ndarray:
        name, form = self.found(path, shape)
        return form(self.opened.get_tensor(name))

    def found(self, path: str, shape: Shape) -> tuple[str, _Form]:
        """The name of a parameter's tensor, which is of the right shape, and the parameter as a view of it."""
        stored_shape, form = _form(self.layout, path, shape)
        name, wanted = self._name(path), f"{path} of the model, {shape}, takes one of shape {stored_shape}"
        if name is None:
            names = " or ".join(_names(self.layout, path)) or "for it"
            raise ValueError(f"{self.path} has no tensor {names}: {wanted}")
        found = tuple(self.opened.get_slice(name).get_shape())
        if found != stored_shape:
            raise ValueError(f"{self.path} has a tensor {name} of shape {found}: {wanted}")
        return name, form

    def _name(self, path: str) -> str | None:
        """The name of a parameter's tensor in this file; None if there is none."""
        there, prefix = self.opened.keys(), self.layout.prefix
        named = (name for plain in _names(self.layout, path) for name in (prefix + plain, plain))
        return next((name for name in named if name in there), None)


def _separately(path: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """A parameter, or the parameters of all layers that are stacked in it, each with its path."""
    if not path.startswith(_STACKED):
        return [(path, value)]
    return [(path.replace("layers", f"layer{i + 1}", 1), part) for i, part in enumerate(value)]


def _names(layout: _Layout, path: str) -> list[str]:
    """Possible names of a parameter's tensor, without a prefix; empty if the architecture does not have it."""
    layer = re.match(r"layer(\d+)/", path)
    number = int(layer[1]) - 1 if layer else 0
    key = path.replace(layer[0], "layer/", 1) if layer else path
    module, _, leaf = key.rpartition("/")
    if key in layout.names:
        return [layout.names[key].format(number)]
    if module not in layout.names:
        return []
    name = layout.names[module].format(number)
    ends = [_ENDS[leaf], _OLD_ENDS[leaf]] if name.endswith("LayerNorm") else [_ENDS[leaf]]
    return [f"{name}.{end}" for end in ends]


def _form(layout: _Layout, path: str, shape: Shape) -> tuple[Shape, _Form]:
    """The shape of the tensor that a parameter of `shape` is stored in, and the parameter as a view of it."""
    *above, leaf = path.split("/")
    module = above[-1] if above else leaf
    if layout.fused and module in _FUSED:
        third = _FUSED.index(module)
        return (*shape[:-1], 3 * shape[-1]), lambda tensor: np.split(tensor, 3, axis=-1)[third]
    if module in layout.leading:
        return (1,) * layout.leading[module] + shape, lambda tensor: tensor.reshape(shape)
    if leaf == "kernel" and len(shape) == 4:
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width), lambda tensor: tensor.transpose(2, 3, 1, 0)
    if leaf == "kernel" and layout.outputs_first:
        return shape[::-1], np.transpose
    return shape, lambda tensor: tensor
