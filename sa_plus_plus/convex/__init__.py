"""Convex problems with groups of coefficients: the paper's theory as solvers.

    problem = convex.problems.least_squares(X, y)
    groups = convex.groups.equal(X.shape[1], 10)
    solution = convex.group_lasso.solve(problem, groups, 0.1 * convex.group_lasso.critical_lambda(problem, groups))

All of it is jittable, maps over lambdas, starts and data, and computes in the type of its data: for float64 set
`jax_enable_x64`.
"""

from sa_plus_plus.convex import (
    constants,
    greedy,
    group_lasso,
    groups,
    least_squares_path,
    masked,
    penalised,
    penalties,
    problems,
)
from sa_plus_plus.convex.lambert import lambert_w

__all__ = [
    "constants",
    "greedy",
    "group_lasso",
    "groups",
    "lambert_w",
    "least_squares_path",
    "masked",
    "penalised",
    "penalties",
    "problems",
]
