"""Table 1 and Figures 3 and 4: accuracy against block size and sparsity.

    python -m experiments.reproduce table1 --scale=paper --local=path/to/imagenet
    python -m experiments.reproduce table1 --scale=small --local=path/to/fashion/mnist

At scale `paper` ResNet-50 on ImageNet, ACDC and SequentialAttention++; at scale `small` LeNet-300-100 on Fashion-MNIST,
the paper's four algorithms, controls, and algorithms of other papers.
"""

from ml_collections import ConfigDict

from configs.reproduce.scales import BASELINES, CAPPED, CONTROLS, NARROW, PAPERS, fashion, mnist, orders, sweep


def get_config(scale: str = "small") -> ConfigDict:
    if scale == "paper":
        return sweep(
            "ResNet-50 on ImageNet: top-1 accuracy, %",
            "configs/resnet50_block8.py",
            variants={name: PAPERS[name] for name in ("SA++", "ACDC")},
            **{"blocks": (8, 16, 32, 64), "sparsities": (0.7, 0.8, 0.9, 0.95), "seeds": (0,)},
            **{"percent": True, "paper": "table1"},
        )
    if scale == "small":
        return fashion(
            "LeNet-300-100 on Fashion-MNIST: accuracy, %",
            variants=PAPERS | CONTROLS | CAPPED | BASELINES,
            compared=orders(PAPERS | CONTROLS | CAPPED | BASELINES),
            **{"blocks": (4, 8, 16, 32), "sparsities": (0.9, 0.95, 0.97, 0.98), "paper": "table1"},
        )
    return mnist("LeNet-300-100 on MNIST digits: accuracy, %", variants=PAPERS | NARROW, paper="table1")
