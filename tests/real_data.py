"""Published data sets, for the tests that read them where they are stored: in `$SAPP_TEST_DATA`."""

import os
import pathlib

import pytest
from commands import ROOT

FILES = pathlib.Path(os.environ.get("SAPP_TEST_DATA", ROOT.parent / "shared" / "data"))


def needs(path):
    """Skips a test where a file or folder is not here."""
    return pytest.mark.skipif(not path.exists(), reason=f"{path} is not here; SAPP_TEST_DATA says where to look")
