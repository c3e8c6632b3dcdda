"""Convex problems with groups of coefficients: solvers for the paper's theory.

    problem = convex.problems.least_squares(X, y)
    groups = convex.groups.equal(X.shape[1], 10)
    solution = convex.group_lasso.solve(problem, groups, 0.1 * convex.group_lasso.critical_lambda(problem, groups))

Everything can be jitted and vmapped over lambdas, starting points and data, and computes in the dtype of its data: for
float64 set `jax_enable_x64`.
"""

import sa_plus_plus.convex.constants as constants
import sa_plus_plus.convex.greedy as greedy
import sa_plus_plus.convex.group_lasso as group_lasso
import sa_plus_plus.convex.groups as groups
import sa_plus_plus.convex.least_squares_path as least_squares_path
import sa_plus_plus.convex.masked as masked
import sa_plus_plus.convex.penalised as penalised
import sa_plus_plus.convex.penalties as penalties
import sa_plus_plus.convex.problems as problems
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
