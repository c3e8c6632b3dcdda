"""Click prediction on Criteo with 5 x 5 blocks in the first layer: a part of Table 2 and of Figure 5.

    python -m experiments.data.criteo prepare --input train.txt --output path/to/criteo
    python -m experiments.main --config=configs/criteo_block5.py --config.data.local=path/to/criteo
    python -m experiments.compare --config=configs/criteo_block5.py --config.data.local=path/to/criteo --seeds=3

Set the sparsity by `--config.sparsifier.sparsity=0.97`; Figure 5 also has `--config.sparsifier.block='(1,1)'`.

Learning rate, batch size and epochs are the paper's (section 4); nothing was tuned here.

Validation loss in the paper, mean of three runs (dense 0.4489):

    sparsity                  0.90   0.95   0.97   0.98   0.99
    magnitude               0.4523 0.4586 0.4656 0.4717 0.4881
    PowerPropagation        0.4521 0.4547 0.4587 0.4622 0.5017
    ACDC                    0.4517 0.4547 0.4606 0.4692 0.5050
    SequentialAttention++   0.4515 0.4540 0.4570 0.4601 0.4803
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.criteo(block=5)
