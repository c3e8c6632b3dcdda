"""Not in the paper: ResNet-20 on CIFAR-10, the pruned network against a narrower dense one and the simplest controls.

    python -m experiments.reproduce cifar10 --scale=paper --local=path/to/cifar10.tar
    python -m experiments.reproduce cifar10 --scale=small --local=path/to/cifar10.tar

On two cores a run takes hours at scale `paper` (60 epochs), and five minutes at scale `small` (three epochs, for the
question of `docs/worth_it.md` alone). Scale `smoke` trains a small convolutional network on MNIST digits instead, which
need no files.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.reproduce.scales import CAPPED, CONTROLS, NARROW, PAPERS, RECOMMENDED, mnist, orders, sweep

VARIANTS = {"SA++": PAPERS["SA++"], **CONTROLS, **CAPPED}


def get_config(scale: str = "small") -> ConfigDict:
    if scale == "smoke":
        network = {"model": "ConvNet", "sparsifier.min_blocks": 20}
        return mnist("ConvNet on MNIST digits: accuracy, %", variants=VARIANTS, blocks=(8,), extra=network)
    grid: dict[str, Any] = {"blocks": (8, 16), "sparsities": (0.8, 0.9), "seeds": (0, 1, 2), "percent": True}
    changes: dict[str, Any] = {"dense_twin": False}
    variants, compared = VARIANTS, orders(VARIANTS)
    if scale == "small":
        grid |= {"blocks": (8,), "sparsities": (0.9,), "seeds": (0, 1)}
        changes |= {"epochs": 3.0, "optimizer.warmup_epochs": 0.2, "eval_batch_size": 500}
        variants = {name: VARIANTS[name] for name in (RECOMMENDED, *NARROW, *CAPPED, "random")}
        compared = {RECOMMENDED: [*NARROW, *CAPPED, "random"]}
    title = "ResNet-20 on CIFAR-10: accuracy, %"
    file = "configs/cifar10_resnet20.py"
    return sweep(title, file, variants=variants, compared=compared, changes=changes, **grid)
