"""Tables of numbers with a column of labels, from CSV files."""

import collections
import csv
import io
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.csv
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit

from experiments.data.sources import Arrays, Dataset
from experiments.utils import files, registry

_MISSING = frozenset(pyarrow.csv.ConvertOptions().null_values)  # "", nan, NA, null and the like


def csv_table(
    path: str, target: str = "", group: str = "", ignore: str = "", held_out: float = 0.2, seed: int = 0
) -> Dataset:
    """Rows of a CSV file with a header: every column is a numeric feature except those named here.

    Numbers are what Arrow takes for such: `-1`, `.5` and `6e-7`, not `1_000`; `true` and `false` are 1 and 0. Missing
    values, empty or written as `nan`, `NA` or `null`, become the mean of the training rows. Features are then
    standardised by the mean and the standard deviation of the training rows; those that are constant there are 0.

    Args:
      path: of the file, in UTF-8, plain or compressed by gzip, bzip2, Zstandard or LZ4, whatever its name.
      target: the column of labels, of any text; "" for the last one.
      group: a column whose rows of one value are all for training or all for testing, those without a value being one
        group; "" for none.
      ignore: further columns that are no features, separated by commas.
      held_out: share of the rows, or of the groups, that is for testing.
      seed: of the split.

    Returns:
      Examples with `row` `(features,)` float32 and `label` int32; classes are numbered in the order of their labels as
      text, exactly as they stand in the file: `1` and `1.0` are two.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such table, or a column that is named is not there; if a feature is not numeric, has
        infinite values or no value in any training row, or a test row too far from these for float32; if a label is
        missing, or there are fewer than two classes or groups.
    """
    file = pathlib.Path(path).expanduser()
    content = _read(file)
    header = _checked_names(file, content)
    left_out = [name for name in (group, *ignore.split(",")) if name]
    for name in (target, *left_out):
        if name and name not in header:
            raise ValueError(f"{file} has no column {name!r}; did you mean {registry.nearest(name, header)!r}?")
    target = target or header[-1]
    if target in left_out:
        raise ValueError(f"the column {target!r} is the target, so it cannot be the group or be ignored: name another")
    table = _table(file, content, header, {target, *left_out})
    names = [name for name in header if name not in (target, *left_out)]
    if not names:
        raise ValueError(f"{file} has no column besides the target {target!r} and those left out: there is no feature")
    classes, labels = np.unique(_labels(file, table, target), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"the target {target!r} of {file} has one class only, {str(classes[0])!r}: it should have two")
    if len(classes) == len(labels):
        raise ValueError(f"the target {target!r} of {file} has another label in each row: it should name classes")
    columns = {name: _numbers(file, table, name) for name in names}
    train, test = _split(file, len(labels), table[group].to_numpy() if group else None, held_out, seed)
    rows = np.stack([_standardised(file, name, values, train) for name, values in columns.items()], 1)
    to_train, to_test = (Arrays({"row": rows[i], "label": labels[i].astype(np.int32)}) for i in (train, test))
    return Dataset(to_train, to_test, len(classes), columns=tuple(names), files=(file,))


def _read(file: pathlib.Path) -> bytes:
    """The file's content, decompressed, without a byte-order mark and empty lines at the start."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file.absolute()}: it should be a CSV file with a header")
    try:
        with pa.input_stream(str(file), compression=files.compression(file)) as stream:
            return stream.read().removeprefix("\ufeff".encode()).lstrip(b"\r\n")
    except OSError as error:
        raise ValueError(f"{file} cannot be read as a CSV file: {error}") from error


def _checked_names(file: pathlib.Path, content: bytes) -> list[str]:
    """The names of the columns, once it is known that the content is text and its quotes are closed."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {_place(content, error.start)}; save it as UTF-8") from error
    if "\0" in text:
        place = _place(content, content.index(b"\0"))
        raise ValueError(f"{file} is not text, or not UTF-8: {place}, a zero byte; save it as UTF-8")
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit, line = csv.field_size_limit(len(text) + 1), 1
    try:
        names = next(rows, [])
        line = rows.line_num + 1
        if '"' in text:  # Arrow would take all that follows a quote that is never closed for one value
            for _ in rows:
                line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{file} cannot be read as a CSV file: {error}, in what begins in line {line}; is a quote not closed?"
        ) from error
    finally:
        csv.field_size_limit(limit)
    if not names:
        raise ValueError(f"{file} cannot be read as a CSV file: it is empty")
    if doubled := [name for name, n in collections.Counter(names).items() if n > 1]:
        raise ValueError(f"{file} has two columns {doubled[0]!r}: rename one")
    return names


def _place(content: bytes, at: int) -> str:
    """Where a byte is, by line and column, and its value. Commas in quotes count too: the text may be no CSV at all."""
    head, line = content.split(b"\n", 1)[0].split(b","), content.count(b"\n", 0, at)
    number = content.count(b",", content.rfind(b"\n", 0, at) + 1, at)
    name = head[number].strip().decode(errors="replace") if number < len(head) else ""
    return f"line {line + 1}, column {number + 1} ({name!r}), has the byte 0x{content[at]:02x}"


def _table(file: pathlib.Path, content: bytes, names: list[str], texts: set[str]) -> pa.Table:
    """The columns: those in `texts` as text, exactly as it stands there, of the others what Arrow takes them for."""
    # One block where it may be, since the types of columns are inferred from the first one.
    block = min(len(content) + 1, 2**31 - 1)
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(content + b"\n"),
            pyarrow.csv.ReadOptions(column_names=names, skip_rows_after_names=1, block_size=block),
            pyarrow.csv.ParseOptions(newlines_in_values=True),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} cannot be read as a CSV file: {error}") from error
    if not len(table):
        raise ValueError(f"{file} has a header but no rows")
    return table


def _labels(file: pathlib.Path, table: pa.Table, target: str) -> np.ndarray:
    """Labels as text."""
    labels = table[target].to_numpy().astype(str)
    if len(missing := np.flatnonzero(labels == "")):
        row = missing[0] + 1
        raise ValueError(f"row {row} of {file} has no label in the column {target!r}: leave the row out")
    return labels


def _numbers(file: pathlib.Path, table: pa.Table, name: str) -> np.ndarray:
    """A feature's values, float64, NaN where they are missing; whole numbers less the least of them.

    So those above 2⁵³, such as times in nanoseconds, remain distinct.
    """
    column = table[name]
    if pa.types.is_integer(column.type):
        whole = column.drop_null().to_numpy()
        above = whole.view(np.uint64) - whole.min().view(np.uint64)  # wraps around where int64 would overflow
        values = np.full(len(column), np.nan)
        values[column.is_valid().to_numpy()] = above
        return values
    if not any(of_kind(column.type) for of_kind in (pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)):
        texts = column.cast(pa.string()).to_pylist()
        row = next((row for row, text in enumerate(texts) if not _is_number(text)), 0)
        raise ValueError(
            f"the column {name!r} of {file} is not numeric, it has {str(texts[row])[:80]!r} in row {row + 1}: turn it "
            f"into numbers, or ignore it by config.data.options.ignore={name}"
        )
    values = column.cast(pa.float64()).to_numpy()
    if np.isinf(values).any():
        row = int(np.isinf(values).argmax()) + 1
        raise ValueError(f"the column {name!r} of {file} is infinite in row {row}: leave the row or the column out")
    return values


def _is_number(text: str | None) -> bool:
    """Whether Arrow takes a field for a number or for missing."""
    try:
        return text is None or text.strip() in _MISSING or pa.scalar(text.strip()).cast(pa.float64()) is not None
    except pa.ArrowInvalid:
        return False


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


def _standardised(file: pathlib.Path, name: str, values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """A float32 feature of mean 0 and standard deviation 1 over the training rows; 0 if it is constant there."""
    there = values[train][~np.isnan(values[train])]
    if not len(there):
        raise ValueError(
            f"the column {name!r} of {file} has no value in any training row: ignore it by "
            f"config.data.options.ignore={name}"
        )
    if there.min() == there.max():
        return np.zeros(len(values), np.float32)
    # By a power of two, which rounds nothing, to numbers whose sums and squares float64 holds.
    _, exponent = np.frexp(np.abs(there).max())
    with np.errstate(over="ignore"):
        values = np.ldexp(values, -exponent)
        for _ in range(2):  # the first mean is rounded, which shows where the spread is far smaller
            values = values - np.nanmean(values[train])
        values = np.where(np.isnan(values), 0, values)
        values = (values / values[train].std()).astype(np.float32)
    if not np.isfinite(values).all():
        row = int((~np.isfinite(values)).argmax()) + 1
        raise ValueError(
            f"the column {name!r} of {file} is, in row {row}, further from the training rows than float32 can tell: "
            "leave the row or the column out"
        )
    return values
