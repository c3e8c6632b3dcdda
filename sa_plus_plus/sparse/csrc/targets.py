"""The compiler's flags for each target, read from the table in `targets.def`."""

import pathlib
import re

TABLE = pathlib.Path(__file__).parent / "targets.def"
FAMILIES = {"x86_64": "X86", "amd64": "X86", "aarch64": "ARM", "arm64": "ARM"}  # by the names of machines
_ROW = re.compile(r'^(\w+)\((\w+), (\w+), "([^"]*)"', re.MULTILINE)


def flags(machine: str) -> dict[str, list[str]]:
    """By target, what `target.cc` is compiled with; the best come first.

    Args:
      machine: what is compiled for, as `platform.machine()` or the compiler's `-dumpmachine` names it.

    >>> list(flags("riscv64"))
    ['baseline']
    """
    family = FAMILIES.get(machine.lower().split("-")[0])
    found = _ROW.findall(TABLE.read_text())
    rows = {name: (extended, own) for kind, name, extended, own in found if kind in ("ANY", family)}

    def of(name: str) -> list[str]:
        if name not in rows:
            return []
        extended, own = rows[name]
        return [*of(extended), *own.split()]

    return {name: [f"-DSAPP_TARGET={name}", *of(name)] for name in rows}
