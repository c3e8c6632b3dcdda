"""Click prediction on Criteo with 20 x 20 blocks in the first layer: a part of Table 2 and of Figure 5.

    python -m experiments.data.criteo prepare --input train.txt --output path/to/criteo
    python -m experiments.main --config=configs/criteo_block20.py --config.data.local=path/to/criteo
    python -m experiments.compare --config=configs/criteo_block20.py --config.data.local=path/to/criteo --seeds=3

Set the sparsity by `--config.sparsifier.sparsity=0.97`; Figure 5 also has `--config.sparsifier.block='(1,1)'`.

Learning rate, batch size and epochs are the paper's (section 4); nothing was tuned here.

Validation loss in the paper, mean of three runs (dense 0.4489):

    sparsity                  0.90   0.95   0.97   0.98   0.99
    magnitude               0.4923 0.4998 0.5079 0.5447 0.5482
    PowerPropagation        0.4920 0.4946 0.5093 0.5379 0.5425
    ACDC                    0.4829 0.4961 0.5056 0.5184 0.5427
    SequentialAttention++   0.4596 0.4715 0.4865 0.5162 0.5253
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.criteo(block=20)
