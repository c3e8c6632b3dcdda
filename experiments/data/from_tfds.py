"""Image classification data sets of TensorFlow Datasets, read without TensorFlow."""

import functools
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.data.sources import Dataset, RandomAccess, Records, in_memory
from experiments.utils.registry import missing_extra, nearest

_IN_MEMORY_BYTES = 2**30  # CIFAR-10 takes 0.2 of it


def tfds(
    name: str,
    data_dir: str = "",
    train: str = "train",
    test: str = "test",
    download: bool = False,
    memory: bool | None = None,
) -> Dataset:
    """A data set prepared in a format with random access, such as ArrayRecord.

    Args:
      name: as TFDS has it: `"cifar10"`, `"imagenet2012:5.1.0"`.
      data_dir: where TFDS keeps its data; by default `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
      train: split to train on; slices such as `"train[:90%]"` too.
      test: split to test on.
      download: whether to download and prepare it, unless that is done. Needs the internet, and for most data sets
        TensorFlow.
      memory: whether to read it into memory at once; by default if its images are all of one shape and take at most
        1 GiB. Else records are read as they are needed.

    Returns:
      `image` as stored and `label` int32.

    Raises:
      ImportError: without TensorFlow Datasets.
      FileNotFoundError: if it is not prepared in such a format, with what to do.
      ValueError: if TFDS has no such data set, version or split, or it is not one of labelled images.
    """
    builder = _prepared(name, data_dir, download)
    image, label, classes = _image_and_label(builder)
    parts = _data_sources(builder, name, (train, test))
    lazy = [Records(part, functools.partial(_renamed, image=image, label=label)) for part in parts]
    if memory is None:
        memory = _bytes(builder.info.features[image]) * sum(map(len, lazy)) <= _IN_MEMORY_BYTES
    to_train, to_test = map(in_memory, lazy) if memory else lazy
    return Dataset(to_train, to_test, classes, files=_files(builder))


def encoded_images(
    name: str, data_dir: str = "", train: str = "train", test: str = "validation", download: bool = False
) -> tuple[RandomAccess, RandomAccess, int, tuple[pathlib.Path, ...]]:
    """The images of a data set as encoded files. Arguments and errors as for `tfds`.

    Returns:
      Records to train on and to test on, each with `image` (bytes), `label` and `file` (its name), the number of
      classes, and the files by which a change is noticed.
    """
    builder = _prepared(name, data_dir, download)
    image, label, classes = _image_and_label(builder)
    parts = _data_sources(builder, name, (train, test), decoders={image: _tensorflow_datasets().decode.SkipDecoding()})
    to_train, to_test = (_Encoded(part, image, label) for part in parts)
    return to_train, to_test, classes, _files(builder)


class _Encoded:
    """Records of a TFDS data source by the names used here."""

    def __init__(self, records: Any, image: str, label: str) -> None:
        self._records, self._image, self._label = records, image, label

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"image": r[self._image], "label": r[self._label], "file": r.get("file_name", f"record {i}")}
            for i, r in zip(numbers, self._records.__getitems__(numbers), strict=True)
        ]


def _files(builder: Any) -> tuple[pathlib.Path, ...]:
    """What tells a prepared data set from another: TFDS's own description of it, with the lengths of its parts."""
    described = pathlib.Path(str(builder.data_path), "dataset_info.json")
    return (described,) if described.is_file() else ()


def _prepared(name: str, data_dir: str, download: bool) -> Any:
    """The builder of a data set that is ready to be read."""
    builder = _builder(name, data_dir)
    if download and not builder.is_prepared():
        builder = _builder(name, data_dir, file_format="array_record")
        try:
            builder.download_and_prepare()
        except ImportError as error:
            reason, how = str(error).splitlines()[-1], _how_to_prepare(name, data_dir)  # before it, a whole example
            raise FileNotFoundError(f"the TFDS data set {name!r} cannot be prepared here: {reason}. {how}") from error
    if not builder.is_prepared():
        how = _how_to_prepare(name, data_dir)
        raise FileNotFoundError(f"the TFDS data set {name!r} is not in {builder.data_path}. {how}")
    return builder


def _data_sources(builder: Any, name: str, splits: Sequence[str], **options: Any) -> list[Any]:
    try:
        return [builder.as_data_source(split, **options) for split in splits]
    except NotImplementedError as error:
        stored, how = builder.info.file_format.value, _how_to_prepare(name, "ANOTHER DIRECTORY")
        raise FileNotFoundError(
            f"the TFDS data set {name!r} is in {builder.data_path} as {stored}, without random access. {how}"
        ) from error


def _tensorflow_datasets() -> Any:
    try:
        import tensorflow_datasets  # noqa: PLC0415 - a heavy import, in an extra of its own
    except ModuleNotFoundError as error:
        raise ImportError(missing_extra("data sets of TensorFlow Datasets", "tfds", error)) from error
    return tensorflow_datasets


def _builder(name: str, data_dir: str, **options: Any) -> Any:
    tensorflow_datasets = _tensorflow_datasets()
    if data_dir:
        options["data_dir"] = os.path.expanduser(data_dir)
    try:
        return tensorflow_datasets.builder(name, **options)
    except tensorflow_datasets.core.DatasetNotFoundError as error:  # its own message lists all there are
        known = tensorflow_datasets.list_builders(with_community_datasets=False)
        likely = nearest(re.split("[/:]", name)[0], known)
        raise ValueError(f"TFDS has no data set {name!r}; did you mean {likely!r}?") from error
    except AssertionError as error:  # a version that it neither makes nor has
        raise ValueError(str(error)) from error


def _how_to_prepare(name: str, data_dir: str) -> str:
    place = f"data_dir={os.path.expanduser(data_dir)!r}, " if data_dir else ""
    return (
        "To prepare it takes, once, the internet and TensorFlow, which to read it does not:\n"
        "  pip install -e '.[tfds]' tensorflow\n"
        '  python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}, {place}file_format='array_record').download_and_prepare()\""
    )


def _image_and_label(builder: Any) -> tuple[str, str, int]:
    """Names of the two features that make it a classification data set, and the number of classes."""
    keys, features = builder.info.supervised_keys, builder.info.features
    if keys and len(keys) == 2 and hasattr(features[keys[1]], "num_classes"):
        return *keys, features[keys[1]].num_classes
    raise ValueError(
        f"the TFDS data set {builder.name!r} is not one of labelled examples: it has {', '.join(features)}"
    )


def _renamed(record: Mapping[str, Any], image: str, label: str) -> dict[str, Any]:
    return {"image": record[image], "label": np.int32(record[label])}


def _bytes(feature: Any) -> float:
    """The memory of an image in bytes."""
    return math.inf if None in feature.shape else math.prod(feature.shape) * np.dtype(feature.np_dtype).itemsize
