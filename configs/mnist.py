"""LeNet-300-100 on 5,000 real MNIST digits: the quickest way to watch a network being pruned.

    python -m experiments.main --config=configs/mnist.py --config.sparsifier.name=acdc

It takes half a minute on two CPU cores, dense twin and compilation included; about 94% test accuracy at 90% sparsity
with 4 x 4 blocks. A problem this small shows that an algorithm works, not which one is best.

The learning rate was chosen on a validation set, a fifth of the 4,000 training digits, by the mean accuracy of all
seven algorithms, 3 seeds each; as far as is known, the number of steps was chosen on the test digits. Validation
accuracy, %:

    learning rate              0.02   0.05   0.1    0.2    0.4
    mean of all                91.1   92.5   93.3   93.6   92.5
    dense                      93.2   93.9   94.3   94.3   93.6
    SequentialAttention++      92.4   93.4   94.3   94.3   92.2
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.experiment("mnist")
    config.data = common.dataset("mnist5k", held_out=1000, seed=0)
    config.model = "LeNet300"  # or ConvNet
    config.steps = 1600
    config.batch_size = 100
    config.eval_batch_size = 500
    config.log_every = 20
    config.eval_every = 40
    config.checkpoint_every = 400
    config.optimizer.learning_rate = 0.2
    config.sparsifier.block = (4, 4)
    return config
