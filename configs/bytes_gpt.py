"""A small GPT on bytes: the sources of Python's standard library, or any text.

    python -m experiments.main --config=configs/bytes_gpt.py
    python -m experiments.main --config=configs/bytes_gpt.py --config.data.local=path/to/text
    python -m experiments.compare --config=configs/bytes_gpt.py --config.steps=600 --seeds=1

Blocks of 16 x 16 of the attention and feed-forward kernels are pruned; the embeddings, one of which is also the output
kernel, are not. The metric is bits per byte, lower is better, on held-out files; `local` may be a text file, whose end
is held out, or a folder of text files. Results are comparable only within one version of Python, or one text.
It takes half an hour on two cores of an older processor (Zen 3), less on newer ones. Nothing was tuned.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.experiment("bytes_gpt")
    config.task = "language_modelling"
    config.data = common.dataset("text", context=128, held_out=0.05)
    config.model = "Decoder"
    config.model_options = ConfigDict(
        {
            "layers": 4,
            "width": 256,
            "hidden": 1024,
            "heads": 4,
            "dropout": 0.0,
            "scan": False,  # True: a loop over stacked parameters
            "dtype": "float32",
        }
    )
    config.steps = 1500
    config.batch_size = 32
    config.eval_batch_size = 64
    config.log_every = 50
    config.dense_twin = False
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 100
    config.sparsifier.block = (16, 16)
    return config
