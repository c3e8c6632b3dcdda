"""Block-wise pruning of neural networks in JAX: SequentialAttention++ and competing algorithms."""

from sa_plus_plus import _version, blocks, metrics, phases, select, sparse, views
from sa_plus_plus.algorithms import (
    acdc,
    attention_weights,
    block_norm,
    dense,
    gradual_magnitude,
    magnitude,
    powerpropagation,
    random,
    sequential_attention,
)
from sa_plus_plus.averages import Ema, EmaState, ema
from sa_plus_plus.baselines import d_gating, group_lasso, movement, rigl, sparse_evolutionary
from sa_plus_plus.checks import check_pruned
from sa_plus_plus.compose import IDENTITY, Parametrisation, PruningOptions, compose
from sa_plus_plus.oneshot import (
    SPARSITIES,
    Budget,
    OneShot,
    Reordered,
    ReorderedState,
    ReorderedTraining,
    Sensitivity,
    budget,
    milliseconds,
    one_shot,
    refit,
    reorder,
    reorder_state,
    reorder_training,
    sensitivity,
    views_of,
)
from sa_plus_plus.phases import Phases
from sa_plus_plus.planning import LeafPlan, Plan, path_string, plan
from sa_plus_plus.pruning import prune
from sa_plus_plus.recommended import recommended
from sa_plus_plus.registry import ALGORITHMS, Algorithm, algorithm
from sa_plus_plus.reordering.orders import Order
from sa_plus_plus.shrinking import Shrunk, shrink
from sa_plus_plus.sparse import (
    BlockSparse,
    block_sparse_conv,
    block_sparse_matmul,
    export,
    load,
    save,
    specialize,
    summary,
    todense,
)
from sa_plus_plus.sparse.files import serve
from sa_plus_plus.sparsifier import PruneState, Sparsifier, Trainable
from sa_plus_plus.transforms import ResetState, Sparsify, SparsifyState, reset_on, sparsify
from sa_plus_plus.views import View

__version__: str

__all__ = [
    "ALGORITHMS",
    "IDENTITY",
    "SPARSITIES",
    "Algorithm",
    "BlockSparse",
    "Budget",
    "Ema",
    "EmaState",
    "LeafPlan",
    "OneShot",
    "Order",
    "Parametrisation",
    "Phases",
    "Plan",
    "PruneState",
    "PruningOptions",
    "Reordered",
    "ReorderedState",
    "ReorderedTraining",
    "ResetState",
    "Sensitivity",
    "Shrunk",
    "Sparsifier",
    "Sparsify",
    "SparsifyState",
    "Trainable",
    "View",
    "acdc",
    "algorithm",
    "attention_weights",
    "block_norm",
    "block_sparse_conv",
    "block_sparse_matmul",
    "blocks",
    "budget",
    "check_pruned",
    "compose",
    "d_gating",
    "dense",
    "ema",
    "export",
    "gradual_magnitude",
    "group_lasso",
    "load",
    "magnitude",
    "metrics",
    "milliseconds",
    "movement",
    "one_shot",
    "path_string",
    "phases",
    "plan",
    "powerpropagation",
    "prune",
    "random",
    "recommended",
    "refit",
    "reorder",
    "reorder_state",
    "reorder_training",
    "reset_on",
    "rigl",
    "save",
    "select",
    "sensitivity",
    "sequential_attention",
    "serve",
    "shrink",
    "sparse",
    "sparse_evolutionary",
    "sparsify",
    "specialize",
    "summary",
    "todense",
    "views",
    "views_of",
]


def __getattr__(name: str) -> str:
    if name == "__version__":  # asks git in a clone, so not at import
        return _version.version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
