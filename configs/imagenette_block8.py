"""ResNet-50 on Imagenette: the whole ImageNet experiment at small scale, in minutes instead of days.

    python -m experiments.main --config=configs/imagenette_block8.py --config.data.local=path/with/train/and/val

The directory holds `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`; without it the data set is read as prepared by
TensorFlow Datasets. On two CPU cores and 1,850 training images a run takes a quarter of an hour at 64 pixels. At 90%
sparsity SequentialAttention++ classifies 27% of 500 held-out images correctly and ACDC 19% (seed 0; chance is 10%):
this few steps show that everything works, not how algorithms rank. As far as is known, the learning rate was chosen
from a few on the same held-out images.
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
    config.optimizer.learning_rate = 0.004  # with batches of 32 from scratch, training does not start at 0.01
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.weight_decay = 5e-4
    config.sparsifier.block = (8, 8)
    return config
