"""Data sets from files on this machine."""

import gzip
import lzma
import math
import pathlib
import tarfile
import zlib

import numpy as np

from experiments.data.images import CorruptImage, rgb
from experiments.data.sources import Arrays, Batch, Dataset
from experiments.utils.files import compression

_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def idx_files(directory: str) -> Dataset:
    """MNIST, Fashion-MNIST or another data set in the format of MNIST's files.

    Args:
      directory: where `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
        `t10k-labels-idx1-ubyte` are, each as it is or with `.gz`.

    Returns:
      Images `(n, height, width, 1)` uint8; labels int32.

    Raises:
      FileNotFoundError: if one of them is not there.
      ValueError: if one of them holds something else; or if images for testing are of another size than those for
        training, or of classes that these lack.
    """
    folder = pathlib.Path(directory).expanduser()
    train, test = (_idx_part(folder, part) for part in ("train", "t10k"))
    sizes = [part["image"].shape[1:3] for part in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{folder}: images are {sizes[0]} pixels in the files train-*, {sizes[1]} in t10k-*")
    classes = int(train["label"].max()) + 1
    if beyond := np.flatnonzero(test["label"] >= classes).tolist():
        raise ValueError(
            f"{folder}: example {beyond[0]} of the file t10k-labels-idx1-ubyte has the label "
            f"{test['label'][beyond[0]]}, beyond those of train-labels-idx1-ubyte, 0 to {classes - 1}"
        )
    files = tuple(_idx_file(folder, f"{part}-{kind}") for part in ("train", "t10k") for kind in (_IMAGES, _LABELS))
    return Dataset(Arrays(train), Arrays(test), classes, files=files)


def cifar10_tar(path: str) -> Dataset:
    """CIFAR-10, or another data set of small images, from an archive of image files, decoded into memory.

    Args:
      path: a tar file, compressed in whatever way, of `train/<class>/<name>` and `test/<class>/<name>`. Classes are
        numbered in alphabetical order, which is CIFAR-10's own.

    Returns:
      Images `(n, height, width, 3)` uint8; labels int32.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is something else.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        wanted = "a tar file of train/<class>/<name>.jpg and test/<class>/<name>.jpg"
        raise FileNotFoundError(f"no file {file.absolute()}: it should be {wanted}")
    examples = _tar_images(file)
    classes = sorted({name for part in examples.values() for name, _ in part})
    for part in ("train", "test"):
        missing = set(classes) - {name for name, _ in examples[part]}
        if missing or not classes:
            raise ValueError(
                f"{file} has no images {part}/<class>/<name> of {', '.join(sorted(missing)) or 'any class'}"
            )
    train, test = (_classified(file, examples[part], classes) for part in ("train", "test"))
    return Dataset(Arrays(train), Arrays(test), len(classes), files=(file,))


def _idx_part(folder: pathlib.Path, part: str) -> Batch:
    image = _read_idx(_idx_file(folder, f"{part}-{_IMAGES}"), dimensions=3)
    label = _read_idx(_idx_file(folder, f"{part}-{_LABELS}"), dimensions=1)
    if len(image) != len(label):
        raise ValueError(f"{folder}: {len(image)} images and {len(label)} labels in the files {part}-*")
    if not image.size:
        raise ValueError(f"{folder}: no images in the file {part}-images-idx3-ubyte, its shape is {image.shape}")
    return {"image": image[..., None], "label": label.astype(np.int32)}


def _idx_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    file = next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"neither {name}.gz nor {name} is in {folder.absolute()}: the four files that MNIST and Fashion-MNIST are "
            "published as should be"
        )
    return file


def _read_idx(file: pathlib.Path, dimensions: int) -> np.ndarray:
    """The array in an IDX file of bytes: two zero bytes, type, number of dimensions, sizes, contents."""
    try:
        content = gzip.decompress(file.read_bytes()) if compression(file) == "gzip" else file.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise ValueError(f"{file} is not an IDX file of bytes in {dimensions} dimensions")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=start)
    if values.size != math.prod(shape):
        raise ValueError(f"{file} is damaged: {values.size} bytes instead of {shape}")
    return values.reshape(shape)


def _tar_images(file: pathlib.Path) -> dict[str, list[tuple[str, np.ndarray]]]:
    """`{"train": [(class name, image), ...], "test": ...}`, in the archive's order."""
    examples: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                parts = pathlib.PurePosixPath(member.name).parts
                content = archive.extractfile(member)
                if content is not None and len(parts) == 3 and parts[0] in examples:
                    examples[parts[0]].append((parts[1], rgb(content.read())))
    except CorruptImage as error:
        raise ValueError(f"{file} has an image that is corrupt, {member.name}: {error}") from error
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise ValueError(f"{file} cannot be read as a tar file of images: {error}") from error
    return examples


def _classified(file: pathlib.Path, part: list[tuple[str, np.ndarray]], classes: list[str]) -> Batch:
    shapes = {image.shape for _, image in part}
    if len(shapes) > 1:
        raise ValueError(f"{file} has images of several sizes, {', '.join(map(str, sorted(shapes)[:3]))}")
    numbers = {name: number for number, name in enumerate(classes)}
    label = np.array([numbers[name] for name, _ in part], np.int32)
    return {"image": np.stack([image for _, image in part]), "label": label}
