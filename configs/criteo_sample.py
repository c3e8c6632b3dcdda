"""Click prediction on a sample of Criteo's rows: the whole of the Criteo experiment in a minute.

    python -m experiments.data.criteo prepare --input sample.tsv.gz --output path/to/sample \
        --train 0.8 --validation 0.19 --test 0.01 --order chronological --minimum_count 20 --numeric_minimum_count 20
    python -m experiments.compare --config=configs/criteo_sample.py --config.data.local=path/to/sample --seeds=3

For some 10,000 rows: more passes over so few only overfit.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.criteo(block=10)
    config.name = "criteo_sample"
    config.epochs = 4.0
    config.batch_size = 512
    config.eval_batch_size = 1000
    config.log_every = 5
    config.eval_every = 16
    config.checkpoint_every = 32
    config.dense_twin = True
    config.optimizer.learning_rate = 5e-3
    return config
