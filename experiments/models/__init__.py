"""Networks. The name in a config is the name of the class here."""

from experiments.models.small import ConvNet, LeNet300

__all__ = ["ConvNet", "LeNet300"]
