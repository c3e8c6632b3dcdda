"""Sphinx settings. The source directory is the repository's root: see `docs/__main__.py`."""

import pathlib
import re
from typing import Any

import sa_plus_plus

project = "sa_plus_plus"
project_copyright = "the sa_plus_plus authors, Apache-2.0"
version = release = sa_plus_plus.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
include_patterns = ["docs/*.md", "docs/api/*.rst", "notebooks/*.ipynb", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = ["docs/_build", ".*", "runs", "build", "tests", "experiments", "benchmarks"]
root_doc = "docs/index"

# Pages, which are read on GitHub too.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they were saved, without outputs: see `docs/__main__.py`
nb_execution_timeout = -1
nb_execution_raise_on_error = True
nb_output_stderr = "remove"
suppress_warnings = ["mystnb.unknown_mime_type", "myst-nb.lexer"]  # of notebooks without metadata
highlight_language = "none"

# Docstrings: Google's sections, single backticks for code.
default_role = "py:obj"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "sa_plus_plus"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}  # the first page is docs/index.html
copybutton_exclude = ".linenos, .gp, .go"


def skip_alias(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples are described by their class's docstring."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def indented_as_code(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Equations and examples in docstrings are indented paragraphs, as code is in Markdown: say so in reST."""
    if what == "property":  # or napoleon takes what stands before a colon for the type
        lines[:1] = lines[0].replace(": ", ":\n", 1).split("\n")
    for i in range(len(lines) - 1, 1, -1):
        begins = lines[i].startswith("    ") and not lines[i - 1].strip()
        before = next((line for line in reversed(lines[:i]) if line.strip()), "")
        if begins and before and not before.startswith((" ", "- ", ">>>")):
            lines[i:i] = ["::", ""]


def functions_by_name(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """A default `<function f>` cannot be read as Python, and the signature would be set as one line of text."""
    return signature and re.sub(r"<function (\w+)>", r"\1", signature), returned


def without_notebooks(app: Any, docname: str, source: list[str]) -> None:
    """Where there are no notebooks, the contents have no section for them: an empty one is a warning."""
    if docname == root_doc and not any((pathlib.Path(app.srcdir) / "notebooks").glob("*.ipynb")):
        blocks = re.split(r"(?<=^```\n)", source[0], flags=re.M)
        source[0] = "".join(block for block in blocks if "../notebooks/" not in block)


def setup(app: Any) -> None:
    app.connect("source-read", without_notebooks)
    app.connect("autodoc-process-signature", functions_by_name)
    app.connect("autodoc-skip-member", skip_alias)
    app.connect("autodoc-process-docstring", indented_as_code, priority=400)  # before napoleon reads sections
