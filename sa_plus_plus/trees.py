"""Trees of arrays that may be donated, and trees that hold more than another one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sa_plus_plus.planning import path_string


def owned(params: Any) -> Any:
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


def apart(result: Any, *given: Any) -> Any:
    """`result`, with copies of the arrays that are in `given` too, or in `result` twice: any of them may be donated.

    In a jitted function the copies cost nothing, since its results have buffers of their own in any case.

    Args:
      result: what a function returns.
      given: what it was given.
    """
    taken = {id(leaf) for leaf in jax.tree.leaves(given)}

    def own(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array | np.ndarray) and id(leaf) in taken:
            leaf = jnp.copy(leaf)
        taken.add(id(leaf))
        return leaf

    return jax.tree.map(own, result)


def arrays(tree: Any) -> Any:
    """The tree with None in place of leaves that are neither arrays nor numbers, such as functions."""
    return jax.tree.map(lambda leaf: leaf if _is_array(leaf) else None, tree)


def inexact(tree: Any) -> Any:
    """The tree with None in place of leaves that cannot be trained: integers, booleans, random keys."""
    return jax.tree.map(lambda leaf: leaf if is_inexact(leaf) else None, tree)


def added(params: Any, updates: Any) -> Any:
    """`optax.apply_updates(params, updates)`, where None leaves a leaf as it is."""
    return jax.tree.map(lambda p, u: p if u is None else optax.apply_updates(p, u), params, updates, is_leaf=is_none)


def differs(given: jax.Array, handed: jax.Array) -> jax.Array:
    """Where `given` is not `handed`, rounded to its type: a loop may hold parameters narrower than what is trained."""
    return jnp.asarray(given) != handed.astype(given.dtype)


def taken_over(given: Any, weights: jax.Array) -> jax.Array:
    """The weights that are `given`, in their own type; narrower ones are taken over where they say something new."""
    given = jnp.asarray(given)
    if given.dtype == weights.dtype:
        return given
    return jnp.where(differs(given, weights), given.astype(weights.dtype), weights)


def filled(tree: Any, otherwise: Any) -> Any:
    """The tree with leaves, or whole subtrees, of `otherwise` in place of None.

    Args:
      tree: with None in some places.
      otherwise: the same tree without.
    """
    return jax.tree.map(lambda own, other: other if own is None else own, tree, otherwise, is_leaf=is_none)


def of_state(given: Any, weights: Any, what: str) -> Any:
    """What a loop gives for each of the weights in a state; None where there is nothing.

    Like optax, it takes None for a leaf or a subtree (Equinox's gradients of what is not trained), and leaves where the
    state has None (a whole Equinox model, of which a part is trained).

    Args:
      given: a tree like `weights`, apart from None.
      weights: those in the state, None where there is none.
      what: `given` in a message: "parameters", "gradients".

    Raises:
      ValueError: if the trees do not fit, or an array has another shape than its weights.
    """

    def spread(found: Any, own: Any) -> Any:
        return jax.tree.map(lambda _: None, own) if found is None else found

    def checked(path: Any, own: Any, found: Any) -> Any:
        if own is None or found is None:
            return None
        if np.shape(found) != np.shape(own):
            raise ValueError(
                f"the {what} hold {path_string(path)} with the shape {np.shape(found)}, but `init` was given it with "
                f"the shape {np.shape(own)}"
            )
        return found

    try:
        if any(leaf is None for leaf in jax.tree.leaves(given, is_leaf=is_none)):
            given = jax.tree.map(spread, given, weights, is_leaf=is_none)
        found = jax.tree.map(lambda own, found: found if own is not None else None, weights, given, is_leaf=is_none)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the {what} are not the same tree as the parameters that `init` was given: {error!s:.300}"
        ) from error
    return jax.tree_util.tree_map_with_path(checked, weights, found, is_leaf=is_none)


def is_none(x: Any) -> bool:
    return x is None


def is_inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jax.dtypes.result_type(leaf), jnp.inexact))


def _is_array(leaf: Any) -> bool:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return isinstance(leaf, bool | int | float | complex)
    return not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "OSUMm"
