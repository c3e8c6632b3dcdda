"""ResNet-20 on CIFAR-10 with shifts and flips: a size between the small networks and ImageNet.

    python -m experiments.main --config=configs/cifar10_resnet20.py --config.data.local=path/to/cifar10.tar
    python -m experiments.compare --config=configs/cifar10_resnet20.py --config.sparsifier.block='(16,16)' --seeds=3

For an accelerator: on two CPU cores a step of 128 images takes most of a second. The network has 270,896 kernel
weights: `min_blocks` is lowered, so that with 8 x 8 blocks all stages are pruned.
Nothing was tuned: learning rate and weight decay are the usual ones for ResNets on CIFAR-10.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.experiment("cifar10_resnet20")
    config.data = common.images("cifar10")  # local: tar file of images
    config.data.mean, config.data.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    config.data.options.vary = True
    config.model = "ResNet20"
    config.model_options.dtype = "float32"
    config.epochs = 60.0
    config.batch_size = 128
    config.eval_every = 782  # two epochs
    config.checkpoint_every = 782
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.weight_decay = 5e-4
    config.optimizer.final_fraction = 0.01
    config.sparsifier.block = (8, 8)
    config.sparsifier.min_blocks = 20
    return config
