"""Click data with a known answer: the features whose blocks should survive are planted.

    python -m experiments.main --config=configs/planted.py --config.sparsifier.sparsity=0.98
    python -m benchmarks.planted

A million rows are generated in seconds. The second command runs every algorithm and measures how many of its kept
blocks are on the planted rows. As far as is known, the learning rate and the number of steps were chosen on the
held-out rows that it reports.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.criteo(block=10)
    config.name = "planted"
    config.data = common.dataset("planted", rows=1_000_000, held_out=100_000, informative=12, categories=200, seed=0)
    config.model_options.widths = (400,)
    config.epochs = 0.0
    config.steps = 800
    config.batch_size = 1024
    config.eval_batch_size = 10_000
    config.log_every = 20
    config.eval_every = 400
    config.checkpoint_every = 400
    config.optimizer.learning_rate = 5e-3
    return config
