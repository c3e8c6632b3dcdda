"""ResNet-50 on ImageNet with 32 x 32 blocks: a column of Table 1, and of Tables 3 and 4.

    python -m experiments.main --config=configs/resnet50_block32.py --config.sparsifier.sparsity=0.9
    python -m experiments.main --config=configs/resnet50_block32.py --config.sparsifier.name=acdc
    python -m experiments.main --config=configs/resnet50_block32.py --config.sparsifier.sparsification=False  # Table 3
    python -m experiments.main --config=configs/resnet50_block32.py --config.sparsifier.exponent=2.0  # Table 4: 2, 4, 8

Learning rate, batch size and epochs are the paper's (sections 4 and C.1); nothing was tuned here.

The data: `--config.data.local` or TensorFlow Datasets, see docs/experiments.md. Hours on eight accelerators are
90 * 1,281,167 / (images per second) / 3600: eleven at 3,000 images per second altogether.

Top-1 in the paper, in percent (dense 76.90; - diverged):

    target sparsity            70     80     90     95
    sparsity of the network  68.00  78.00  88.00  92.00
    SequentialAttention++    74.82  73.78  70.82  65.41
    without sparsification   74.27  73.35  70.08  61.41
    ACDC                     74.40  72.39  68.96  63.03

    exponent at 90%             2      4      8
    SequentialAttention++    70.61  70.82  70.98
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    return common.imagenet(block=32)
