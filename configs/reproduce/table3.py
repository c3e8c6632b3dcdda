"""Table 3: SequentialAttention++ without its sparsification phases.

python -m experiments.reproduce table3 --scale=paper --local=path/to/imagenet
python -m experiments.reproduce table3 --scale=small --local=path/to/fashion/mnist
"""

from ml_collections import ConfigDict

from configs.reproduce.scales import PAPERS, fashion, mnist, sweep

VARIANTS = {
    "SA++": PAPERS["SA++"],
    "SA++, no sparsification": PAPERS["SA++"] | {"sparsifier.sparsification": False},
}


def get_config(scale: str = "small") -> ConfigDict:
    if scale == "paper":
        return sweep(
            "ResNet-50 on ImageNet without sparsification phases: top-1 accuracy, %",
            "configs/resnet50_block8.py",
            variants=VARIANTS,
            **{"blocks": (8, 16, 32, 64), "sparsities": (0.7, 0.8, 0.9, 0.95), "seeds": (0,)},
            **{"percent": True, "paper": "table3"},
        )
    title = "LeNet-300-100 on {} without sparsification phases: accuracy, %"
    if scale == "small":
        grid = {"blocks": (8, 16), "sparsities": (0.9, 0.95, 0.97)}
        return fashion(title.format("Fashion-MNIST"), variants=VARIANTS, paper="table3", **grid)
    return mnist(title.format("MNIST digits"), variants=VARIANTS, paper="table3", blocks=(8,))
