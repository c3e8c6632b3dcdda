"""Directories of published transformers, as transformers and sentence-transformers write them: what is in them."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import safetensors

from sa_plus_plus.contrib.transformers.encoder import Bert
from sa_plus_plus.contrib.transformers.transformer import Decoder, ViT

CONFIG, WEIGHTS, IMAGES = "config.json", "model.safetensors", "preprocessor_config.json"
_OTHER_WEIGHTS = {  # files that hold them where there is no model.safetensors, and what to do
    "model.safetensors.index.json": "has its weights in several files: write one by `model.save_pretrained(directory, "
    'max_shard_size="100GB")` in transformers',
    "pytorch_model.bin": "has its weights in PyTorch's format alone: load it in transformers and write it by "
    "`model.save_pretrained(directory)`, which makes a model.safetensors",
}
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class Published(NamedTuple):
    """A published transformer.

    Attributes:
      folder: its directory.
      inner: the directory with `config.json` and `model.safetensors`; `folder`, or one in it.
      model: the module; of BERT without a classifier.
      pooling: for sentence embeddings, `"mean"` of the tokens or `"cls"`, the first; `""` if no pooling is named.
      normalised: whether embeddings are scaled to length 1.
      length: number of tokens that longer sentences are cut to; 0 if none is named.
      image: height and width in pixels, and channels, of ViT's inputs; empty for text.
    """

    folder: pathlib.Path
    inner: pathlib.Path
    model: Any
    pooling: str = ""
    normalised: bool = False
    length: int = 0
    image: tuple[int, ...] = ()

    @property
    def config(self) -> pathlib.Path:
        return self.inner / CONFIG

    @property
    def weights(self) -> pathlib.Path:
        return self.inner / WEIGHTS


class _Kind(NamedTuple):
    """How an architecture is described in `config.json`.

    Attributes:
      module: its class.
      sizes: keys of what the module's attributes are called here.
      activation: key of the name of the activation function, and what it is if there is none.
      required: values that other keys must have where they are there: all that is built.
    """

    module: type[nn.Module]
    sizes: Mapping[str, str]
    activation: tuple[str, str] = ("hidden_act", "gelu")
    required: Mapping[str, Any] = {}


_ENCODER = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "heads": "num_attention_heads",
    "epsilon": "layer_norm_eps",
}
_KINDS = {
    "bert": _Kind(
        Bert,
        {**_ENCODER, "vocabulary": "vocab_size", "types": "type_vocab_size", "context": "max_position_embeddings"},
        required={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    ),
    "gpt2": _Kind(
        Decoder,
        {
            "layers": "n_layer",
            "width": "n_embd",
            "heads": "n_head",
            "vocabulary": "vocab_size",
            "context": "n_positions",
            "epsilon": "layer_norm_epsilon",
        },
        activation=("activation_function", "gelu_new"),
        required={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
    ),
    "vit": _Kind(ViT, {**_ENCODER, "patch": "patch_size"}, required={"qkv_bias": True}),
}
_APPROXIMATE = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}  # by the activation's name


def read(path: str | os.PathLike[str]) -> Published:
    """What is in a directory of a published transformer.

    Args:
      path: of the directory.

    Raises:
      FileNotFoundError: if there is no such directory, or a file is missing.
      ValueError: if a file cannot be read, or the network is none of these: BERT, GPT-2 or ViT with GELU; embeddings by
        the mean of the tokens or by the first.
    """
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no directory: give that of a published transformer; nothing is downloaded here, but by "
            "`hf download NAME --local-dir DIRECTORY` of huggingface_hub"
        )
    modules = _modules(folder)
    inner = folder / modules.get("Transformer", "")
    for name in (CONFIG, WEIGHTS):
        if not (inner / name).is_file():
            raise FileNotFoundError(_without(inner, name))
    about = json_of(inner / CONFIG)
    pooling = folder / modules.get("Pooling", "1_Pooling") / "config.json"
    sentences = folder / "sentence_bert_config.json"
    length = json_of(sentences).get("max_seq_length") if sentences.is_file() else None
    published = Published(
        folder,
        inner,
        module_of(inner / CONFIG),
        _pooling(pooling) if pooling.is_file() else "",
        "Normalize" in modules,
        length if isinstance(length, int) else 0,
    )
    if not isinstance(published.model, ViT):
        return published
    size = about.get("image_size")
    sides = size if isinstance(size, list) else [size, size]
    if not all(isinstance(side, int) for side in sides):
        raise ValueError(f"{inner / CONFIG} has no number 'image_size'")
    classes = _length_of(inner / WEIGHTS, "classifier.bias")
    image = (*sides, about.get("num_channels", 3))
    return published._replace(model=published.model.clone(classes=classes), image=image)


def module_of(file: pathlib.Path) -> Any:
    """The module that a `config.json` describes: without a classifier, or of ViT with that of its default.

    Args:
      file: the `config.json`.

    Raises:
      ValueError: if it cannot be read, or is of an architecture or with options that are not built here.
    """
    about = json_of(file)
    name = about.get("model_type")
    if name not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise ValueError(f"{file} has model_type {name!r}; the architectures that are supported are {known}")
    kind = _KINDS[name]
    for key, wanted in kind.required.items():
        if (found := about.get(key, wanted)) != wanted:
            raise ValueError(f"{file} has {key} {found!r}; only {wanted!r} is supported")
    key, default = kind.activation
    if (activation := about.get(key, default)) not in _APPROXIMATE:
        known = " or ".join(map(repr, _APPROXIMATE))
        raise ValueError(f"{file} has {key} {activation!r}; only {known} is supported")
    for key in kind.sizes.values():
        if isinstance(about.get(key), bool) or not isinstance(about.get(key), int | float):
            raise ValueError(f"{file} has no number {key!r}")
    sizes = {here: about[there] for here, there in kind.sizes.items()}
    if kind.module is Decoder:
        sizes["hidden"] = about.get("n_inner") or 4 * sizes["width"]
    elif kind.module is Bert:
        sizes["classes"] = 0
    return kind.module(approximate=_APPROXIMATE[activation], **sizes)


def json_of(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      file: its path.

    Raises:
      ValueError: if it cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold an object, and holds {type(content).__name__}")
    return content


def _modules(folder: pathlib.Path) -> dict[str, str]:
    """The folder of each module of a sentence-transformers model, by its class; empty if it is no such model."""
    file = folder / "modules.json"
    if not file.is_file():
        return {}
    try:
        listed = json.loads(file.read_text())
        modules = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in listed}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} cannot be read as a list of modules: {error!r}") from error
    known = ("Transformer", "Pooling", "Normalize")
    if other := next((name for name in modules if name not in known), None):
        raise ValueError(f"{file} has a module {other}; those that are supported are {', '.join(known)}")
    return modules


def _pooling(file: pathlib.Path) -> str:
    about = json_of(file)
    named = about.get("pooling_mode")  # of newer versions
    modes = [key for key, value in about.items() if key.startswith("pooling_mode_") and value is True]
    found = [named] if isinstance(named, str) else [_POOLINGS.get(key, key) for key in modes]
    if len(found) != 1 or found[0] not in _POOLINGS.values():
        asked = " and ".join(map(str, found)) or "none"
        raise ValueError(
            f"{file} asks for the pooling {asked}; supported are the mean of all tokens and the first token"
        )
    return found[0]


def _without(folder: pathlib.Path, name: str) -> str:
    """What to say of a directory that lacks a file."""
    if name == WEIGHTS:
        for other, remedy in _OTHER_WEIGHTS.items():
            if (folder / other).is_file():
                return f"{folder} {remedy}"
    return f"{folder} is no directory of a published transformer: it has no file {name}"


def _length_of(file: pathlib.Path, name: str) -> int:
    """The length of a vector in a file of weights; 0 if it has none of this name."""
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            return opened.get_slice(name).get_shape()[0] if name in opened.keys() else 0  # noqa: SIM118 - not a dict
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as a safetensors file: {error}") from error
