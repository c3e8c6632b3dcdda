"""Specialised networks saved to files, and called in other processes without the model's code.

    network = sapp.specialize(fn, example)
    network.save("network.safetensors")
    fast = sapp.serve.load("network.safetensors")  # in another process
    y = fast(x)

A file may hold networks for several batch sizes, and then accepts any batch size.
"""

import os
import pathlib
import tempfile
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import jax
import jax.export
import numpy as np

from sa_plus_plus.sparse.arguments import instead, jitted, shape_and_type, shapes
from sa_plus_plus.sparse.files import programs
from sa_plus_plus.sparse.files.programs import Stored
from sa_plus_plus.sparse.ops import native
from sa_plus_plus.sparse.ops.inference import inference


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

    def __init__(self, stored: Stored):
        self._stored = stored
        pairs = zip(stored.programs, stored.weights, strict=True)
        self._calls = [jitted(_callable(program), weights) for program, weights in pairs]
        trees = [jax.tree.unflatten(program.in_tree, program.in_avals)[0] for program in stored.programs]
        self._inputs = [arguments[1:] for arguments in trees]
        self._input_tree: Any = jax.tree.structure(self._inputs[0])
        outputs = [program.out_avals for program in stored.programs]
        several = len(stored.programs) > 1
        self.batches = _batch_sizes([jax.tree.leaves(tree) for tree in self._inputs]) if several else ()
        if {*map(jax.tree.structure, self._inputs)} != {self._input_tree} or [*self.batches] != sorted(self.batches):
            raise ValueError("its networks take different arguments, or are not in order of their batches")
        if len({program.out_tree for program in stored.programs}) > 1:
            raise ValueError("its networks return different results")
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
        got = [(x.shape, x.dtype) if isinstance(x, jax.Array) else shape_and_type(x) for x in leaves]
        for number, want in enumerate(self._inputs):
            if got == _kinds(jax.tree.leaves(want)):
                return self._called(number, inputs)
        return self._in_pieces(leaves, got)

    def _called(self, number: int, inputs: Any) -> Any:
        call, weights = self._calls[number]
        return call(weights, *inputs)

    def _in_pieces(self, leaves: list[Any], got: list[Any]) -> Any:
        """Run a batch of a size that was not saved."""
        largest = jax.tree.leaves(self._inputs[-1])
        sizes = {shape[:1] for shape, _ in got}
        fits = all(
            dtype == x.dtype and len(shape) > 0 and type(shape[0]) is int and shape[1:] == x.shape[1:]
            for (shape, dtype), x in zip(got, largest, strict=True)
        )
        if not self.batches or not fits or len(sizes) != 1:
            batches = f", in batches of any size, the same for every input ({self.batches} saved)" * bool(self.batches)
            want = _kinds(largest)
            raise ValueError(
                f"this network was made for {shapes(want)}{batches}; got {shapes(got)}: {instead(want, got)}"
            )
        if not self._cuts:
            raise ValueError(
                f"an output of this network does not have the batch as its leading axis, so only the batches that were "
                f"saved can be run: {', '.join(map(str, self.batches))}, not {got[0][0][0]}"
            )
        # NumPy, for which JAX need not compile a program for each size; but within another program there are no values
        # yet, and NumPy has no random keys.
        keys = any(_is_key(a.dtype) for a in (*largest, *self._stored.programs[-1].out_avals))
        xp = jax.numpy if keys or any(isinstance(x, jax.core.Tracer) for x in leaves) else np
        arrays = [x if _is_key(dtype) else xp.asarray(x, dtype) for x, (_, dtype) in zip(leaves, got, strict=True)]
        count, most = got[0][0][0], self.batches[-1]
        pieces = [self._padded([a[i : i + most] for a in arrays], xp) for i in range(0, max(count, 1), most)]
        return jax.tree.map(lambda *parts: jax.numpy.asarray(xp.concatenate(parts)), *pieces)

    def _padded(self, arrays: list[Any], xp: Any) -> Any:
        """At most the largest batch, computed by `xp`, NumPy or JAX's."""
        count = arrays[0].shape[0]
        number = next(i for i, n in enumerate(self.batches) if n >= count)
        batch = self.batches[number]
        full = [xp.concatenate([a, _padding((batch - count, *a.shape[1:]), a.dtype, xp)]) for a in arrays]
        result = self._called(number, jax.tree.unflatten(self._input_tree, full))
        return jax.tree.map(lambda y: xp.asarray(y)[:count], result)

    def __str__(self) -> str:
        return "\n\n".join(self._stored.tables)

    def __reduce__(self) -> Any:
        return _reduced(self._stored)


def _callable(program: jax.export.Exported) -> Any:
    """The program as a function that can be mapped, but not differentiated."""
    return inference(
        jax.custom_batching.sequential_vmap(program.call),
        "a network from a file, which is for inference: differentiate the function that it was made from",
    )


def save(path: str | os.PathLike[str], networks: Specialised | Sequence[Specialised]) -> int:
    """Write a specialised network, or those of one function at several batch sizes, to one file, atomically.

    The file holds the programs, equal weights only once, and a checksum for each, but none of the model's code. It is
    for the platform on which it was made, and for later versions of JAX within the guarantee of `jax.export`, half a
    year. The compiled kernel chooses its instruction set when the file is loaded. Needs the packages `safetensors` and
    `flatbuffers`.

        >>> import os, tempfile, jax.numpy as jnp, sa_plus_plus as sapp
        >>> fn = lambda x: x @ jnp.ones((16, 16))
        >>> networks = [sapp.specialize(fn, jnp.ones((n, 16)), mode="always") for n in (1, 4)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = sapp.serve.save(os.path.join(folder, "network"), networks)
        ...     fast = sapp.serve.load(os.path.join(folder, "network"))
        >>> fast.batches
        (1, 4)
        >>> fast(jnp.ones((6, 16))).shape
        (6, 16)

    Args:
      path: of the file.
      networks: results of `sapp.specialize`. If there are several, the batch must be the leading axis of every
        input, and they must be the same function: that their results agree is not checked.

    Returns:
      The file's size in bytes.

    Raises:
      ValueError: if there are none, their inputs differ by more than the leading axis, a batch size comes twice, or
        arguments or results are pytrees that `jax.export` cannot write.
      ImportError: without `safetensors` or `flatbuffers`.
    """
    return programs.write(path, _stored(networks))


def load(path: str | os.PathLike[str], *, custom_calls: Collection[str] = ()) -> Loaded:
    """Load a file written by `save` or `Network.save`, to be called like the network. See `save` for an example.

    The file holds a program: like a pickle, it is for those who trust its source. Damage is noticed, and a program that
    calls functions outside this package is refused; but the reader of programs and the compiler, XLA, are not made for
    forged ones, and may crash.

    Args:
      path: of the file.
      custom_calls: names of functions outside this package that the program may call, such as LAPACK's, which
        `jax.numpy.linalg` calls and which do not check sizes. The error lists those that a file needs.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, holds something else, is for another platform or version, or calls functions that
        are not permitted.
      RuntimeError: if it needs the compiled kernel, and this installation has none.
      ImportError: without `safetensors` or `flatbuffers`.
    """
    stored = programs.read(path, custom_calls)
    try:
        return Loaded(stored)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def loads(content: bytes, custom_calls: Collection[str] = ()) -> Loaded:
    """`load` from a file's bytes; called by pickle.

    Args:
      content: of a file that `save` wrote.
      custom_calls: as `load` takes them.

    Raises:
      ValueError: as `load` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "network")
        path.write_bytes(content)
        return load(path, custom_calls=custom_calls)


def dumps(networks: Specialised | Sequence[Specialised]) -> bytes:
    """The bytes that `save` would write.

    Args:
      networks: as `save` takes them.

    Raises:
      ValueError: as `save` does.
    """
    return _bytes_of(_stored(networks))


def reduced(network: Specialised) -> tuple[Any, ...]:
    """What pickle is to write for a network: the call that loads its file.

    Args:
      network: a result of `sapp.specialize`.

    Raises:
      ValueError: as `save` does.
    """
    return _reduced(_stored(network))


def set_threads(count: int) -> None:
    """Set how many threads the compiled kernel may use, process-wide, from the next call on. Results do not change.

        >>> import sa_plus_plus as sapp
        >>> if sapp.sparse.native.unavailable_reason() is None:
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


def _stored(networks: Specialised | Sequence[Specialised]) -> Stored:
    """The networks as `save` writes them: checked, in order of their batch sizes."""
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
    return Stored(exported, weights, [str(network) for network in several])


def _exported(network: Specialised) -> tuple[jax.export.Exported, list[Any]]:
    arrays, structure = jax.tree.flatten(network.weights)

    def run(weights: Any, *inputs: Any) -> Any:
        return network.fn(jax.tree.unflatten(structure, weights), *inputs)

    return programs.exported(run, arrays, network.examples), arrays


def _reduced(stored: Stored) -> tuple[Any, ...]:
    return loads, (_bytes_of(stored), programs.foreign(stored))  # a pickle is for those who trust it anyway


def _bytes_of(stored: Stored) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "network")
        programs.write(path, stored)
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


def _is_key(dtype: Any) -> bool:
    return jax.numpy.issubdtype(dtype, jax.dtypes.extended)


def _padding(shape: tuple[int, ...], dtype: Any, xp: Any) -> Any:
    return jax.numpy.empty(shape, dtype) if _is_key(dtype) else xp.zeros(shape, dtype)


def _kinds(values: Sequence[Any]) -> list[tuple[tuple[int, ...], Any]]:
    return [(x.shape, x.dtype) for x in values]
