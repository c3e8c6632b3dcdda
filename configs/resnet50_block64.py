"""ResNet-50 on ImageNet with 64 x 64 blocks: a column of Table 1, and of Tables 3 and 4.

    python -m experiments.main --config=configs/resnet50_block64.py --config.sparsifier.sparsity=0.9
    python -m experiments.main --config=configs/resnet50_block64.py --config.sparsifier.name=acdc
    python -m experiments.main --config=configs/resnet50_block64.py --config.sparsifier.sparsification=False  # Table 3
    python -m experiments.main --config=configs/resnet50_block64.py --config.sparsifier.exponent=2.0  # Table 4: 2, 4, 8

Learning rate, batch size and epochs are the paper's (sections 4 and C.1); nothing was tuned here.

The data: `--config.data.local` or TensorFlow Datasets, see docs/experiments.md. Hours on eight accelerators are
90 * 1,281,167 / (images per second) / 3600: eleven at 3,000 images per second altogether.

Top-1 in the paper, in percent (dense 76.90; - diverged):

    target sparsity            70     80     90     95
    sparsity of the network  58.00  66.00  74.00  79.00
    SequentialAttention++    75.53  74.52  72.76  70.30
    without sparsification   75.10  74.32  72.84  69.68
    ACDC                     75.18  74.49  71.95  67.36

    exponent at 90%             2      4      8
    SequentialAttention++    72.26  72.76  72.61
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.imagenet(block=64)
