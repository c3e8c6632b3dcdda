"""What the configs share: every option of the pruning algorithms, with its default."""

from ml_collections import ConfigDict


def sparsifier() -> ConfigDict:
    """Options of all algorithms: the common ones first, then a section for each that has its own."""
    config = ConfigDict()
    config.name = "sequential_attention"  # or dense, magnitude, acdc, powerpropagation; gradual_magnitude, random
    config.block = (8, 8)
    config.sparsity = 0.9
    config.min_blocks = 100
    config.scope = "layer"  # or "global"
    config.overrides = ConfigDict()  # by path or pattern: {"*/Dense_0/kernel": {"block": (4, 4), "sparsity": 0.5}}
    config.recipe = "imagenet"  # whose schedule: "imagenet" or "criteo" (paper, section 4.2)
    config.sparsification = True  # False: SequentialAttention++ on ACDC's schedule (D.1)
    config.exponent = 4.0  # c of the sparsification curve (D.2)
    config.schedule = ()  # a schedule of your own instead: (("dense", "20%"), ("sparsification", 0.3), ("sparse", 0.5))
    # clip: "density", "none" or a range, "0.1,10"
    config.sequential_attention = ConfigDict(
        {"clip": "density", "monotone": True, "mask_every": 1, "logit_lr": 1.0, "reset_logits_at": ()}
    )
    config.dense = ConfigDict()
    config.magnitude = ConfigDict()
    config.acdc = ConfigDict({"form": "pruning"})
    config.powerpropagation = ConfigDict({"alpha": 2.0})
    config.gradual_magnitude = ConfigDict({"mask_every": 1, "monotone": True})
    config.random = ConfigDict()
    return config
