"""What all measurements have in common: timing in turn, and files of results."""

import datetime
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.outputs import report
from experiments.utils.timing import alternate, spread

__all__ = ["RESULTS", "alternate", "save", "spread"]

RESULTS = pathlib.Path(__file__).parent / "results"


def save(name: str, content: Mapping[str, Any]) -> pathlib.Path:
    """Write `benchmarks/results/<name>.json` with versions, device and date."""
    path = RESULTS / f"{name}.json"
    content = {**content, "versions": report.versions(), "date": datetime.date.today().isoformat()}
    text = json.dumps(content, indent=2) + "\n"
    report.write_atomically(path, lambda file: file.write(text.encode()))
    return path
