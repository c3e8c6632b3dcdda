"""Block-wise pruning of neural networks in JAX: SequentialAttention++ and its rivals."""

from sa_plus_plus import blocks, convex, metrics, phases, select
from sa_plus_plus.algorithms import (
    acdc,
    attention_weights,
    dense,
    gradual_magnitude,
    magnitude,
    powerpropagation,
    random,
    sequential_attention,
)
from sa_plus_plus.phases import Phases
from sa_plus_plus.planning import Layer, Plan, path_string, plan
from sa_plus_plus.sparsifier import PruneState, Sparsifier, Trainable
from sa_plus_plus.transforms import SparsifyState, reset_on, sparsify

__version__ = "0.1.0"

ALGORITHMS = ("dense", "magnitude", "acdc", "powerpropagation", "sequential_attention")
CONTROLS = ("gradual_magnitude", "random")

__all__ = [
    "ALGORITHMS",
    "CONTROLS",
    "Layer",
    "Phases",
    "Plan",
    "PruneState",
    "Sparsifier",
    "SparsifyState",
    "Trainable",
    "acdc",
    "attention_weights",
    "blocks",
    "convex",
    "dense",
    "gradual_magnitude",
    "magnitude",
    "metrics",
    "path_string",
    "phases",
    "plan",
    "powerpropagation",
    "random",
    "reset_on",
    "select",
    "sequential_attention",
    "sparsify",
]
