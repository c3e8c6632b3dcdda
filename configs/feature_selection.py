"""Feature selection: the 50 most useful input features, from a table or from the pixels of images.

    python -m experiments.main --config=configs/feature_selection.py --config.data.local=table.csv --config.features=10
    python -m experiments.main --config=configs/feature_selection.py:mnist --config.data.local=path/to/its/files
    python -m benchmarks.feature_selection --data=mnist --local=path/to/its/files

The table is a CSV file with a header (`pip install -e '.[tables]'`). The target is the last column, or the one named by
--config.data.options.target; classes may have any names, all other columns must be numeric. --config.data.options.group
names a column for grouped splits: rows with the same value stay together. --config.data.options.ignore lists columns to
leave out. The run writes `features.json`: the kept features, those with the largest weights first.

A block is a feature's row of the first kernel, so the softmax of Sequential Attention is over features, as
in Yasuda, Bateni, Chen, Fahrbach, Fu, Mirrokni: Sequential Attention for Feature Selection, ICLR 2023,
arXiv:2209.14881, which also uses 50 features and one hidden layer of 67 units. Here all algorithms have one
sparsification phase, in which features are dropped a few at a time, instead of the cycles of SequentialAttention++;
with --config.sparsifier.schedule='()' each uses its own schedule. This, and the learning rate for images, were chosen
on 10,000 held-out training digits, with one or two seeds. The rate for tables was not tuned; thousands of columns need
a lower one.
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
    config.sparsifier.include = "Dense_0/kernel"
    config.sparsifier.min_blocks = 1
    config.sparsifier.schedule = (("dense", 0.4), ("sparsification", 0.45), ("sparse", 0.15))
    return config
