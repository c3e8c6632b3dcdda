"""Common parts of all benchmarks: alternating timing, and result files."""

import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.outputs import report
from experiments.utils import files
from experiments.utils.timing import spread
from sa_plus_plus.timing import alternate

__all__ = ["RESULTS", "alternate", "save", "spread"]

RESULTS = pathlib.Path(__file__).parent / "results"


def save(name: str, content: Mapping[str, Any]) -> pathlib.Path:
    """Write `benchmarks/results/<name>.json` with versions, device and date."""
    path = RESULTS / f"{name}.json"
    today = datetime.date.today().isoformat()
    files.write_json(path, {**content, "versions": report.versions(), "date": today})
    return path
