"""Build the site with Sphinx, from the extra `docs`, to `docs/_build/html`. A warning is an error.

python -m docs               # notebooks without outputs
python -m docs --notebooks   # runs them, and shows what they print and draw; with SAPP_SHORT=1 in their short form
"""

import os
import pathlib
import sys

from sphinx.cmd.build import main

HERE = pathlib.Path(__file__).resolve().parent
# -E reads every page again: Sphinx does not see that a docstring or the list of notebooks has changed.
FLAGS = ["-W", "--keep-going", "-E", "-q", "-b", "html", "-c", str(HERE), "-d", str(HERE / "_build" / "doctrees")]
RUN = ["-D", "nb_execution_mode=force"]

if __name__ == "__main__":
    run = "--notebooks" in sys.argv[1:]
    if unknown := [argument for argument in sys.argv[1:] if argument != "--notebooks"]:
        sys.exit(f"{unknown[0]!r} is not an option: python -m docs [--notebooks]")
    if run:  # the kernels are to find the repository and draw into their cells, on the device that is there
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        os.environ.pop("MPLBACKEND", None)
    # The sources are the repository's own pages, so that a link between two of them is the same on the site.
    status = main([*FLAGS, *(RUN if run else []), str(HERE.parent), str(HERE / "_build" / "html")])
    if not status:
        print(HERE / "_build" / "html" / "index.html")
    sys.exit(status)
