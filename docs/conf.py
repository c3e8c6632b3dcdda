"""The documentation site: `python -m docs` builds it."""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sa_plus_plus

project, author, release = "sa_plus_plus", "The sa_plus_plus authors", sa_plus_plus.__version__
copyright = author  # which Sphinx shows
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", f"sa_plus_plus {release}"
html_static_path: list[str] = []

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Pages are read on GitHub too, where these lead somewhere; here they are files that stand outside the site.
suppress_warnings = ["myst.xref_missing", "myst.header"]
nb_execution_mode = "auto" if os.environ.get("SAPP_RUN_NOTEBOOKS") else "off"
nb_execution_timeout = 1800

default_role = "code"  # single backquotes in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say what arguments are
napoleon_use_rtype = False
napoleon_use_ivar = True


def _field(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples: the class's docstring has them."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", _field)
