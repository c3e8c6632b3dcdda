"""Tables in plain text."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, omit: Sequence[str] = ()) -> str:
    """Columns of equal width under a ruled head.

    Args:
      head: the columns' names.
      rows: of as many cells as the head.
      omit: columns to leave out.

    >>> print(table(("path", "shape"), [("in", "64×96"), ("out", "96×1")]))
    path  shape
    -----------
    in    64×96
    out   96×1
    """
    kept = [i for i, name in enumerate(head) if name not in omit]
    cells = [[row[i] for i in kept] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
