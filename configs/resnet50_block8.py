"""ResNet-50 on ImageNet with 8 x 8 blocks: a column of Table 1, and of Tables 3 and 4.

    python -m experiments.main --config=configs/resnet50_block8.py --config.sparsifier.sparsity=0.9
    python -m experiments.main --config=configs/resnet50_block8.py --config.sparsifier.name=acdc
    python -m experiments.main --config=configs/resnet50_block8.py --config.sparsifier.sparsification=False  # Table 3
    python -m experiments.main --config=configs/resnet50_block8.py --config.sparsifier.exponent=2.0  # Table 4: 2, 4, 8

Learning rate, batch size and epochs are the paper's (sections 4 and C.1); nothing was tuned here.

The data: `--config.data.local` or TensorFlow Datasets, see docs/experiments.md. Hours on eight accelerators are
90 * 1,281,167 / (images per second) / 3600: eleven at 3,000 images per second altogether.

Top-1 in the paper, in percent (dense 76.90; - diverged):

    target sparsity            70     80     90     95
    sparsity of the network  70.00  80.00  90.00  95.00
    SequentialAttention++    74.14  72.90  69.56    -
    without sparsification   74.19  72.33  68.15    -
    ACDC                     74.11  72.47  67.74    -

    exponent at 90%             2      4      8
    SequentialAttention++    69.40  69.56  69.20
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.imagenet(block=8)
