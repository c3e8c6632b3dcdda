"""Choosing the 50 input features that a network needs most, of a table or of the pixels of images.

    python -m experiments.main --config=configs/feature_selection.py --config.data.local=table.csv --config.features=10
    python -m experiments.main --config=configs/feature_selection.py:mnist --config.data.local=path/to/its/files
    python -m benchmarks.feature_selection --data=mnist --local=path/to/its/files

The table is a CSV file with a header, whose last column is the target, or the one that --config.data.options.target
names; classes may be called anything, all else must be numbers. --config.data.options.group names a column whose
rows of one value stay together when test rows are drawn, --config.data.options.ignore columns to leave out. The run
leaves `features.json`: the features that were kept, the one with the largest weights first.

A group of weights is a feature's row of the first kernel, so that Sequential Attention's softmax is over features, as
in Yasuda, Bateni, Chen, Fahrbach, Fu, Mirrokni: Sequential Attention for Feature Selection, ICLR 2023,
arXiv:2209.14881, which has 50 features and one hidden layer of 67 units too. All algorithms have one sparsification
phase here, in which features are dropped a few at a time, instead of SequentialAttention++'s cycles; with
--config.sparsifier.schedule='()' each has its own schedule. This, and the learning rate for images, were chosen on
10,000 training digits that were held out, with one or two seeds. That for tables was not tuned; thousands of columns
need a lower one.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(data: str = "table") -> ConfigDict:
    """The config for a table; after a colon in its path, for `mnist` or `fashion_mnist`."""
    config = common.experiment("feature_selection")
    if data == "table":
        config.data = common.dataset("table", target="", group="", ignore="", held_out=0.2, seed=0)
        config.steps = 3000
        config.batch_size = 64
        config.optimizer.learning_rate = 0.03
    else:
        config.data = common.images(data)
        config.epochs = 20.0
        config.batch_size = 256
        config.optimizer.learning_rate = 0.2
    config.model = "MLP"
    config.model_options.widths = (67,)
    config.features = 50  # how many are kept; the sparsity follows from it
    config.sparsifier.block = (1, None)
    config.sparsifier.only = "Dense_0/kernel"
    config.sparsifier.min_blocks = 1
    config.sparsifier.schedule = (("dense", 0.4), ("sparsification", 0.45), ("sparse", 0.15))
    return config
