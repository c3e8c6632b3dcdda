"""A small convolutional network on CIFAR-10.

    python -m experiments.main --config=configs/cifar10.py --config.data.local=path/to/cifar10.tar
    python -m experiments.main --config=configs/cifar10.py

The archive holds `train/<class>/<name>.png` and `test/<class>/<name>.png`, or other image files. The second command
reads the data set as prepared by TensorFlow Datasets, and says what to do if it is missing. It takes three minutes on
two CPU cores, dense twin included; 57% test accuracy at 89% sparsity with 4 x 4 blocks, 65% dense (seed 0, from JPEG
copies). The number of steps and, as far as is known, the learning rate were chosen on the same test images.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.experiment("cifar10")
    config.data = common.images("cifar10")  # local: tar file of images
    config.model = "ConvNet"
    config.steps = 4000  # about ten epochs; more would overfit without augmentation
    config.batch_size = 128
    config.optimizer.weight_decay = 5e-4
    config.sparsifier.block = (4, 4)
    return config
