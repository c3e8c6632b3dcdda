"""LeNet-300-100 on Fashion-MNIST.

    python -m experiments.main --config=configs/fashion_mnist.py --config.data.local=path/to/its/four/files
    python -m experiments.main --config=configs/fashion_mnist.py

The second command reads the data set as prepared by TensorFlow Datasets, and says what to do if it is missing. It takes
a minute on two CPU cores, dense twin included; 87.4% test accuracy at 90% sparsity with 4 x 4 blocks, 89.5% dense (seed
0). As far as is known, the learning rate and the number of steps were chosen on the same test images.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.experiment("fashion_mnist")
    config.data = common.images("fashion_mnist")  # or mnist; local: directory with its four files
    config.model = "LeNet300"  # or ConvNet
    config.steps = 6000
    config.batch_size = 128
    config.sparsifier.block = (4, 4)
    return config
