"""Files of specialised networks: programs and weights, and the checks before a program is run."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from jax.extend import mlir as portable
from jax.interpreters import mlir

from sa_plus_plus.sparse.files import container
from sa_plus_plus.sparse.files.codec import as_jax, is_narrowed
from sa_plus_plus.sparse.files.container import shortened
from sa_plus_plus.sparse.files.serialization import NETWORK, kind_of
from sa_plus_plus.sparse.ops import native

FORMAT = 2  # 1: programs that call the compiled kernel with other options
PERMITTED = frozenset({*native.CALL_TARGETS, "ApproxTopK"})  # custom calls of any program; XLA itself expands the last
_DIALECTS = ("builtin", "func", "stablehlo", "chlo", "sdy")
_TALKING = ("stablehlo.infeed", "stablehlo.outfeed", "stablehlo.send", "stablehlo.recv")  # would wait for the host
_ABOUT = {
    "format": int,
    "jax": str,
    "platforms": [str],
    "calling_convention": int,
    "compiled": bool,
    "inputs": [[str]],  # for readers of the file; as long as the networks are many
    "outputs": [[str]],
    "networks": [{"weights": [int], "table": str}],
}


class Stored(NamedTuple):
    """The networks of a file, of one function.

    Attributes:
      programs: each takes a list of weights, then the function's arguments.
      weights: for each program.
      tables: text for each.
    """

    programs: Sequence[jax.export.Exported]
    weights: Sequence[Sequence[Any]]
    tables: Sequence[str]


def exported(run: Any, weights: Any, examples: Sequence[Any]) -> jax.export.Exported:
    """`run(weights, *examples)` as a program, without the names of source files: the same bytes wherever it is made."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call(target) for target in native.CALL_TARGETS]
    with _without_tracebacks():
        return jax.export.export(jax.jit(run), disabled_checks=allowed)(weights, *examples)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    before = jax.config.values["jax_traceback_in_locations_limit"]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def write(path: str | os.PathLike[str], stored: Stored) -> int:
    """Write networks to one file, atomically. Returns its size.

    Args:
      path: of the file.
      stored: the networks.

    Raises:
      ValueError: for arguments or results that `jax.export` cannot write.
      ImportError: without `safetensors` or `flatbuffers`.
    """
    _need_flatbuffers()
    numbers: dict[str, int] = {}  # by checksum: equal weights are written once
    tensors, networks = {}, []
    for number, (program, arrays, table) in enumerate(zip(*stored, strict=True)):
        tensors[f"programs/{number}"] = np.frombuffer(program.serialize(), np.uint8)
        used = []
        for array in map(np.asarray, arrays):
            used.append(numbers.setdefault(container.digest(array), len(numbers)))
            tensors[f"weights/{used[-1]}"] = array
        networks.append({"weights": used, "table": table})
    programs, weights = stored.programs, stored.weights
    about = {
        "kind": NETWORK,
        "format": FORMAT,
        "jax": jax.__version__,
        "platforms": programs[0].platforms,
        "calling_convention": programs[0].calling_convention_version,
        "compiled": any(_contents(program).calls & {*native.CALL_TARGETS} for program in programs),
        "inputs": [[str(a) for a in program.in_avals[len(w) :]] for program, w in zip(programs, weights, strict=True)],
        "outputs": [[str(a) for a in program.out_avals] for program in programs],
        "networks": networks,
    }
    tensors["about"] = np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)
    return container.write(path, tensors, {"format": container.FORMAT, "kernels": {}})


def read(path: str | os.PathLike[str], custom_calls: Collection[str] = ()) -> Stored:
    """The networks of a file that `write` wrote.

    Args:
      path: of the file.
      custom_calls: names of functions outside this package that the programs may call.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, holds something else, is for another platform or version, or calls other functions.
      RuntimeError: if it needs the compiled kernel, and this installation has none.
      ImportError: without `safetensors` or `flatbuffers`.
    """
    _need_flatbuffers()
    tensors, header = container.read(path)
    if kind_of(tensors) != NETWORK:
        raise ValueError(f"{path} holds parameters, not a network: read it by sapp.load, or write one by Network.save")
    about = json.loads(tensors["about"].tobytes())
    damage = container.misfit(about, {"format": int}, "about")
    if not damage and about["format"] != FORMAT:
        what = f"up to {FORMAT}: install a newer one" if about["format"] > FORMAT else f"{FORMAT}: write it again"
        raise ValueError(f"{path} has format {shortened(about['format'])}, this version reads {what}")
    damage = damage or container.misfit(about, _ABOUT, "about") or _misnamed(tensors, about)
    if damage or header["kernels"]:
        raise ValueError(f"{path} is damaged: {damage or 'a network has no kernels by blocks'}")
    _check_here(path, about)
    stored = {name: as_jax(tensor) for name, tensor in tensors.items() if name.startswith("weights/")}
    programs, weights = [], []
    for number, network in enumerate(about["networks"]):
        weights.append([stored[f"weights/{i}"] for i in network["weights"]])
        programs.append(_program(path, tensors[f"programs/{number}"], about, weights[-1], custom_calls))
    return Stored(programs, weights, [network["table"] for network in about["networks"]])


class _Contents(NamedTuple):
    """What a program holds.

    Attributes:
      calls: the targets of its custom calls.
      operations: the names of all its operations.
      types: of the arguments and results of its main function.
      stated: the same, as the arrays beside the program have it.
    """

    calls: set[str]
    operations: set[str]
    types: list[list[str]]
    stated: list[list[str]]


def foreign(stored: Stored) -> list[str]:
    """The custom calls of the programs that are not permitted to every file."""
    return sorted({call for program in stored.programs for call in _contents(program).calls} - PERMITTED)


def _contents(program: jax.export.Exported) -> _Contents:
    calls, operations = set(), set()

    def visit(operation: Any) -> Any:
        operations.add(operation.name)
        if operation.name == "stablehlo.custom_call":
            calls.add(mlir.ir.StringAttr(operation.attributes["call_target_name"]).value)
        return mlir.ir.WalkResult.ADVANCE

    with mlir.make_ir_context():
        module = portable.deserialize_portable_artifact(program.mlir_module_serialized)
        module.operation.walk(visit)
        main: Any = mlir.ir.SymbolTable(module.operation)["main"]
        stated = [program.in_avals[i] for i in program.module_kept_var_idx], program.out_avals
        return _Contents(
            calls,
            operations,
            [list(map(str, types)) for types in (main.type.inputs, main.type.results)],
            [list(map(_type, avals)) for avals in stated],
        )


def _type(aval: Any) -> str:
    """The type of an array in a program; of the numbers that it consists of, if it is of random keys."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        aval = jax.eval_shape(jax.random.key_data, aval)
    return f"tensor<{'x'.join([*map(str, aval.shape), str(mlir.dtype_to_ir_type(np.dtype(aval.dtype)))])}>"


def _program(
    path: Any, content: np.ndarray, about: Mapping[str, Any], weights: Sequence[Any], custom_calls: Collection[str]
) -> jax.export.Exported:
    """The program, checked as far as that can be done without running it."""
    try:
        program = jax.export.deserialize(bytearray(content))
        contents = _contents(program)
        unfit = _unfit(program, contents, about, weights)
    except Exception as error:  # flatbuffers, JAX and MLIR have no common base class for theirs
        raise ValueError(
            f"{path} was written with jax {shortened(about['jax'])}, jax {jax.__version__} cannot read its program: "
            f"{type(error).__name__}: {error}"
        ) from error
    if foreign := sorted(contents.calls - PERMITTED - {*custom_calls}):
        raise ValueError(
            f"{path} calls {', '.join(map(shortened, foreign))}, with which a forged file could crash the process or "
            f"worse: if you trust the file, load it with custom_calls={shortened(foreign)}"
        )
    if unfit:
        raise ValueError(f"{path} is damaged: a program {unfit}")
    if contents.calls & {*native.CALL_TARGETS} and (why := native.unavailable_reason()):
        raise RuntimeError(f"{path} needs the compiled kernel for CPUs, and there is none: {why}")
    if any(_is_narrowed(aval.dtype) for aval in program.in_avals):
        raise ValueError(f"{path} computes in 64 bits: call jax.config.update('jax_enable_x64', True) first")
    return program


def _unfit(
    program: jax.export.Exported, contents: _Contents, about: Mapping[str, Any], weights: Sequence[Any]
) -> str | None:
    """What of a program contradicts its file or itself, or no network does."""
    arguments, options = jax.tree.unflatten(program.in_tree, program.in_avals)
    leading = arguments[0] if isinstance(arguments, tuple) and arguments else None
    jax.tree.unflatten(program.out_tree, program.out_avals)
    if list(program.platforms) != about["platforms"]:
        return f"is for {shortened(program.platforms)}, not {shortened(about['platforms'])}"
    if program.calling_convention_version != about["calling_convention"]:
        return f"has the calling convention {program.calling_convention_version}"
    if program.ordered_effects or program.unordered_effects:
        return "has side effects"
    if not isinstance(leading, list) or options or [*map(_kind, leading)] != [*map(_kind, weights)]:
        return "does not take the weights beside it"
    if strange := [name for name in contents.operations if name.split(".")[0] not in _DIALECTS or name in _TALKING]:
        return f"has the operation {min(strange)}"
    if contents.types != contents.stated:
        return "takes or returns other arrays than are stated beside it"
    return None


def _kind(array: Any) -> tuple[tuple[int, ...], Any]:
    return array.shape, array.dtype


def _is_narrowed(dtype: Any) -> bool:
    return not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) and is_narrowed(dtype)


def _check_here(path: Any, about: Mapping[str, Any]) -> None:
    """Check that this installation can run the file."""
    here, version = jax.default_backend(), about["calling_convention"]
    known = {"gpu": {"cuda", "rocm"}}.get(here, {here})
    if not known & {*about["platforms"]}:
        there = ", ".join(map(shortened, about["platforms"])) or "no platform"
        raise ValueError(f"{path} is for {there}, JAX runs on {here}: save it on such a machine")
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    if not oldest <= version <= newest:
        raise ValueError(
            f"{path} was written with jax {shortened(about['jax'])}, in version {version} of its format for programs; "
            f"jax {jax.__version__} reads {oldest} to {newest}: install one nearer to it, or save the network again"
        )


def _need_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError("files of networks need the package flatbuffers: pip install flatbuffers safetensors")


def _misnamed(tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> str | None:
    """What a file has too much or too little of."""
    networks = about["networks"]
    if not networks or not len(networks) == len(about["inputs"]) == len(about["outputs"]):
        counts = ", ".join(f"{len(about[what])} {what}" for what in ("networks", "inputs", "outputs"))
        return f"about has {counts}"
    programs = {f"programs/{number}" for number in range(len(networks))}
    wanted = {"about", *programs, *(f"weights/{i}" for network in networks for i in network["weights"])}
    if missing := sorted(wanted - tensors.keys()):
        return f"it has no tensor {shortened(missing[0])}"
    if unknown := sorted(tensors.keys() - wanted):
        return f"no network has the tensor {shortened(unknown[0])}"
    if odd := sorted(name for name in programs if tensors[name].dtype != np.uint8 or tensors[name].ndim != 1):
        return f"{odd[0]} is not a list of bytes"
    return None
