"""Image files on disk, one directory per class, and the same from TFDS, decoded on demand."""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from experiments.data.from_tfds import encoded_images
from experiments.data.images import CROP_DRAWS, CorruptImage, centre_crop, random_crop
from experiments.data.sources import Dataset, RandomAccess, Records

_SUFFIXES = (".jpeg", ".jpg", ".png")


def image_folder(
    directory: str, train: str = "train", test: str = "val", size: int = 224, skip_corrupt: bool = False
) -> Dataset:
    """Images in `<train>/<class>/<name>.JPEG` and `<test>/<class>/<name>.JPEG`.

    Args:
      directory: where the two are.
      train: directory of the training images.
      test: directory of the test images.
      size: they are cropped and resized to this many pixels squared: at random for training, the centre for testing.
      skip_corrupt: what cannot be read or decoded gets weight 0 instead of ending the run.

    Returns:
      `image` uint8 and `label` int32; classes are numbered in alphabetical order.

    Raises:
      FileNotFoundError: if they are not there.
      ValueError: if the two have not the same classes; or if a directory or a link to nothing has the name of an image,
        unless such are to be skipped.
    """
    root = pathlib.Path(directory).expanduser()
    to_train, to_test = (_Files(root / part, skip_corrupt) for part in (train, test))
    if to_train.classes != to_test.classes:
        differing = sorted(set(to_train.classes) ^ set(to_test.classes))
        raise ValueError(f"{root}: {train}/ and {test}/ differ in their classes: {', '.join(differing[:5])}")
    folders = tuple(part.root / name for part in (to_train, to_test) for name in part.classes)
    return _varied(to_train, to_test, len(to_train.classes), size, skip_corrupt, folders)


def image_records(
    name: str, data_dir: str = "", test: str = "validation", download: bool = False, size: int = 224, **options: Any
) -> Dataset:
    """A TFDS data set of JPEG files, otherwise like `image_folder`."""
    train, held_out, classes, files = encoded_images(name, data_dir, test=test, download=download)
    return _varied(train, held_out, classes, size, files=files, **options)


def _varied(
    train: RandomAccess,
    test: RandomAccess,
    classes: int,
    size: int,
    skip_corrupt: bool = False,
    files: tuple[pathlib.Path, ...] = (),
) -> Dataset:
    decode = functools.partial(_decoded, size=size, skip_corrupt=skip_corrupt)
    return Dataset(Records(train, decode, CROP_DRAWS), Records(test, decode), classes, files=files)


def _decoded(record: Mapping[str, Any], random: np.ndarray | None = None, *, size: int, skip_corrupt: bool) -> dict:
    """The example of a record of `image`, a file's content or where that is, `label` and `file`, its name."""
    weight = np.float32(1)
    try:
        content = record["image"] if isinstance(record["image"], bytes) else _content(record["image"])
        image = centre_crop(content, size) if random is None else random_crop(content, size, random)
    except CorruptImage as error:
        if not skip_corrupt:
            raise CorruptImage(
                f"{record['file']} is corrupt: {error}; replace it, or have such files left out: "
                "config.data.options.skip_corrupt=True"
            ) from error
        logging.log_first_n(logging.WARNING, "%s is corrupt and left out: %s", 100, record["file"], error)
        image, weight = np.zeros((size, size, 3), np.uint8), np.float32(0)
    example = {"image": image, "label": np.int32(record["label"])}
    return example | ({"weight": weight} if skip_corrupt else {})


def _content(file: pathlib.Path) -> bytes:
    if not file.is_file():
        raise CorruptImage("there is no file of this name, or a directory or the like instead")
    return file.read_bytes()


class _Files:
    """The image files below a directory, as records; a directory below it for each class."""

    def __init__(self, root: pathlib.Path, skip_corrupt: bool) -> None:
        wanted = f"a directory for each class, with its images ({', '.join(_SUFFIXES)}) in it"
        if not root.is_dir():
            raise FileNotFoundError(f"no directory {root.absolute()}: it should hold {wanted}")
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
        self.root, self.classes = root, [entry.name for entry in entries if entry.is_dir()]
        if not self.classes:
            flat = f"{len(entries)} files: sort them by class" if entries else "nothing"
            raise FileNotFoundError(f"{root.absolute()} should hold {wanted}, and holds {flat}")
        names, labels = [], []
        for label, name in enumerate(self.classes):
            found = sorted(
                (f for f in os.scandir(root / name) if f.name.lower().endswith(_SUFFIXES)), key=lambda f: f.name
            )
            if not found:
                raise FileNotFoundError(f"{root / name} has no image files ({', '.join(_SUFFIXES)})")
            if not skip_corrupt and (wrong := next((f for f in found if not f.is_file()), None)):
                what = "a directory" if wrong.is_dir() else "a link to nothing" if wrong.is_symlink() else "no file"
                raise ValueError(
                    f"{wrong.path} has the name of an image and is {what}: remove it, or have such left out: "
                    "config.data.options.skip_corrupt=True"
                )
            names += [f.name for f in found]
            labels += [label] * len(found)
        # Arrays, since a million Python strings would fill the memory of every worker process.
        self._names, self._labels = np.array([os.fsencode(name) for name in names]), np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        label = self._labels[i]
        file = self.root / self.classes[label] / os.fsdecode(self._names[i])
        return {"image": file, "label": label, "file": file}
