"""Check the paper's lemmas and theorems numerically, and write one page of tables and figures.

python -m experiments.theory --output=runs/theory

It writes `theory.md`, three figures and `theory.json` to the directory. Exit status: 0 done and every claim held, 1 a
claim failed, 2 bad input.
"""

import argparse
import datetime
import errno
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments import cli
from experiments.outputs import report
from experiments.theory import lemmas, one_group, page, recovery, replacement
from experiments.theory.instances import QUICK, Amount

UNMET = 1


def main() -> None:
    arguments = _parser().parse_args()
    amount, folder = QUICK if arguments.quick else Amount(), pathlib.Path(arguments.output)
    with cli.input_errors():
        if (folder / "theory.md").exists() and not arguments.overwrite:
            raise FileExistsError(f"{folder} holds a page: choose another --output or pass --overwrite")
        folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        content: dict[str, Any] = {"lemmas": _told("The lemmas", lambda: lemmas.rows(amount))}
        content["edges"] = _told("Theorem 1.1: where one group ends", lambda: one_group.edges(amount))
        content["theorem_1_1"] = _told("Theorem 1.1: many starts", lambda: one_group.rows(amount, content["edges"]))
        content["wide"] = _told("Theorem 1.1: further below", lambda: one_group.wide(amount))
        content["theorem_b3"] = _told("Theorem B.3", lambda: replacement.rows(amount))
        content["planted"] = _told("Planted groups", lambda: recovery.planted(amount))
        content["digits"] = _told("Digits", lambda: recovery.digits(amount))
    content |= {
        "seconds": time.perf_counter() - started,
        "amount": amount._asdict(),
        "versions": report.versions(),
        "date": datetime.date.today().isoformat(),
    }
    try:
        page.write(folder, content)
    except OSError as error:
        cli.fail(str(error), cli.DISK_FULL if error.errno == errno.ENOSPC else cli.BAD_INPUT)
    wrong = failures(content)
    print(f"In {folder}: theory.md, its figures, theory.json; {content['seconds']:.0f} s")
    print("\n".join(["Not as claimed:", *wrong]) if wrong else "Every lemma and theorem held on every instance.")
    sys.exit(UNMET if wrong else 0)


def failures(content: dict[str, Any]) -> list[str]:
    """The paper's claims that do not hold."""
    wrong = [
        f"Lemma {row['lemma']}, {row['problem']}: {row['above 1e-8']} of {row['instances']} minima differ"
        for row in content["lemmas"]
        if row["above 1e-8"]
    ]
    for row in content["theorem_1_1"]:
        if row["penalty"] == one_group.BROKEN.name:
            continue
        name, count = f"Theorem 1.1, {row['penalty']}, {row['problem']}", row["instances"]
        wrong += [f"{name}: {row[c]} instances {c}" for c in ("found lower", "found another as low") if row[c]]
        for claim in ("one group", "of largest gradient", "zero from tau on"):
            if row[claim] != count:
                wrong.append(f"{name}: {claim} in {row[claim]} of {count}")
    for row in content["theorem_b3"]:
        if row["bound holds"] != row["runs"]:
            wrong.append(f"Theorem B.3, {row['problem']}, k = {row['k']}: {row['bound holds']} of {row['runs']} runs")
    return wrong


def _told(title: str, compute: Callable[[], Any]) -> Any:
    print(f"{title} …", end=" ", file=sys.stderr, flush=True)
    started = time.perf_counter()
    result = compute()
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.theory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", default="runs/theory", help="directory to write to (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier page")
    parser.add_argument("--quick", action="store_true", help="a few instances of everything, to see that it runs")
    return parser


if __name__ == "__main__":
    main()
