"""Tables of results in a page that is otherwise written by hand."""

from collections.abc import Mapping, Sequence


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown; a dash where a line lacks a column."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    rows = [columns, ["---"] * len(columns), *([line.get(key, "-") for key in columns] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def filled(page: str, name: str, text: str) -> str:
    """The page with `text` between its marks `<!-- name -->` and `<!-- end of name -->`.

    Raises:
      ValueError: if it has no such marks.
    """
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, mark, after = rest.partition(f"<!-- end of {name} -->")
    if not mark:
        raise ValueError(f"the page has no marks for the table {name!r}")
    return f"{before}<!-- {name} -->\n{text}\n{mark}{after}"
