"""Click prediction on a sample of Criteo's rows: the whole Criteo experiment in a minute.

    python -m experiments.data.criteo prepare --input sample.tsv.gz --output path/to/sample \
        --train 0.8 --validation 0.19 --test 0.01 --order chronological --minimum_count 20 --numeric_minimum_count 20
    python -m experiments.compare --config=configs/criteo_sample.py --config.data.local=path/to/sample --seeds=3

For about 10,000 rows: more passes over this few only overfit. Batch size, learning rate and passes were chosen by the
loss on the last fifth of the first 8,000 rows, none of which is used below. Dense, 3 seeds, on all of the last fifth
(--validation 0.1999 --test 0.0001): AUC 0.744 ± 0.002, loss 0.4713 ± 0.0010; a logistic regression on hashed features
gives 0.734 and 0.4708. At 90% of the first layer: magnitude 0.719, ACDC 0.720, PowerPropagation 0.715, SA++ 0.713,
gradual magnitude 0.725, random 0.734.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.criteo(block=10)
    config.name = "criteo_sample"
    config.epochs = 3.0
    config.batch_size = 64
    config.eval_batch_size = 1000
    config.log_every = 25
    config.eval_every = 125
    config.checkpoint_every = 125
    config.dense_twin = True
    config.optimizer.learning_rate = 1e-3
    return config
