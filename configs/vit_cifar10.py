"""A small vision transformer on CIFAR-10 with shifts and flips: patches of 4 x 4, blocks of 16 x 16.

    python -m experiments.main --config=configs/vit_cifar10.py --config.data.local=path/to/cifar10.tar
    python -m experiments.compare --config=configs/vit_cifar10.py --config.sparsifier.block='(32,32)' --seeds=3

For an accelerator. The layers' kernels are pruned, the patch embedding and the head are not. Nothing was tuned.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.experiment("vit_cifar10")
    config.data = common.images("cifar10")  # local: tar file of images
    config.data.mean, config.data.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    config.data.options.vary = True
    config.model = "ViT"
    config.model_options = ConfigDict(
        {
            "patch": 4,
            "layers": 6,
            "width": 256,
            "hidden": 1024,
            "heads": 4,
            "class_token": False,
            "epsilon": 1e-6,
            "dropout": 0.1,
            "scan": False,
            "dtype": "float32",
        }
    )
    config.epochs = 100.0
    config.batch_size = 128
    config.eval_every = 782  # two epochs
    config.checkpoint_every = 782
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.final_fraction = 0.01
    config.sparsifier.block = (16, 16)
    config.sparsifier.include = "layer*/kernel"
    return config
