"""Specialised networks saved to files, and called in other processes without the model's code.

    network = sapp.specialize(fn, example)
    network.save("network.safetensors")
    fast = sapp.serve.load("network.safetensors")  # in another process
    y = fast(x)

A file may hold networks for several batch sizes, and then accepts any batch size.
"""

import importlib.util
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.export
import numpy as np

import sa_plus_plus.sparse.native as native
import sa_plus_plus.sparse.serialization as serialization
from sa_plus_plus.sparse.calibration import shapes
from sa_plus_plus.sparse.packing import narrowed

FORMAT = 2  # 1: programs that call the compiled kernel with other options
_KIND = "sa_plus_plus network"


class Specialised(Protocol):
    """What is saved: `sapp.sparse.Network`."""

    weights: Any
    fn: Any

    @property
    def examples(self) -> tuple[Any, ...]: ...


class Loaded:
    """Networks from a file: one function, for one or several batch sizes; safe to call from several threads.

    A file with one network accepts only inputs of its shapes. A file with several accepts any batch: it is padded with
    zeros to the smallest saved batch that holds it, and the outputs are cut; a larger batch is run in pieces of the
    largest. This is correct for functions that treat each row of a batch independently.

    Attributes:
      batches: the batch sizes, ascending; empty if there is one network.
    """

    def __init__(
        self, exported: Sequence[jax.export.Exported], weights: Sequence[Sequence[Any]], tables: Sequence[str]
    ):
        self._exported, self._weights, self._tables = exported, weights, tables
        self._calls = [jax.jit(program.call) for program in exported]
        trees = [jax.tree.unflatten(program.in_tree, program.in_avals)[0] for program in exported]
        self._inputs = [arguments[1:] for arguments in trees]
        self._input_tree: Any = jax.tree.structure(self._inputs[0])
        outputs = [program.out_avals for program in exported]
        self.batches = _batch_sizes([jax.tree.leaves(tree) for tree in self._inputs]) if len(exported) > 1 else ()
        self._cuts = all(
            y.shape[:1] == (n,) for n, several in zip(self.batches, outputs, strict=False) for y in several
        )

    def __call__(self, *inputs: Any) -> Any:
        """The function's result.

        Args:
          inputs: arguments like those that the networks were made for.

        Raises:
          ValueError: for other arguments, shapes or dtypes, or a batch that was not saved where an output does not
            have the batch as its leading axis.
        """
        leaves, tree = jax.tree.flatten(inputs)
        if tree != self._input_tree:
            raise ValueError(f"this network was made for arguments like {self._input_tree}, got {tree}")
        leaves = [x if isinstance(x, jax.Array) else np.asarray(x, jax.numpy.result_type(x)) for x in leaves]
        got = _kinds(leaves)
        for number, want in enumerate(self._inputs):
            if got == _kinds(jax.tree.leaves(want)):
                return self._calls[number](self._weights[number], *inputs)
        return self._in_pieces(leaves, got)

    def _in_pieces(self, leaves: list[Any], got: list[Any]) -> Any:
        """Run a batch of a size that was not saved."""
        largest = jax.tree.leaves(self._inputs[-1])
        sizes = {shape[:1] for shape, _ in got}
        fits = all(
            dtype == x.dtype and shape[:1] and shape[1:] == x.shape[1:]
            for (shape, dtype), x in zip(got, largest, strict=True)
        )
        if not self.batches or not fits or len(sizes) != 1:
            batches = f", in batches of any size, the same for every input ({self.batches} saved)" * bool(self.batches)
            raise ValueError(f"this network was made for {shapes(_kinds(largest))}{batches}; got {shapes(got)}")
        if not self._cuts:
            raise ValueError(
                f"an output of this network does not have the batch as its leading axis, so only the batches that were "
                f"saved can be run: {', '.join(map(str, self.batches))}, not {leaves[0].shape[0]}"
            )
        arrays = [_on_host(x) for x in leaves]
        count, most = arrays[0].shape[0], self.batches[-1]
        pieces = [self._padded([a[i : i + most] for a in arrays]) for i in range(0, max(count, 1), most)]
        return jax.tree.map(lambda *parts: jax.numpy.asarray(_joined(parts)), *pieces)

    def _padded(self, arrays: list[Any]) -> Any:
        """At most the largest batch, as NumPy arrays: JAX would compile a program for each size."""
        count = arrays[0].shape[0]
        number = next(i for i, n in enumerate(self.batches) if n >= count)
        batch = self.batches[number]
        full = [_joined([a, _zeros((batch - count, *a.shape[1:]), a.dtype)]) for a in arrays]
        result = self._calls[number](self._weights[number], *jax.tree.unflatten(self._input_tree, full))
        return jax.tree.map(lambda y: _on_host(y)[:count], result)

    def __str__(self) -> str:
        return "\n\n".join(self._tables)

    def __reduce__(self) -> Any:
        return loads, (_bytes_of(lambda path: _write(path, self._exported, self._weights, self._tables)),)


def save(path: str | os.PathLike[str], networks: Specialised | Sequence[Specialised]) -> int:
    """Write a specialised network, or those of one function at several batch sizes, to one file, atomically.

    The file holds the programs, equal weights only once, and a checksum for each, but none of the model's code. It is
    for the platform on which it was made, and for later versions of JAX within the guarantee of `jax.export`, half a
    year. The compiled kernel chooses its instruction set when the file is loaded. Needs the packages `safetensors` and
    `flatbuffers`.

        >>> import os, tempfile, jax.numpy as jnp, sa_plus_plus as sapp
        >>> fn = lambda x: x @ jnp.ones((16, 16))
        >>> networks = [sapp.specialize(fn, jnp.ones((n, 16)), choose="all") for n in (1, 4)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = sapp.serve.save(os.path.join(folder, "network"), networks)
        ...     fast = sapp.serve.load(os.path.join(folder, "network"))
        >>> fast.batches
        (1, 4)
        >>> fast(jnp.ones((6, 16))).shape
        (6, 16)

    Args:
      path: of the file.
      networks: what `sapp.specialize` returned. If there are several, the batch must be the leading axis of every
        input, and they must be the same function: that their results agree is not checked.

    Returns:
      The file's size in bytes.

    Raises:
      ValueError: if there are none, their inputs differ by more than the leading axis, a batch size comes twice, or
        arguments or results are pytrees that `jax.export` cannot write.
      ImportError: without `safetensors` or `flatbuffers`.
    """
    several = list(networks) if isinstance(networks, Sequence) else [networks]
    if not several:
        raise ValueError("there is no network to save: give at least one")
    if len(several) > 1:
        structures = {jax.tree.structure(network.examples) for network in several}
        if len(structures) > 1:
            raise ValueError(f"the networks take different arguments, {' and '.join(map(str, structures))}")
        several.sort(key=lambda network: tuple(x.shape for x in jax.tree.leaves(network.examples)))
        _batch_sizes([jax.tree.leaves(network.examples) for network in several])
    exported, weights = zip(*map(_exported, several), strict=True)
    return _write(path, exported, weights, [str(network) for network in several])


def load(path: str | os.PathLike[str]) -> Loaded:
    """Load a file written by `save` or `Network.save`, to be called like the network. See `save` for an example.

    Args:
      path: of the file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, holds something else, or is for another platform or version.
      RuntimeError: if it needs the compiled kernel, and this installation has none.
      ImportError: without `safetensors` or `flatbuffers`.
    """
    _need_flatbuffers()
    tree = serialization.load(path)
    try:
        about = json.loads(bytes(np.asarray(tree["about"])))
        ours = about["kind"] == _KIND
    except (KeyError, TypeError, ValueError):
        ours = False
    if not ours:
        raise ValueError(f"{path} holds parameters, not a network: read it by sapp.load, or write one by Network.save")
    if about["format"] > FORMAT:
        raise ValueError(f"{path} has format {about['format']}, this version reads up to {FORMAT}: install a newer one")
    if about["format"] < FORMAT:
        raise ValueError(f"{path} has format {about['format']}, this version reads {FORMAT}: write it again")
    _check_here(path, about)
    stored = tree.get("weights", {})
    exported, weights = [], []
    for number, network in enumerate(about["networks"]):
        try:
            exported.append(jax.export.deserialize(bytearray(np.asarray(tree["programs"][str(number)]))))
        except Exception as error:
            raise ValueError(
                f"{path} was written with jax {about['jax']}, jax {jax.__version__} cannot read its program: {error}"
            ) from error
        weights.append([stored[str(i)] for i in network["weights"]])
        if any(narrowed(a.dtype) for a in exported[-1].in_avals):
            raise ValueError(f"{path} computes in 64 bits: call jax.config.update('jax_enable_x64', True) first")
    return Loaded(exported, weights, [network["table"] for network in about["networks"]])


def loads(content: bytes) -> Loaded:
    """`load` from a file's bytes; called by pickle.

    Args:
      content: of a file that `save` wrote.

    Raises:
      ValueError: as `load` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "network")
        path.write_bytes(content)
        return load(path)


def dumps(networks: Specialised | Sequence[Specialised]) -> bytes:
    """The bytes that `save` would write.

    Args:
      networks: as `save` takes them.

    Raises:
      ValueError: as `save` does.
    """
    return _bytes_of(lambda path: save(path, networks))


def set_threads(count: int) -> None:
    """Set how many threads the compiled kernel may use, process-wide, from the next call on. Results do not change.

        >>> import sa_plus_plus as sapp
        >>> if sapp.sparse.native.missing() is None:
        ...     sapp.serve.set_threads(1)
        ...     sapp.serve.set_threads(0)

    Args:
      count: 1 or more, at most as many as XLA has; 0: as many as XLA has, as at the start.

    Raises:
      ValueError: if it is negative or not an integer.
      RuntimeError: if there is no compiled kernel.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"the number of threads must be an integer, 0 for as many as XLA has, got {count!r}")
    native.set_threads(count)


def _exported(network: Specialised) -> tuple[jax.export.Exported, list[Any]]:
    arrays, structure = jax.tree.flatten(network.weights)

    def run(weights: Any, *inputs: Any) -> Any:
        return network.fn(jax.tree.unflatten(structure, weights), *inputs)

    allowed = [jax.export.DisabledSafetyCheck.custom_call(target) for target in native.TARGETS]
    return jax.export.export(jax.jit(run), disabled_checks=allowed)(arrays, *network.examples), arrays


def _write(path: Any, exported: Sequence[jax.export.Exported], weights: Any, tables: Sequence[str]) -> int:
    _need_flatbuffers()
    stored: dict[str, int] = {}
    tensors, programs, networks = {}, {}, []
    for number, (program, arrays, table) in enumerate(zip(exported, weights, tables, strict=True)):
        programs[str(number)] = np.frombuffer(program.serialize(), np.uint8)
        numbers = []
        for array in map(np.asarray, arrays):
            i = stored.setdefault(serialization.digest(array), len(stored))
            tensors[str(i)] = array
            numbers.append(i)
        networks.append({"weights": numbers, "table": table})
    about = {
        "kind": _KIND,
        "format": FORMAT,
        "jax": jax.__version__,
        "platforms": exported[0].platforms,
        "calling_convention": exported[0].calling_convention_version,
        "compiled": any(t.encode() in program.mlir_module_serialized for program in exported for t in native.TARGETS),
        "inputs": [[str(a) for a in program.in_avals[len(w) :]] for program, w in zip(exported, weights, strict=True)],
        "outputs": [[str(a) for a in program.out_avals] for program in exported],
        "networks": networks,
    }
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    return serialization.save(path, {"about": text, "programs": programs, "weights": tensors}).bytes


def _bytes_of(write: Callable[[pathlib.Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "network")
        write(path)
        return path.read_bytes()


def _batch_sizes(several: Sequence[Sequence[Any]]) -> tuple[int, ...]:
    """The batch size of each network, from the shapes of its inputs, which may differ in nothing else."""
    for inputs in several:
        if not inputs or len({x.shape[:1] for x in inputs}) > 1 or not inputs[0].shape:
            raise ValueError(
                f"inputs are {shapes(_kinds(inputs))}: for several batch sizes in one file, all inputs need the batch "
                "as their leading axis"
            )
        for x, other in zip(inputs, several[0], strict=True):
            if x.shape[1:] != other.shape[1:] or x.dtype != other.dtype:
                raise ValueError(
                    f"the networks' inputs differ in more than the batch: {shapes(_kinds(several[0]))} and "
                    f"{shapes(_kinds(inputs))}"
                )
    sizes = tuple(inputs[0].shape[0] for inputs in several)
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"two networks have the same batch size: {', '.join(map(str, sizes))}")
    return sizes


def _check_here(path: Any, about: dict[str, Any]) -> None:
    """Check that this installation can run the file."""
    here, version = jax.default_backend(), about["calling_convention"]
    known = {"gpu": {"cuda", "rocm"}}.get(here, {here})
    if not known & set(about["platforms"]):
        raise ValueError(
            f"{path} is for {', '.join(about['platforms'])}, JAX runs on {here}: save it on such a machine"
        )
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    if not oldest <= version <= newest:
        raise ValueError(
            f"{path} was written with jax {about['jax']}, in version {version} of its format for programs; jax "
            f"{jax.__version__} reads {oldest} to {newest}: install a version nearer to it, or save the network again"
        )
    why = native.missing()
    if about["compiled"] and why:
        raise RuntimeError(f"{path} needs the compiled kernel for CPUs, and there is none: {why}")


def _is_key(dtype: Any) -> bool:
    return jax.numpy.issubdtype(dtype, jax.dtypes.extended)


def _on_host(x: Any) -> Any:
    return x if _is_key(x.dtype) else np.asarray(x)  # NumPy has no random keys


def _zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    return (jax.numpy.empty if _is_key(dtype) else np.zeros)(shape, dtype)


def _joined(parts: Sequence[Any]) -> Any:
    return (jax.numpy if _is_key(parts[0].dtype) else np).concatenate(parts)


def _kinds(values: Sequence[Any]) -> list[tuple[tuple[int, ...], Any]]:
    return [(x.shape, x.dtype) for x in values]


def _need_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("files of networks need the package flatbuffers: pip install flatbuffers safetensors")
