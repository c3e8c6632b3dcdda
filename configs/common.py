"""Common parts of the configs: every option, with the default that most of them keep."""

from typing import Any

from ml_collections import ConfigDict

from sa_plus_plus.registry import ALGORITHMS, own_options


def experiment(name: str) -> ConfigDict:
    """Everything except the data, the model and the length of the run."""
    config = ConfigDict()
    config.name = name
    config.seed = 0
    config.task = "classification"  # or click_prediction, language_modelling, reconstruction
    config.model_options = ConfigDict()
    config.init_from = ""  # trained weights to begin with: a run's directory, a checkpoint or a safetensors file
    config.distil = ConfigDict(
        {
            "weight": 0.0,  # weight of the teacher in the loss; the labels have the rest; 0: no teacher
            "teacher": "",  # its weights's, as for init_from; "": those of init_from
            "temperature": 2.0,  # temperature of both softmaxes
        }
    )
    config.steps = 0  # 0: as many as `epochs` take
    config.epochs = 0.0
    config.eval_batch_size = 1000
    config.log_every = 100
    config.eval_every = 500
    config.checkpoint_every = 1000
    config.max_to_keep = 2  # newest checkpoints kept, besides the best
    config.mesh = ConfigDict({"fsdp": 1})  # number of devices that shard the state; batches are split over all
    config.dense_twin = True  # also train the same network without pruning, to compare with
    config.optimizer = ConfigDict(
        {
            "name": "sgd",  # or adamw
            "learning_rate": 0.05,  # at batch size `scale_batch`, scaled linearly for others; 0: unscaled
            "scale_batch": 0,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "rows": "all",  # "batch": touch only the rows of an embedding table that a batch looks up
            "schedule": "cosine",  # or exponential, constant
            "warmup_steps": 0,  # 0: as many as `warmup_epochs` take
            "warmup_epochs": 0.0,
            "final_fraction": 0.1,  # never near zero: the last sparse phase of a short run still has to learn
        }
    )
    config.sparsifier = sparsifier()
    return config


def dataset(name: str, **options: Any) -> ConfigDict:
    """A data set of `experiments.data` with its options."""
    return ConfigDict(
        {
            "name": name,
            "local": "",  # path of its files, for data sets that are read from files
            "workers": 0,  # processes that read and decode; with 0, threads do
            "mean": (),  # subtracted from images in [0, 1], per channel
            "std": (),  # then divided by this
            "options": options,
        }
    )


def images(name: str) -> ConfigDict:
    """A data set of images, from TensorFlow Datasets, or from files if `local` is set."""
    return dataset(name, data_dir="", download=False)


def photographs(name: str) -> ConfigDict:
    """A data set of photographs, normalised as usual for ImageNet."""
    config = images(name)
    config.mean, config.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.options.size = 224
    config.options.skip_corrupt = False
    return config


def imagenet(block: int) -> ConfigDict:
    """ResNet-50 on ImageNet (paper, section 4 and C.1): 90 epochs in batches of 2048.

        python -m experiments.main --config=configs/resnet50_block8.py --config.sparsifier.sparsity=0.9
        python -m experiments.main --config=configs/resnet50_block8.py --config.sparsifier.name=acdc
        python -m experiments.main --config=configs/resnet50_block8.py --config.sparsifier.sparsification=False
        python -m experiments.main --config=configs/resnet50_block8.py --config.sparsifier.exponent=2.0

    The third is a cell of Table 3, the last one of Table 4 (2, 4 and 8). Learning rate, batch size and epochs are the
    paper's; nothing was tuned here. The data are read from `--config.data.local` or TensorFlow Datasets, see
    docs/experiments.md. Hours on eight accelerators are 90 * 1,281,167 / (images per second) / 3600: eleven at 3,000
    images per second altogether.
    """
    config = experiment(f"resnet50_block{block}")
    config.data = photographs("imagenet")
    config.model = "ResNet50"
    config.model_options.dtype = "bfloat16"  # activations; parameters and statistics are float32
    config.epochs = 90.0
    config.batch_size = 2048
    config.eval_batch_size = 2048
    config.eval_every = 1251  # two epochs
    config.checkpoint_every = 626  # one
    config.dense_twin = False  # it takes as long again; --config.sparsifier.name=dense
    config.optimizer.learning_rate = 0.8
    config.optimizer.scale_batch = 2048
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.final_fraction = 0.0
    config.sparsifier.block = (block, block)
    return config


def criteo(block: int) -> ConfigDict:
    """A click-through network on Criteo's data (paper, section 4): 25 epochs in batches of 32768.

        python -m experiments.data.criteo prepare --input train.txt --output path/to/criteo
        python -m experiments.main --config=configs/criteo_block5.py --config.data.local=path/to/criteo
        python -m experiments.compare --config=configs/criteo_block5.py --config.data.local=path/to/criteo --seeds=3

    The blocks are those of the first layer. Set the sparsity by `--config.sparsifier.sparsity=0.97`; Figure 5 also has
    `--config.sparsifier.block='(1,1)'`. Learning rate, batch size and epochs are the paper's; nothing was tuned here.
    """
    config = experiment(f"criteo_block{block}")
    config.task = "click_prediction"
    config.data = dataset("criteo", verify=False)
    config.model = "ClickNet"
    config.model_options.dtype = "float32"
    config.model_options.table_scale = 0.01
    config.epochs = 25.0
    config.batch_size = 32768
    config.eval_batch_size = 32768
    config.eval_every = 1007  # an epoch of 33 million rows
    config.checkpoint_every = 1007
    config.dense_twin = False
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-2
    config.optimizer.weight_decay = 0.0
    config.optimizer.schedule = "exponential"
    config.optimizer.final_fraction = 0.015  # to 3e-4
    config.sparsifier.block = (block, block)
    config.sparsifier.include = "hidden1/kernel"
    config.sparsifier.recipe = "criteo"
    config.sparsifier.acdc.form = "masking"
    return config


def sparsifier() -> ConfigDict:
    """Options of all algorithms: the common ones first, then a section for each algorithm with its own."""
    config = ConfigDict()
    config.name = "sequential_attention"  # or dense, magnitude, acdc, powerpropagation; controls: gradual_magnitude,
    # random, rigl, sparse_evolutionary, movement, group_lasso, d_gating; or narrow, a smaller dense network
    config.block = (8, 8)
    config.sparsity = 0.9
    config.min_blocks = 100
    config.min_kept = "none"  # least number of blocks that each kernel keeps, or "outputs": one in each column of its
    # grid; "none": the default, "outputs" in last layers alone
    config.scope = "layer"  # or "global"
    config.include = ""  # pattern of the kernels to prune; "" for all
    config.views = ConfigDict()  # how leaves are read as matrices: {"*/query/kernel": "d (h k)"}
    config.overrides = ConfigDict()  # by path or pattern: {"*/Dense_0/kernel": {"block": (4, 4), "sparsity": 0.5}}
    config.recipe = "imagenet"  # "imagenet", "criteo" (paper, section 4.2), "gradual"; after init_from "finetune"
    config.sparsification = True  # False: SequentialAttention++ on ACDC's schedule (D.1)
    config.exponent = 4.0  # c of the sparsification curve (D.2)
    config.schedule = ()  # a schedule of your own instead: (("dense", "20%"), ("sparsification", 0.3), ("sparse", 0.5))
    config.reorder = ()  # when units are put into another order, so that few blocks hold most of the weights: kinds of
    # phases, at whose start, or times: ("sparsification",), (500,), ("20%",); by the weights' magnitudes
    # A section for each algorithm with its own options and their defaults, such as `acdc.form`. Text stands for values
    # of other types: sequential_attention.clip is "density", "none" or a range, "0.1,10". Masks are drawn by the run's
    # own seed.
    for name, algorithm in ALGORITHMS.items():
        own = own_options(algorithm.make)
        config[name] = ConfigDict({option: default for option, default in own.items() if option != "seed"})
    config.narrow = ConfigDict(
        {
            "equal": "weights",  # what it has as many of as the pruned network; or multiply_adds
            "cut": "scale",  # all widths by one factor; or "cap", only those above one width
        }
    )
    return config
