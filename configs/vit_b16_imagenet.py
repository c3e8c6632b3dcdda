"""ViT-B/16 on ImageNet with 32 x 32 blocks, for accelerators.

    python -m experiments.main --config=configs/vit_b16_imagenet.py --config.data.local=path/to/imagenet
    python -m experiments.main --config=configs/vit_b16_imagenet.py --config.sparsifier.name=dense

The data: `--config.data.local` or TensorFlow Datasets, see docs/experiments.md. Hours on eight accelerators are
300 * 1,281,167 / (images per second) / 3600: eleven at 10,000 images per second altogether. The kernels of the layers,
99% of the weights, are pruned; the patch embedding and the head are not. Nothing was tuned.

Published top-1 of ViT-B/16 at 90% sparsity, in percent:

    SuperBlock, blocks 32 x 32    76.09, and 78.39 dense; README of github.com/pytorch-labs/superblock, on ImageNet with
                                  faces blurred
    Spartan, in blocks            less than one point below its dense network; abstract of arXiv:2205.14107

Images here are randomly cropped and flipped, without the stronger augmentation that is usual for training vision
transformers from scratch, so the dense network may end below theirs: compare the loss due to pruning.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.experiment("vit_b16_imagenet")
    config.data = common.photographs("imagenet")
    config.model = "ViT"
    config.model_options = ConfigDict(
        {
            "patch": 16,
            "layers": 12,
            "width": 768,
            "hidden": 3072,
            "heads": 12,
            "class_token": True,
            "epsilon": 1e-6,
            "dropout": 0.1,
            "scan": False,
            "dtype": "bfloat16",  # activations; parameters are float32
        }
    )
    config.epochs = 300.0
    config.batch_size = 1024
    config.eval_batch_size = 1024
    config.eval_every = 2502  # two epochs
    config.checkpoint_every = 1251  # one
    config.dense_twin = False  # it takes as long again; --config.sparsifier.name=dense
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.scale_batch = 1024
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.final_fraction = 0.0
    config.sparsifier.block = (32, 32)
    config.sparsifier.include = "layer*/kernel"
    return config
