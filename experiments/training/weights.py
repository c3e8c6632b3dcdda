"""Trained weights as a start or a teacher: from a finished run, a checkpoint, or a safetensors file."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

import sa_plus_plus as sapp
from experiments.training import checkpoint

WEIGHTS = "pruned.safetensors"  # what a run leaves, a dense one too
_PARAMS = "params/"
_NAMED = 3  # differences in an error


class Variables(NamedTuple):
    """The variables of a network, in host memory.

    Attributes:
      params: its parameters, in full.
      model_state: what it carries besides, such as batch statistics; None where the source has none.
    """

    params: Any
    model_state: Any


def read(source: str, params: Any, model_state: Any, where: str) -> Variables:
    """The weights at a path, for a model with these parameters.

    Args:
      source: a run's directory (its `pruned.safetensors`, or if it has not finished its newest checkpoint), its
        `checkpoints` or one of them, or a safetensors file: of `sapp.save`, or of dense tensors named by path,
        `Dense_0/kernel`, or with model state `params/Dense_0/kernel` and `batch_stats/…`.
      params: the model's parameters or their shapes.
      model_state: likewise, what else it carries.
      where: the config key, for errors.

    Raises:
      FileNotFoundError: if there is nothing of the kind.
      ValueError: if it cannot be read, is of another network, or has values that are not finite.
    """
    path = pathlib.Path(source).expanduser()
    place = f"{where}={source}"
    try:
        leaves = _of_directory(path) if path.is_dir() else _of_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place}: {error}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{place}: {error}") from error
    if not any(name.startswith(_PARAMS) for name in leaves):
        leaves = {_PARAMS + name: leaf for name, leaf in leaves.items()}
    has_state = any(not name.startswith(_PARAMS) for name in leaves)
    like = {"params": params, **(model_state if has_state else {})}
    tree = _fitted(leaves, like, place)
    return Variables(tree.pop("params"), tree if has_state else None)


def _of_directory(path: pathlib.Path) -> dict[str, Any]:
    if (path / WEIGHTS).exists():
        return _of_file(path / WEIGHTS)
    inner = path / "checkpoints"
    try:
        return _of_checkpoint(inner if inner.is_dir() else path)
    except FileNotFoundError:
        raise FileNotFoundError(f"a directory with neither {WEIGHTS} nor a checkpoint in it") from None


def _of_checkpoint(folder: pathlib.Path) -> dict[str, np.ndarray]:
    kinds = {".trainable.params": "params", ".model_state": ""}

    def kind(name: str) -> str | None:
        return next((start for start in kinds if name.startswith(f"{start}[")), None)

    names, arrays = checkpoint.read(folder, lambda name: kind(name) is not None)
    if any(name.startswith(".prune.masks[") for name in names):
        raise ValueError(
            f"the newest checkpoint in {folder} is of a run that prunes, whose weights are not the network's until it "
            f"has finished: let it finish, and take its {WEIGHTS}"
        )
    leaves = {}
    for name, array in arrays.items():
        start = kind(name) or ""
        keys = re.findall(r"\['(.*?)'\]", name.removeprefix(start))
        leaves["/".join([*([kinds[start]] if kinds[start] else []), *keys])] = array
    return leaves


def _of_file(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError("there is no such file or directory")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            ours = "sa_plus_plus" in (file.metadata() or {})
            plain = {} if ours else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:  # the latter for dtypes NumPy has not
        raise ValueError(f"damaged, or not a safetensors file of NumPy's dtypes: {error}") from error
    if not ours:
        return plain
    return {sapp.path_string(keys): leaf for keys, leaf in _leaves(sapp.todense(sapp.load(path)))}


def _fitted(leaves: Mapping[str, Any], like: Any, place: str) -> Any:
    """The leaves as a tree like `like`, in its dtypes.

    Raises:
      ValueError: naming what differs, or what is not finite.
    """
    wanted = {sapp.path_string(keys): leaf for keys, leaf in _leaves(like)}
    differing = [
        f"{name.removeprefix(_PARAMS)} is {_shown(leaves.get(name))} there and {_shown(wanted.get(name))} in the model"
        for name in [*wanted, *sorted(leaves.keys() - wanted.keys())]
        if not _fits(leaves.get(name), wanted.get(name))
    ]
    if differing:
        more = f"; and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
        raise ValueError(f"{place} is of another network: {'; '.join(differing[:_NAMED])}{more}")
    values = {name: np.asarray(leaves[name], leaf.dtype) for name, leaf in wanted.items()}
    for name, value in values.items():
        if bad := value.size - int(np.isfinite(value.astype(np.float32)).sum()):
            raise ValueError(
                f"{place}: {name} holds {bad} NaN or infinite values of {value.size}: did its run diverge?"
            )
    return jax.tree.unflatten(jax.tree.structure(like), list(values.values()))


def _fits(found: Any, wanted: Any) -> bool:
    """Whether an array may stand for another: of its shape, and of its dtype or a floating one for a floating one."""
    if found is None or wanted is None or np.shape(found) != tuple(wanted.shape):
        return False
    both_floating = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (found, wanted))
    return both_floating or found.dtype == wanted.dtype


def _shown(leaf: Any) -> str:
    return "absent" if leaf is None else f"{np.dtype(leaf.dtype).name} {tuple(leaf.shape)}"


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)
