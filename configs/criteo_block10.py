"""Click prediction on Criteo with 10 x 10 blocks in the first layer: a part of Table 2 and of Figure 5.

    python -m experiments.data.criteo prepare --input train.txt --output path/to/criteo
    python -m experiments.main --config=configs/criteo_block10.py --config.data.local=path/to/criteo
    python -m experiments.compare --config=configs/criteo_block10.py --config.data.local=path/to/criteo --seeds=3

Set the sparsity by `--config.sparsifier.sparsity=0.97`; Figure 5 also has `--config.sparsifier.block='(1,1)'`.

Learning rate, batch size and epochs are the paper's (section 4); nothing was tuned here.

Validation loss in the paper, mean of three runs (dense 0.4489):

    sparsity                  0.90   0.95   0.97   0.98   0.99
    magnitude               0.4693 0.4892 0.5004 0.5145 0.5376
    PowerPropagation        0.4572 0.4768 0.5061 0.5158 0.5295
    ACDC                    0.4580 0.4754 0.4936 0.4929 0.5153
    SequentialAttention++   0.4535 0.4595 0.4708 0.4904 0.5068
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.criteo(block=10)
