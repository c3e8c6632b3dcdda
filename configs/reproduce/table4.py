"""Table 4: the exponent c of the sparsification curve.

python -m experiments.reproduce table4 --scale=paper --local=path/to/imagenet
python -m experiments.reproduce table4 --scale=small --local=path/to/fashion/mnist
"""

from ml_collections import ConfigDict

from configs.reproduce.scales import PAPERS, fashion, mnist, sweep

VARIANTS = {f"c = {c}": PAPERS["SA++"] | {"sparsifier.exponent": float(c)} for c in (2, 4, 8)}


def get_config(scale: str = "small") -> ConfigDict:
    if scale == "paper":
        return sweep(
            "ResNet-50 on ImageNet by the exponent c: top-1 accuracy, %",
            "configs/resnet50_block8.py",
            variants=VARIANTS,
            **{"blocks": (8, 16, 32, 64), "sparsities": (0.9,), "seeds": (0,), "percent": True, "paper": "table4"},
        )
    title = "LeNet-300-100 on {} by the exponent c: accuracy, %"
    if scale == "small":
        grid = {"blocks": (8, 16), "sparsities": (0.9, 0.95, 0.97)}
        return fashion(title.format("Fashion-MNIST"), variants=VARIANTS, paper="table4", **grid)
    return mnist(title.format("MNIST digits"), variants=VARIANTS, paper="table4", blocks=(8,))
