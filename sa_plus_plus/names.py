"""What the path of a leaf says about it: the naming conventions of flax, Haiku, Equinox, Keras and PyTorch."""

import functools
import re

INPUT_PROJECTIONS = ("query", "key", "value", "q", "k", "v")  # attention: one input axis, heads and their size out
OUTPUT_PROJECTIONS = ("out", "attention_output", "output", "o")  # attention: heads and their size in, one axis out
BIASES = ("bias", "b")
BIASES_AND_SCALES = (*BIASES, "scale", "offset", "gamma", "beta")  # leaves of one axis, if layers are not stacked

OUTPUTS_BEFORE_INPUTS = "outputs before inputs"  # the order of transposed convolutions in Keras and Haiku
TRANSPOSED = (OUTPUTS_BEFORE_INPUTS, "named")  # what `transposition` returns for layers whose names say so
_EMBEDDING = re.compile(
    r".*(embed|embeds|embedder|embedding|embeddings|wte|wpe)(_?\d+)?"
    r"|embed_(tokens|positions|in)|relative_(position|attention)_bias(_table)?"  # of transformers and torchvision
)
_LEARNED_INPUT = re.compile(r"(.*_)?(tokens?|latents?)")  # `cls_token`, `reg_tokens`: they join a sequence
_BIAS = re.compile(r"(.*_)?bias(es)?(_.*)?")  # `q_bias`, `attention_biases`
_COLLECTIONS = ("batch_stats", "cache", "intermediates", "opt_state")  # not trained; moments have the kernels' shapes
_WEIGHT = re.compile(r"(^|_)weight(_|\d|$)")
_WORD = re.compile(r"(^|_)(kernel|weights?|w)(?=_|\d|$)", re.IGNORECASE)  # in the name of a matrix, where a bias has b
_CONVOLUTION = re.compile(r"Conv_\d+|conv([123])_?d(_\d+)?")  # as linen, Keras and Haiku number them
_OUTPUTS_BEFORE_INPUTS = re.compile(r"conv[123]_?d_transpose(_\d+)?")  # the same of Keras and Haiku
_TRANSPOSED = re.compile(r"transpose|deconv|conv_?t($|[_\d])|(^|_)tconv|upconv", re.IGNORECASE)
_UPWARDS = re.compile(r"(^|_)(up|upsampl\w*|upscal\w*|decod\w*|generat\w*)(_?\d+)?($|_)", re.IGNORECASE)


def split_path(path: str) -> list[str]:
    """The keys of a path, also where they are joined by dots as in PyTorch's files.

    Args:
      path: of a leaf, keys joined by `/` or `.`.

    >>> split_path("layers.0.dense/weight")
    ['layers', '0', 'dense', 'weight']
    """
    return re.split(r"[/.]", path)


def named_as_kernel(path: str) -> bool:
    """The default predicate: false if a leaf's path shows that it is not a kernel, by the names in flax and others.

    That is, embeddings and everything below them (`wte/embedding`, `pos_embed`), learned tokens (`cls_token`), biases
    (`attention_biases`) and norm scales, low-rank factors (`lora_a`), and collections of a flax model's variables other
    than its parameters (`batch_stats`).

    Biases and scales can be 2-D: an attention layer's biases per head, or those stacked by `nn.scan`.

    Args:
      path: of the leaf, keys joined by `/`.
    """
    return not non_kernel_kind(path)


def non_kernel_kind(path: str) -> str:
    """What a leaf is instead of a kernel, if its path says so: "embedding", "bias"; empty if it may be a kernel.

    Args:
      path: of the leaf, keys joined by `/`.
    """
    *above, name = split_path(path.lower())
    if "embed" in name or _LEARNED_INPUT.fullmatch(name) or any(_EMBEDDING.fullmatch(key) for key in (*above, name)):
        return "embedding"
    if above and above[0] in _COLLECTIONS:
        return f"not trained: {above[0]}"
    if any(key.startswith("lora_") for key in (*above, name)):
        return "low-rank factor"
    if _BIAS.fullmatch(name) and not _WORD.search(name):
        return "bias"
    return name if name in ("scale", "offset", "gamma", "beta") else ""


@functools.cache
def bias_names(name: str) -> list[str]:
    """Names that the bias of a leaf may have in the same module, the most likely first.

    Args:
      name: the last key of the leaf's path.

    >>> bias_names("weight_ih_l0")
    ['bias_ih_l0', 'b_ih_l0']
    """
    return [_WORD.sub(rf"\g<1>{bias}", name, count=1) for bias in BIASES if _WORD.search(name)]


def is_weight(name: str) -> bool:
    """Whether a leaf is called `weight`, as in PyTorch and Equinox, which store outputs first.

    Args:
      name: the last key of the leaf's path.
    """
    return bool(_WEIGHT.search(name))


def is_plain_convolution(module: str, name: str) -> bool:
    """Whether a kernel has a framework's default name for a plain convolution, neither depthwise nor transposed.

    Args:
      module: the last key but one of its path.
      name: the last.
    """
    return bool(_CONVOLUTION.fullmatch(module)) or "pointwise" in name.lower()


def filter_axes(module: str) -> int | None:
    """The number of axes of a convolution's filters, if a framework has named it by that.

    Args:
      module: the last key but one of its kernel's path.

    >>> filter_axes("conv2d_3")
    2
    """
    found = _CONVOLUTION.fullmatch(module)
    return int(found[1]) if found and found[1] else None


def is_depthwise(module: str, name: str) -> bool:
    """Whether a kernel's name, or its module's, says that it is depthwise.

    Args:
      module: the last key but one of its path.
      name: the last.
    """
    return "depthwise" in name.lower() or ("depthwise" in module.lower() and "pointwise" not in name.lower())


def transposition(path: str) -> str:
    """Whether a convolution may be a transposed one: `OUTPUTS_BEFORE_INPUTS`, `"named"`, `"possible"` or empty.

    It is not if the layer is called a convolution, and nothing around it is called a decoder or the like.

    Args:
      path: of its kernel.
    """
    *above, name = ["", *split_path(path)]
    module = above[-1]
    if is_plain_convolution(module, name):
        return ""
    if _TRANSPOSED.search(module) or _TRANSPOSED.search(name):
        return OUTPUTS_BEFORE_INPUTS if name == "w" or _OUTPUTS_BEFORE_INPUTS.fullmatch(module) else "named"
    layer = next((key for key in (name, *reversed(above)) if not key.isdigit() and key not in ("kernel", "w")), "")
    plain = "conv" in layer.lower() and not any(_UPWARDS.search(key) or _TRANSPOSED.search(key) for key in above)
    return "" if plain else "possible"
