"""Random inputs for all that reads what others wrote, for as long as there is time; it goes on where it was stopped.

    python tests/fuzz/campaign_fuzz.py --minutes=600 --state=fuzz.json

Each round has a seed of its own, the number of the round, and goes through
  calls:    calls of the compiled kernels with sizes from the whole of int64, under sanitizers (`calls_fuzz.cc`);
  products: random products and attention against sums in double, under sanitizers (`kernel_fuzz.cc`);
  files:    mutated files and headers through the readers (`file_fuzz.py`);
  examples: one file of hypothesis tests, on more examples than usual.
The state, how many inputs of each kind with which outcome and what failed, is written after each part. With `--save`,
it becomes `benchmarks/results/fuzz_campaign.json`, with versions and processor; several states are added up.
"""

import argparse
import collections
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import file_fuzz
import kernel_fuzz

from benchmarks import timing
from experiments.utils import files

ROOT = kernel_fuzz.ROOT
CALLS, PRODUCTS, FILES = 500_000, 1000, 5000  # in a round
HYPOTHESIS = re.compile("^(import|from) hypothesis", re.MULTILINE)
STATISTICS = re.compile(r"^(tests/\S+::.*):$|(\d+) passing, (\d+) failing", re.MULTILINE)
FAILED = "failed"

Counts = dict[str, int]  # by outcome
Part = Callable[[int], tuple[Counts, str]]  # the counts of a round, and what to print if something failed


def computed(program: pathlib.Path, count: int, first: int) -> tuple[str, str]:
    """The output of a program in `kernel_fuzz.PROGRAMS`, and what it says if it fails."""
    run = subprocess.run([program, str(count), str(first)], capture_output=True, text=True)
    return run.stdout, "" if run.returncode == 0 else f"{program.name} {count} {first}\n{run.stdout}{run.stderr}"


def called(program: pathlib.Path, seed: int) -> tuple[Counts, str]:
    output, failure = computed(program, CALLS, CALLS * seed)
    if failure:
        return {FAILED: 1}, failure
    return {f"{kind} {what}": n for kind, each in json.loads(output).items() for what, n in each.items()}, ""


def multiplied(program: pathlib.Path, seed: int) -> tuple[Counts, str]:
    _, failure = computed(program, PRODUCTS, seed)
    return ({FAILED: 1} if failure else {"computed": PRODUCTS}), failure


def read(seed: int) -> tuple[Counts, str]:
    try:
        return file_fuzz.run(seed, FILES), ""
    except AssertionError as error:
        return {FAILED: 1}, f"file_fuzz.run({seed}, {FILES})\n{error}"


def examined(examples: int, seed: int) -> tuple[Counts, str]:
    """`{test: how many examples it ran}` of one test file after the other."""
    found = [file for file in sorted((ROOT / "tests").rglob("*_test.py")) if HYPOTHESIS.search(file.read_text())]
    file = str(found[seed % len(found)].relative_to(ROOT))
    flags = ["-n0", "-m", "hypothesis", "--hypothesis-profile=campaign", "--hypothesis-show-statistics"]
    command = [sys.executable, "-m", "pytest", *flags, f"--hypothesis-seed={seed}", file]
    environment = os.environ | {"EXAMPLES": str(examples)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    counts: collections.Counter[str] = collections.Counter()
    test = file
    for name, passing, failing in STATISTICS.findall(run.stdout):
        test = name or test
        counts[test] += int(passing or 0) + int(failing or 0)
    failed = {FAILED: 1} if run.returncode else {}
    return {**counts, **failed}, run.stdout + run.stderr if failed else ""


def empty() -> dict[str, Any]:
    return {"rounds": 0, "part": 0, "counts": {}, "failures": []}


def add(total: dict[str, Any], kind: str, counts: Counts) -> None:
    before = total["counts"].setdefault(kind, {})
    for what, n in counts.items():
        before[what] = before.get(what, 0) + n


def inputs(counts: dict[str, Counts]) -> Counts:
    """How many inputs there were of each kind: calls that were checked, and all others once."""
    checked = sum(n for what, n in counts.get("calls", {}).items() if what.endswith(" checked"))
    return {kind: checked if kind == "calls" else sum(each.values()) for kind, each in counts.items()}


def rounds(state: dict[str, Any], parts: dict[str, Part]) -> Iterator[str]:
    """Goes through all parts again and again, from where the state has come to; yields what was done."""
    kinds = list(parts)
    while True:
        seed, kind = state["rounds"], kinds[state["part"] % len(kinds)]
        counts, failure = parts[kind](seed)
        add(state, kind, counts)
        if failure:
            state["failures"].append({"part": kind, "seed": seed, "output": failure[-4000:]})
        state["part"] = (state["part"] + 1) % len(kinds)
        state["rounds"] += state["part"] == 0
        total = sum(inputs(state["counts"]).values())
        yield f"round {seed}, {kind}: {total:,} inputs, {len(state['failures'])} failures"


def save(states: Sequence[pathlib.Path]) -> pathlib.Path:
    """The sum of all states as the result."""
    total = empty()
    for path in states:
        state = json.loads(path.read_text())
        total["rounds"] += state["rounds"]
        total["failures"] += state["failures"]
        for kind, counts in state["counts"].items():
            add(total, kind, counts)
    by_kind = inputs(total["counts"])
    about = {"inputs": sum(by_kind.values()), "inputs_by_kind": by_kind, "processor": _processor()}
    return timing.save("fuzz_campaign", {**about, **{name: total[name] for name in ("rounds", "counts", "failures")}})


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", information.read_text()) if information.exists() else None
    return named[1] if named else platform.processor()


def main(minutes: float, state: pathlib.Path, examples: int) -> int:
    until = time.monotonic() + 60 * minutes
    total = json.loads(state.read_text()) if state.exists() else empty()
    with tempfile.TemporaryDirectory() as scratch:
        products, calls = kernel_fuzz.build(pathlib.Path(scratch), "-O1")
        parts: dict[str, Part] = {
            "calls": lambda seed: called(calls, seed),
            "products": lambda seed: multiplied(products, seed),
            "files": read,
            "examples": lambda seed: examined(examples, seed),
        }
        for done in rounds(total, parts):
            files.write_json(state, total)
            print(done, flush=True)
            if time.monotonic() > until:
                break
    return bool(total["failures"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--state", type=pathlib.Path, default=pathlib.Path("fuzz.json"), help="to go on from")
    parser.add_argument("--examples", type=int, default=50, help="of each hypothesis test in a round")
    parser.add_argument("--save", type=pathlib.Path, nargs="+", help="write these states as the result, run nothing")
    arguments = vars(parser.parse_args())
    if saved := arguments.pop("save"):
        print(save(saved))
    else:
        sys.exit(main(**arguments))
