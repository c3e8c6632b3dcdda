"""Networks. The name in a config is the name of the class here."""

from experiments.models.small import Autoencoder, ConvNet, LeNet300

__all__ = ["Autoencoder", "ConvNet", "LeNet300"]
