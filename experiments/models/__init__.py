"""Networks. The name in a config is the name of a class or function here."""

from experiments.models.click import ClickNet
from experiments.models.mobilenet import EfficientNetLite0, MobileNetV2
from experiments.models.resnet import ResNet, ResNet18, ResNet20, ResNet34, ResNet50
from experiments.models.small import MLP, Autoencoder, ConvNet, LeNet300
from sa_plus_plus.contrib.transformers.encoder import Bert
from sa_plus_plus.contrib.transformers.transformer import Decoder, ViT

__all__ = [
    "MLP",
    "Autoencoder",
    "Bert",
    "ClickNet",
    "ConvNet",
    "Decoder",
    "EfficientNetLite0",
    "LeNet300",
    "MobileNetV2",
    "ResNet",
    "ResNet18",
    "ResNet20",
    "ResNet34",
    "ResNet50",
    "ViT",
]
