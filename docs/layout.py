"""The list of files in `docs/layout.md`, from the first line of each.

python -m docs.layout           # writes the list
python -m docs.layout --check   # exit status 1 if the page has another one
"""

import ast
import pathlib
import re
import sys

from experiments.utils import files

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "layout.md"
MARK = "<!-- made by `python -m docs.layout` from here on: do not edit -->\n"
FOLDERS = ("sa_plus_plus", "experiments", "configs", "benchmarks", "docs", "notebooks", "tests")
SUFFIXES = (".py", ".cc", ".h", ".inc", ".md")
_HEADING = {".py": re.compile(r"# # (.*)"), ".md": re.compile(r"# (.*)")}
_COMMENT = re.compile(r"(?://[^\n]*\n)+")


def summary(file: pathlib.Path) -> str:
    """What a file says it is: the first sentence of its docstring or comment, or the heading of a page."""
    text = file.read_text()
    if file.suffix == ".py" and (docstring := ast.get_docstring(ast.parse(text))):
        return _sentence(docstring)
    if file.suffix in (".py", ".md"):  # a notebook's text has its heading in a comment
        return next((heading[1] for line in text.splitlines() if (heading := _HEADING[file.suffix].match(line))), "")
    comment = _COMMENT.match(text)
    return _sentence(re.sub(r"^// ?", "", comment[0], flags=re.M)) if comment else ""


def _sentence(text: str) -> str:
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.:]) (?=[A-Z])", first)[0].rstrip(".:").replace("|", "\\|")


def listing() -> str:
    """A section for each folder, a row for each of its files."""
    sections = []
    for top in FOLDERS:
        for folder in sorted({file.parent for file in (ROOT / top).rglob("*") if file.suffix in SUFFIXES}):
            if any(part.startswith((".", "_")) for part in folder.relative_to(ROOT).parts):
                continue
            found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
            head = next((summary(file) for file in found if file.name == "__init__.py"), "")
            rows = [f"| `{file.name}` | {summary(file)} |" for file in found if file.name != "__init__.py"]
            title = f"### `{folder.relative_to(ROOT)}/`\n" + (f"\n{head}.\n" if head else "")
            if rows:
                sections.append("\n".join([title, "| | |", "| --- | --- |", *rows]))
    return "\n\n".join(sections) + "\n"


def main(arguments: list[str]) -> int:
    before, mark, old = PAGE.read_text().partition(MARK)
    if not mark:
        sys.exit(f"{PAGE} has no line {MARK!r}")
    new = "\n" + listing()
    if "--check" in arguments:
        return int(old != new)
    files.write_text(PAGE, before + mark + new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
