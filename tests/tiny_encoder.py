"""A published encoder of random weights, as the files of such are laid out, and text of its words."""

import json
import math
import pathlib

import numpy as np
import safetensors.numpy
import tokenizers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
ABOUT = {
    **{
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "layer_norm_eps": 1e-12,
    },
    **{"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128},
    **{"type_vocab_size": 2, "position_embedding_type": "absolute"},
}
LINES = [" ".join(np.random.default_rng(i).choice(WORDS[4:], 3 + i % 7)) for i in range(200)]


def write(path: pathlib.Path) -> pathlib.Path:
    """Write its files to a directory."""
    (path / "config.json").write_text(json.dumps(ABOUT))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(WORDS, range(30), strict=True)), "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path / "tokenizer.json"))
    rng, width, hidden = np.random.default_rng(0), 16, 32
    tables = {"word_embeddings": 30, "position_embeddings": 128, "token_type_embeddings": 2}
    shapes = {f"embeddings.{name}.weight": (n, width) for name, n in tables.items()}
    norms = ["embeddings.LayerNorm"]
    for i in range(4):
        layer = f"encoder.layer.{i}"
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
        dense = {f"attention.self.{n}": (width, width) for n in ("query", "key", "value")}
        dense |= {"attention.output.dense": (width, width), "intermediate.dense": (hidden, width)}
        for name, shape in (dense | {"output.dense": (width, hidden)}).items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    tensors = {name: rng.normal(size=shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    for name in norms:
        tensors |= {f"{name}.weight": rng.uniform(0.5, 1.5, width), f"{name}.bias": rng.normal(size=width) / 5}
    tensors = {name: np.asarray(a, np.float32) for name, a in tensors.items()}
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path
