"""Which format a checkpoint has, told by what is in it; those that cannot be pruned are refused by their names."""

import pathlib
import zipfile

from sa_plus_plus.contrib.commands import numpy_files, orbax_files, safetensors_files
from sa_plus_plus.contrib.commands.checkpoint import Checkpoint

_TORCH = (
    "is a pickle of PyTorch's: write it as safetensors, by safetensors.torch.save_file(model.state_dict(), "
    '"model.safetensors")'
)
_KERAS = 'is of Keras: write its arrays by numpy.savez("weights.npz", **{v.path: v.numpy() for v in model.weights})'
_REFUSED = {
    ".gguf": "is GGUF, weights rounded for llama.cpp, which has no use for blocks of zeros: give the safetensors it "
    "was made from",
    ".onnx": "is a graph of ONNX: give the checkpoint that it was exported from",
    ".tflite": "is a graph of TensorFlow Lite: give the checkpoint that it was exported from",
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), _TORCH),
    **dict.fromkeys((".h5", ".hdf5", ".keras"), _KERAS),
    ".msgpack": "is of flax's old format: read it by flax.serialization.msgpack_restore and write it with orbax",
    **dict.fromkeys((".pkl", ".pickle"), "is a pickle, which may run anything: write its arrays by numpy.savez"),
    ".npy": "is one array without a name: write it by numpy.savez, or prune it by sapp.prune",
}
FORMATS = "safetensors, .npz and orbax are read"


def read(path: pathlib.Path) -> Checkpoint:
    """A checkpoint.

    Args:
      path: of a file or a directory.

    Raises:
      FileNotFoundError: if there is nothing.
      ValueError: if it is no checkpoint, one that cannot be pruned, or damaged.
      ImportError: without the package that reads it.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    return _directory(path) if path.is_dir() else _file(path)


def _directory(folder: pathlib.Path) -> Checkpoint:
    if files := safetensors_files.files_in(folder):
        return safetensors_files.read_directory(folder, files)
    if item := orbax_files.item_in(folder):
        return orbax_files.read(item)
    found = sorted(path for path in folder.iterdir() if path.is_file())
    if arrays := [path for path in found if path.suffix == ".npz"]:
        raise ValueError(f"{folder} is a directory with {arrays[0].name}: give that file")
    if refused := [path for path in found if path.suffix in _REFUSED]:
        raise ValueError(
            f"{folder} has no checkpoint that can be pruned: {refused[0].name} {_REFUSED[refused[0].suffix]}"
        )
    listed = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
    raise ValueError(f"{folder} has no checkpoint: {FORMATS}; it holds {listed or 'nothing'}")


def _file(path: pathlib.Path) -> Checkpoint:
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"GGUF":
        raise ValueError(f"{path} {_REFUSED['.gguf']}")
    if path.suffix in _REFUSED:
        raise ValueError(f"{path} {_REFUSED[path.suffix]}")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("data.pkl") for name in names):
            raise ValueError(f"{path} {_TORCH}")
        return numpy_files.read(path)
    if path.suffix == ".npz":
        raise ValueError(f"{path} is damaged: it is no archive of arrays, as numpy.savez writes")
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return safetensors_files.read_file(path)
    raise ValueError(f"{path} is no checkpoint: {FORMATS}; its first bytes are {head[:8]!r}")
