"""Build the site with Sphinx, from the extra `docs`: `python -m docs`, to `docs/_build/html`. A warning is an error."""

import pathlib
import sys

from sphinx.cmd.build import main

HERE = pathlib.Path(__file__).resolve().parent
# -E reads every page again: Sphinx does not see that a docstring or the list of notebooks has changed.
FLAGS = ["-W", "--keep-going", "-E", "-q", "-b", "html", "-c", str(HERE), "-d", str(HERE / "_build" / "doctrees")]

if __name__ == "__main__":
    # The sources are the repository's own pages, so that a link between two of them is the same on the site.
    status = main([*FLAGS, str(HERE.parent), str(HERE / "_build" / "html")])
    if not status:
        print(HERE / "_build" / "html" / "index.html")
    sys.exit(status)
