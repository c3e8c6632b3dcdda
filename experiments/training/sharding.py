"""Sharding of arrays: the only place that builds a mesh.

A step is written once, in the global view, and `jax.jit` shards it over the mesh. Batches are sharded over all
devices; the state is replicated, or with `fsdp > 1` parameters, logits and optimizer state are sharded over that axis.
Masks are identical on every host by construction: they are part of the single global program's state, computed from
scores already summed over devices, by comparisons and integer counts, which do not depend on the order of summation.
"""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices, by default all of all hosts, as a `data x fsdp` mesh.

    Raises:
      ValueError: if the number of devices is not a multiple of `fsdp`.
    """
    count = len(devices or jax.devices())
    if fsdp < 1 or count % fsdp:
        raise ValueError(f"config.mesh.fsdp={fsdp} does not divide the number of devices, {count}")
    return jax.make_mesh((count // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def of_state(abstract: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf of a state: split along the longest axis that `fsdp` divides, else replicated."""
    fsdp = mesh.shape["fsdp"]

    def sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis, n in enumerate(leaf.shape) if n % fsdp == 0 and n >= fsdp]
        if fsdp == 1 or not axes:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(["fsdp" if a == longest else None for a in range(len(leaf.shape))])))

    return jax.tree.map(sharding, abstract)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def of_batch(mesh: Mesh, example_axis: int = 0) -> NamedSharding:
    """Examples, which lie along `example_axis`, over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * example_axis, AXES))


def check_batch(size: int, mesh: Mesh, name: str) -> None:
    """Refuse a global batch that the devices or the hosts cannot share evenly."""
    if size % mesh.size:
        raise ValueError(f"{name}={size} is not a multiple of the {mesh.size} devices")


def place(batch: Any, sharding: NamedSharding) -> Any:
    """Put this host's part of a global batch on the devices.

    A single CPU device shares its memory with the host: the compiled step takes the arrays as they are, in a fraction
    of the time that placing them ahead takes.
    """
    if sharding.mesh.size == 1 and sharding.mesh.devices.flat[0].platform == "cpu":
        return batch
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree: what a checkpoint is restored to."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def from_first(compute: Callable[[], Any]) -> Any:
    """What `compute()` returns or raises on process 0, on all processes; it is called on process 0 only."""
    if jax.process_count() == 1:
        return compute()
    outcome: tuple[Any, Exception | None] = None, None
    if jax.process_index() == 0:
        try:
            outcome = compute(), None
        except Exception as error:
            outcome = None, error
    message = np.frombuffer(pickle.dumps(outcome), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(message.size)))
    message = multihost_utils.broadcast_one_to_all(np.resize(message, size))  # process 0's own has that size
    value, failure = pickle.loads(message.tobytes())
    if failure is not None:
        raise failure
    return value
