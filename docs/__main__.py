"""Build the site: `python -m docs`.

Warnings are errors. With SAPP_RUN_NOTEBOOKS=1 the notebooks are run, and their outputs are on the pages.
"""

import sys
from pathlib import Path

from sphinx.cmd.build import main

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.exit(main(["-W", "--keep-going", "-q", "-b", "html", str(here), str(here / "_build" / "html")]))
