"""Tables of numbers with a column of labels, from CSV files."""

import collections
import pathlib

import numpy as np
import pyarrow as pa
from pyarrow import csv
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit

from experiments.data.sources import Arrays, Dataset
from experiments.utils import registry


def csv_table(
    path: str, target: str = "", group: str = "", ignore: str = "", held_out: float = 0.2, seed: int = 0
) -> Dataset:
    """Rows of a CSV file with a header: every column is a numeric feature except those named here.

    Missing values, empty or written as `nan`, `NA` or `null`, become the mean of the training rows. Features are then
    standardised by the mean and the standard deviation of the training rows.

    Args:
      path: of the file, plain or `.gz`.
      target: the column of labels, of any text; "" for the last one.
      group: a column whose rows of one value are all for training or all for testing, those without a value being one
        group; "" for none.
      ignore: further columns that are no features, separated by commas.
      held_out: share of the rows, or of the groups, that is for testing.
      seed: of the split.

    Returns:
      Examples with `row` `(features,)` float32 and `label` int32; classes are numbered in the order of their labels as
      text.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such table, or a column that is named is not there; if a feature is not numeric, has
        infinite values or no value in any training row; if a label is missing, or there are fewer than two classes or
        groups.
    """
    file = pathlib.Path(path).expanduser()
    texts = [name for name in (target, group, *ignore.split(",")) if name]
    table = _read(file, texts)
    target = target or table.column_names[-1]
    if target in texts[1:]:
        raise ValueError(f"the column {target!r} is the target, so it cannot be the group or be ignored: name another")
    names = [name for name in table.column_names if name != target and name not in texts]
    if not names:
        raise ValueError(f"{file} has no column besides the target {target!r} and those left out: there is no feature")
    classes, labels = np.unique(_labels(file, table, target), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"the target {target!r} of {file} has one class only, {str(classes[0])!r}: it should have two")
    if len(classes) == len(labels):
        raise ValueError(f"the target {target!r} of {file} has another label in each row: it should name classes")
    values = np.stack([_numbers(file, table, name) for name in names], 1)
    groups = np.array(table[group].to_pylist(), str) if group else None
    train, test = _split(file, len(labels), groups, held_out, seed)
    rows = _standardised(file, names, values, train)
    to_train, to_test = (Arrays({"row": rows[i], "label": labels[i].astype(np.int32)}) for i in (train, test))
    return Dataset(to_train, to_test, len(classes), columns=tuple(names))


def _read(file: pathlib.Path, texts: list[str]) -> pa.Table:
    """The file's columns; those named by `texts`, which must exist, as text."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file.absolute()}: it should be a CSV file with a header")
    try:
        with pa.input_stream(str(file), compression="detect") as stream:
            content = stream.read()
        options = csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()))
        # One block where it may be, since the types of columns are inferred from the first one.
        reading = csv.ReadOptions(block_size=min(len(content) + 1, 2**31 - 1))
        table = csv.read_csv(pa.BufferReader(content), reading, convert_options=options)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read as a CSV file: {error}") from error
    names = table.column_names
    if doubled := [name for name, n in collections.Counter(names).items() if n > 1]:
        raise ValueError(f"{file} has two columns {doubled[0]!r}: rename one")
    for name in texts:
        if name not in names:
            raise ValueError(f"{file} has no column {name!r}; did you mean {registry.nearest(name, names)!r}?")
    if not len(table):
        raise ValueError(f"{file} has a header but no rows")
    return table


def _labels(file: pathlib.Path, table: pa.Table, target: str) -> np.ndarray:
    """Labels as text."""
    values = table[target].to_pylist()
    for number, value in enumerate(values, 1):
        if value in (None, ""):
            raise ValueError(f"row {number} of {file} has no label in the column {target!r}: leave the row out")
    return np.array([str(value) for value in values])


def _numbers(file: pathlib.Path, table: pa.Table, name: str) -> np.ndarray:
    """A feature's values, float64, NaN where they are missing."""
    column = table[name]
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    if not any(is_of_kind(column.type) for is_of_kind in kinds):
        value = next(value for value in column.to_pylist() if not _is_number(value))
        raise ValueError(
            f"the column {name!r} of {file} is not numeric, it has {str(value)!r}: turn it into numbers, or ignore it "
            f"by config.data.options.ignore={name}"
        )
    values = column.cast(pa.float64()).to_numpy()
    if np.isinf(values).any():
        row = int(np.flatnonzero(np.isinf(values))[0]) + 1
        raise ValueError(f"the column {name!r} of {file} is infinite in row {row}: leave the row or the column out")
    return values


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return value in (None, "")
    return True


def _split(
    file: pathlib.Path, rows: int, groups: np.ndarray | None, held_out: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and test rows, ascending."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is the share of the rows to test on and must be in (0, 1), got {held_out}")
    if groups is not None and len(set(groups)) < 2:
        raise ValueError(f"all rows of {file} are of one group, {str(groups[0])!r}: none would be left to test on")
    make = ShuffleSplit if groups is None else GroupShuffleSplit
    try:
        train, test = next(make(1, test_size=held_out, random_state=seed).split(np.empty(rows), groups=groups))
    except ValueError as error:
        raise ValueError(f"{file} has {rows} rows, too few to hold out {held_out:.0%} of them: {error}") from error
    return np.sort(train), np.sort(test)


def _standardised(file: pathlib.Path, names: list[str], values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Float32 features of mean 0 and standard deviation 1 over the training rows; constant ones are 0."""
    there = ~np.isnan(values[train])
    for name, some in zip(names, there.any(0), strict=True):
        if not some:
            raise ValueError(
                f"the column {name!r} of {file} has no value in any training row: ignore it by "
                f"config.data.options.ignore={name}"
            )
    mean = np.nanmean(values[train], 0)
    filled = np.where(np.isnan(values), mean, values) - mean
    std = filled[train].std(0)
    return (filled / np.where(std > 0, std, 1)).astype(np.float32)
