"""PyTorch models run by JAX, as torchax makes them: how each layer's weights are read as matrices."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

_MATRIX = "o i -> i o"
_FILTERS = ("l", "h l", "d h l")  # the axes of a filter, by how many there are


def kernel_views(model: Any, params: Mapping[str, Any]) -> dict[str, str]:
    """How each layer's weights are read as matrices of inputs by outputs, from the layers' types instead of names:

        weights, fn = torchax.extract_jax(model)
        views = kernel_views(model, weights)
        sp = sapp.magnitude(block=16, sparsity=0.9, phases=phases, views=views, where=views.__contains__)

    Layers are `Linear`, convolutions and transposed convolutions over one to three axes, `MultiheadAttention`,
    recurrent layers and cells, and the `Conv1D` of transformers. Left out, and so dense with this `where`, are
    depthwise convolutions, transposed convolutions with groups, everything that is not a layer's weight, and weights
    that a layer shares with an embedding table.

    Args:
      model: a `torch.nn.Module`.
      params: arrays, or anything with `shape`, by their names in the model: all, or those to be trained.

    Returns:
      Text for `views`, by name.

    Raises:
      TypeError: if `model` is not a module.
      ValueError: if none of `params` is the weight of a layer, or a shape is not that in the model.
      ImportError: without PyTorch.
    """
    torch = _torch()
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"kernel_views takes a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.named_modules(remove_duplicate=False))
    tables = {id(m.weight) for _, m in modules if isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag)}
    views = {}
    for prefix, module in modules:
        for name, view in _weights(module):
            path, weight = f"{prefix}.{name}" if prefix else name, getattr(module, name, None)
            if path not in params or weight is None or id(weight) in tables:
                continue
            if tuple(params[path].shape) != tuple(weight.shape):
                raise ValueError(
                    f"{path} has the shape {tuple(params[path].shape)}, but {tuple(weight.shape)} in the model: "
                    "give the weights of this model"
                )
            views[path] = view
    if not views:
        raise ValueError(
            f"none of the {len(params)} arrays is the weight of a layer of this {type(model).__name__}: they begin "
            f"with {', '.join(list(params)[:3])}; give what torchax.extract_jax returns for this model"
        )
    return views


def _torch() -> Any:
    try:
        import torch  # noqa: PLC0415 - optional: only its users need it
    except ImportError as error:
        raise ImportError("views of PyTorch's layers need the package torch: pip install torch") from error
    return torch


def _weights(module: Any) -> Iterator[tuple[str, str]]:
    """The names of the weights that a module itself has, if it is a layer, each with its view."""
    nn = _torch().nn
    if isinstance(module, nn.Linear):
        yield "weight", _MATRIX
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        if module.groups == 1:
            yield "weight", _filters("i o", len(module.kernel_size))
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == 1 or module.groups < module.in_channels:
            yield "weight", _filters("o i", len(module.kernel_size))
    elif isinstance(module, nn.MultiheadAttention):
        yield from ((f"{name}_proj_weight", _MATRIX) for name in ("in", "q", "k", "v"))
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        names = [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_")]
        yield from ((name, _MATRIX) for name in names)
    elif isinstance(module, _transposed_linear()):
        yield "weight", "i o"


def _filters(channels: str, axes: int) -> str:
    return f"{channels} {_FILTERS[axes - 1]} -> ({_FILTERS[axes - 1]} i) o"


def _transposed_linear() -> tuple[type, ...]:
    """`Conv1D` of transformers, a linear layer stored the other way round; nothing if that is not in use."""
    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (found,) if found else ()
