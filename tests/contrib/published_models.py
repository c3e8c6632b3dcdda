"""Tiny published transformers of random weights, laid out as transformers and sentence-transformers write them."""

import functools
import json

import numpy as np
import safetensors.numpy
import tokenizers

WIDTH, HIDDEN, LAYERS, VOCABULARY, CONTEXT = 16, 32, 1, 30, 16
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
LINES = [" ".join(np.random.default_rng(i).choice(WORDS[4:], 3 + i % 9)) for i in range(120)]
ENCODER = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
CONFIGS = {
    "bert": ENCODER
    | {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "type_vocab_size": 2, "pad_token_id": 0}
    | {"architectures": ["BertModel"]},
    "gpt2": {
        **{"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 2, "n_positions": CONTEXT, "n_inner": HIDDEN},
        **{"vocab_size": VOCABULARY, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
        **{"bos_token_id": 0, "eos_token_id": 0, "architectures": ["GPT2LMHeadModel"]},
    },
    "vit": ENCODER
    | {"image_size": 8, "patch_size": 4, "num_channels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}}
    | {"label2id": {"a": 0, "b": 1, "c": 2}, "architectures": ["ViTForImageClassification"]},
}
_ENCODER_KERNELS = {
    "attention.output.dense": (WIDTH, WIDTH),
    "intermediate.dense": (HIDDEN, WIDTH),
    "output.dense": (WIDTH, HIDDEN),
}
KERNELS = {  # of a layer: shapes as they are stored
    "bert": {f"attention.self.{n}": (WIDTH, WIDTH) for n in ("query", "key", "value")} | _ENCODER_KERNELS,
    "vit": {f"attention.attention.{n}": (WIDTH, WIDTH) for n in ("query", "key", "value")} | _ENCODER_KERNELS,
    "gpt2": {
        "attn.c_attn": (WIDTH, 3 * WIDTH),
        "attn.c_proj": (WIDTH, WIDTH),
        "mlp.c_fc": (WIDTH, HIDDEN),
        "mlp.c_proj": (HIDDEN, WIDTH),
    },
}
LAYER = {"bert": "encoder.layer.{}.", "vit": "vit.encoder.layer.{}.", "gpt2": "transformer.h.{}."}
_NORMS = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "vit": ("layernorm_before", "layernorm_after"),
    "gpt2": ("ln_1", "ln_2"),
}
_OTHERS = {
    "bert": {
        "embeddings.word_embeddings.weight": (VOCABULARY, WIDTH),
        "embeddings.position_embeddings.weight": (CONTEXT, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "pooler.dense.weight": (WIDTH, WIDTH),
        "pooler.dense.bias": (WIDTH,),
    },
    "vit": {
        "vit.embeddings.cls_token": (1, 1, WIDTH),
        "vit.embeddings.position_embeddings": (1, 5, WIDTH),
        "vit.embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 4, 4),
        "vit.embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "classifier.weight": (3, WIDTH),
        "classifier.bias": (3,),
    },
    "gpt2": {
        "transformer.wte.weight": (VOCABULARY, WIDTH),
        "transformer.wpe.weight": (CONTEXT, WIDTH),
    },
}
_OTHER_NORMS = {"bert": "embeddings.LayerNorm", "vit": "vit.layernorm", "gpt2": "transformer.ln_f"}


@functools.cache
def tensors(kind, layers=LAYERS):
    """The tensors of an architecture by name."""
    shapes, norms = dict(_OTHERS[kind]), [_OTHER_NORMS[kind]]
    for i in range(layers):
        layer = LAYER[kind].format(i)
        norms += [layer + name for name in _NORMS[kind]]
        for name, shape in KERNELS[kind].items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": (shape[kind == "gpt2"],)}
    rng = np.random.default_rng(0)
    found = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    for name in norms:
        found |= {f"{name}.weight": rng.uniform(0.5, 1.5, WIDTH), f"{name}.bias": rng.normal(0, 0.2, WIDTH)}
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def write(folder, kind, dtype=np.float32, pooling=None, layers=LAYERS, **changes):
    """Write a directory; with a pooling, that of a sentence-transformers model."""
    folder.mkdir(parents=True, exist_ok=True)
    depth = {"n_layer" if kind == "gpt2" else "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **CONFIGS[kind], **depth, **changes}))
    stored = {name: x.astype(dtype) for name, x in tensors(kind, layers).items()}
    safetensors.numpy.save_file(stored, folder / "model.safetensors", {"format": "pt"})
    if kind == "vit":
        size = {"height": 8, "width": 8}
        about = {"do_resize": True, "size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
        (folder / "preprocessor_config.json").write_text(json.dumps(about))
        return folder
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(WORDS, range(30), strict=True)), "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if kind == "bert":
        tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    if pooling:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(kinds.items())
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
        for name in ("1_Pooling", "2_Normalize"):
            (folder / name).mkdir(exist_ok=True)
        modes = {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens")}
        about = {"word_embedding_dimension": WIDTH, **modes}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(about))
    return folder
