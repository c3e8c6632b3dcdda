"""An autoencoder of MNIST digits: another task through the same loop.

    python -m experiments.main --config=configs/mnist_autoencoder.py

It takes about a minute on two CPU cores, dense twin included; the metric is the peak signal-to-noise ratio in dB.
Nothing was tuned: the learning rate is the usual one for Adam, and the rest is as in `configs/mnist.py`.
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config() -> ConfigDict:
    config = mnist.get_config()
    config.name = "mnist_autoencoder"
    config.task = "reconstruction"
    config.model = "Autoencoder"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    return config
