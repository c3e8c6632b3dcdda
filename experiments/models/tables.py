"""Steps that touch only the rows of an embedding table that a batch looks up.

The rows are gathered, with their optimizer moments, into a small table; the ordinary step runs on it; the result is
scattered back. The moments of all other rows do not change, whereas an optimizer on the whole table would let them
decay and keep moving rows that no example uses. At a phase boundary the moments of the whole table are reset.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import sa_plus_plus as sapp


class Table(NamedTuple):
    """An embedding table of a task.

    Attributes:
      path: of its leaf among the parameters.
      length: number of its rows.
      rows: `rows(batch)`: which rows a batch looks up, integers of any shape.
      outputs: `outputs(capacity)`: as the task's own `outputs`, for a table of `capacity` rows, of which
        `batch["positions"]`, shaped like `rows(batch)`, says where each lookup goes.
    """

    path: str
    length: int
    rows: Callable[[Any], jax.Array]
    outputs: Callable[[int], Callable[..., Any]]


class Taken(NamedTuple):
    """The origin of gathered rows.

    Attributes:
      rows: `(capacity,)`, rising; beyond the last, the length of the table.
      positions: where each lookup of the batch is found among them; `capacity` for one outside the table, so that it
        gives NaN as it does in the whole table.
    """

    rows: jax.Array
    positions: jax.Array


def taken(lookups: jax.Array, length: int) -> Taken:
    """The distinct rows among `lookups`, in order, padded to the largest possible number.

    Lookups are read as `jnp.take` does: negative ones from the end, and those outside `[-length, length)` are no rows.
    """
    capacity = min(length, lookups.size)
    # A flag for each row of the table and one pass over them: ten times faster than sorting the lookups.
    flags = jnp.zeros(length, bool).at[lookups.reshape(-1)].set(True, mode="drop")
    (rows,) = jnp.nonzero(flags, size=capacity, fill_value=length)
    places = jnp.cumsum(flags) - 1
    return Taken(rows, places.at[lookups].get(mode="fill", fill_value=capacity))


def gather(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of a table, zeros for those beyond its end."""
    return table.at[rows].get(mode="fill", fill_value=0, indices_are_sorted=True)


def scatter(table: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """The table with `values` in these rows, which are distinct except for those beyond its end, which are dropped."""
    return table.at[rows].set(values, mode="drop", indices_are_sorted=True)


def map_table(fn: Callable[..., jax.Array], path: str, tree: Any, *rest: Any) -> Any:
    """`fn` on the table at `path` of a tree of parameters, and on all that is kept for it in an optimizer's state.

    Args:
      fn: what to do to it.
      path: of the table among the parameters, all of it.
      tree: parameters; or a `Trainable`, or the state of an optimizer of one, which hold such trees as `params`.
      rest: trees alike, whose tables `fn` gets too.
    """

    # Not by `optax.tree_map_params`: it takes no second state of an optimizer, which `put_back` needs, and wants the
    # optimizer beside each state.
    def one(at: tuple[Any, ...], leaf: Any, *others: Any) -> Any:
        return fn(leaf, *others) if sapp.path_string(_below_params(at)) == path else leaf

    return jax.tree_util.tree_map_with_path(one, tree, *rest)


def _below_params(at: tuple[Any, ...]) -> tuple[Any, ...]:
    """The part of a leaf's path that lies below the field `params` of a `Trainable`; where there is none, all of it."""
    field = jax.tree_util.GetAttrKey("params")  # a field, where the parameters' own dicts have keys
    return at[at.index(field) + 1 :] if field in at else at


def take(path: str, tree: Any, rows: jax.Array) -> Any:
    """The tree with the small table of these rows in place of the whole."""
    return map_table(lambda table: gather(table, rows), path, tree)


def put_back(path: str, tree: Any, small: Any, rows: jax.Array) -> Any:
    """The small tree with the whole table, in which these rows have the small one's values."""
    return map_table(lambda values, table: scatter(table, rows, values), path, small, tree)


def fresh_at(boundary: jax.Array, path: str, opt_state: Any) -> Any:
    """The optimizer's state with zeros for all moments of the table where a phase begins.

    Zeros are what momentum and Adam start with. An optimizer whose state for a parameter starts with anything else
    would not start afresh.
    """
    # A branch: what passes through untouched is not copied, and `jnp.where` would read and write it all.
    return map_table(lambda x: lax.cond(boundary, jnp.zeros_like, lambda x: x, x), path, opt_state)
