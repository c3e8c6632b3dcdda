"""Block pruning of a trained network without training, from a few example inputs."""

from sa_plus_plus.oneshot.budgets import Budget, budget, milliseconds
from sa_plus_plus.oneshot.prune import OneShot, one_shot, refit
from sa_plus_plus.oneshot.read_views import views_of
from sa_plus_plus.oneshot.reorder import Reordered, reorder
from sa_plus_plus.oneshot.reorder_training import ReorderedState, ReorderedTraining, reorder_state, reorder_training
from sa_plus_plus.oneshot.sensitivities import SPARSITIES, Sensitivity, sensitivity

__all__ = [
    "SPARSITIES",
    "Budget",
    "OneShot",
    "Reordered",
    "ReorderedState",
    "ReorderedTraining",
    "Sensitivity",
    "budget",
    "milliseconds",
    "one_shot",
    "refit",
    "reorder",
    "reorder_state",
    "reorder_training",
    "sensitivity",
    "views_of",
]
