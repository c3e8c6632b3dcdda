"""Trees of arrays that may be donated, and trees that have None, or leaves that a state lacks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sa_plus_plus.planning import path_string


def copy_arrays(params: Any) -> Any:
    """A copy of a parameter tree, in buffers of its own.

    Args:
      params: tree of arrays and numbers. Shapes alone (`jax.ShapeDtypeStruct`) stay as they are.

    Raises:
      TypeError: if a leaf is neither an array nor a number.
    """

    def copied(path: Any, leaf: Any) -> Any:
        if not _is_array(leaf):
            raise TypeError(
                f"{path_string(path) or 'the parameter tree'} is not an array of numbers but of type "
                f"{type(leaf).__name__}: give arrays alone, for an Equinox model `eqx.filter(model, "
                "eqx.is_inexact_array)`, and put None in place of all else"
            )
        return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.copy(leaf)

    return jax.tree_util.tree_map_with_path(copied, params)


def unalias(result: Any, *arguments: Any) -> Any:
    """`result`, with copies of arrays that are also in `arguments`, or twice in `result`: any of them may be donated.

    In a jitted function the copies cost nothing, since its results have buffers of their own in any case.

    Args:
      result: of a function.
      arguments: of the function.
    """
    used = {id(leaf) for leaf in jax.tree.leaves(arguments)}

    def unused(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array | np.ndarray) and id(leaf) in used:
            leaf = jnp.copy(leaf)
        used.add(id(leaf))
        return leaf

    return jax.tree.map(unused, result)


def arrays(tree: Any) -> Any:
    """The tree with None in place of leaves that are neither arrays nor numbers, such as functions."""
    return jax.tree.map(lambda leaf: leaf if _is_array(leaf) else None, tree)


def inexact(tree: Any) -> Any:
    """The tree with None in place of leaves that cannot be trained: integers, booleans, random keys."""
    return jax.tree.map(lambda leaf: leaf if is_inexact(leaf) else None, tree)


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates(params, updates)`, where None leaves a leaf as it is."""
    return jax.tree.map(lambda p, u: p if u is None else optax.apply_updates(p, u), params, updates, is_leaf=is_none)


def differs(params: jax.Array, kernel: jax.Array) -> jax.Array:
    """Where a loop's `params` are not `kernel` rounded to their type, which may be narrower than the trained one."""
    return jnp.asarray(params) != kernel.astype(params.dtype)


def merge_changes(params: Any, weights: jax.Array) -> jax.Array:
    """A loop's `params`; those of another type are converted where they differ from `weights` rounded to that type."""
    params = jnp.asarray(params)
    if params.dtype == weights.dtype:
        return params
    return jnp.where(differs(params, weights), params.astype(weights.dtype), weights)


def fill_none(tree: Any, otherwise: Any) -> Any:
    """The tree with leaves, or whole subtrees, of `otherwise` in place of None.

    Args:
      tree: with None in some places.
      otherwise: the same tree without.
    """
    return jax.tree.map(lambda leaf, other: other if leaf is None else leaf, tree, otherwise, is_leaf=is_none)


def match_state(tree: Any, weights: Any, what: str) -> Any:
    """A loop's tree restricted to the leaves that a state has weights for; None where the loop has nothing.

    Like optax, it takes None for a leaf or a subtree (Equinox's gradients of what is not trained), and leaves where the
    state has None (a whole Equinox model that is trained in part).

    Args:
      tree: like `weights`, apart from None.
      weights: those in the state, None where there is none.
      what: `tree` in a message: "parameters", "gradients".

    Raises:
      ValueError: if the trees do not fit, or an array has another shape than its weights.
    """

    def expand_none(node: Any, subtree: Any) -> Any:
        return jax.tree.map(lambda _: None, subtree) if node is None else node

    def checked(path: Any, weight: Any, leaf: Any) -> Any:
        if weight is None or leaf is None:
            return None
        if np.shape(leaf) != np.shape(weight):
            raise ValueError(
                f"the {what} hold {path_string(path)} with the shape {np.shape(leaf)}, but `init` was given it with "
                f"the shape {np.shape(weight)}"
            )
        return leaf

    try:
        if any(leaf is None for leaf in jax.tree.leaves(tree, is_leaf=is_none)):
            tree = jax.tree.map(expand_none, tree, weights, is_leaf=is_none)
        matched = jax.tree.map(lambda w, node: None if w is None else node, weights, tree, is_leaf=is_none)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the {what} are not the same tree as the parameters that `init` was given: {error!s:.300}"
        ) from error
    return jax.tree_util.tree_map_with_path(checked, weights, matched, is_leaf=is_none)


def is_none(x: Any) -> bool:
    return x is None


def is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact))


def _is_array(leaf: Any) -> bool:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return isinstance(leaf, bool | int | float | complex)
    return not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "OSUMm"
