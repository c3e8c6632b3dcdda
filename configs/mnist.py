"""LeNet-300-100 on 5,000 real MNIST digits: the quickest way to see a network being pruned.

    python -m experiments.main --config=configs/mnist.py --config.sparsifier.name=acdc

Half a minute on two CPU cores, dense twin and compilation included; about 95% test accuracy at 90% sparsity with
4 x 4 blocks. So small a problem shows that an algorithm works, not which one is best.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "mnist"
    config.seed = 0
    config.task = "classification"
    config.data = ConfigDict({"name": "mnist5k", "options": {"held_out": 1000, "seed": 0}})
    config.model = "LeNet300"  # or ConvNet
    config.steps = 1600
    config.batch_size = 100
    config.eval_batch_size = 500
    config.log_every = 20
    config.eval_every = 40
    config.checkpoint_every = 400
    config.keep = 2  # newest checkpoints kept, besides the best
    config.mesh = ConfigDict({"fsdp": 1})  # over how many devices the state is split; batches are split over all
    config.dense_twin = True  # also train the same network without pruning, to compare with

    config.optimizer = ConfigDict(
        {
            "name": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "schedule": "cosine",
            "warmup_steps": 0,
            "final_fraction": 0.1,  # never near zero: the last sparse phase of a short run still has to learn
        }
    )
    config.sparsifier = common.sparsifier()
    config.sparsifier.block = (4, 4)
    return config
