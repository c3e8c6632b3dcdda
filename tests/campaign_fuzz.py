"""All hypothesis tests on many more examples, and random products through the compiled kernel under sanitizers.

    python tests/campaign_fuzz.py --examples=1000 --minutes=60

Goes in rounds, each with a seed of its own: a twentieth of the examples for every test file, one process each, and
10,000 products. Ends after all rounds, or with the file that is running when the time is up. Writes
benchmarks/results/fuzz_campaign.json: how many tests, examples and products, and what failed.
"""

import argparse
import collections
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import kernel_fuzz

from benchmarks import timing

ROOT = kernel_fuzz.ROOT
KERNEL, PRODUCTS, ROUNDS = "kernel_fuzz.cc", 10_000, 20
HYPOTHESIS = re.compile("^(import|from) hypothesis", re.MULTILINE)
STATISTICS = re.compile(r"^(tests/\S+::.*):$|(\d+) passing, (\d+) failing", re.MULTILINE)


def examined(file: pathlib.Path, examples: int, seed: int) -> tuple[dict[str, int], str]:
    """`{test: how many examples it ran}`, and the output if a test failed."""
    flags = ["-n0", "-m", "hypothesis", "--hypothesis-profile=campaign", "--hypothesis-show-statistics"]
    command = [sys.executable, "-m", "pytest", *flags, f"--hypothesis-seed={seed}", str(file.relative_to(ROOT))]
    environment = os.environ | {"EXAMPLES": str(examples)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    counts: dict[str, int] = {}
    for name, passing, failing in STATISTICS.findall(run.stdout):
        if name:
            test = name
        else:
            counts[test] = counts.get(test, 0) + int(passing) + int(failing)
    return counts, "" if run.returncode == 0 else run.stdout + run.stderr


def multiplied(fuzzer: pathlib.Path, seed: int) -> tuple[dict[str, int], str]:
    """`{source: how many products}`, and the output if one failed."""
    run = subprocess.run([fuzzer, str(PRODUCTS), str(seed)], capture_output=True, text=True)
    return {KERNEL: PRODUCTS if run.returncode == 0 else 0}, "" if run.returncode == 0 else run.stdout + run.stderr


def main(examples: int, minutes: float, seed: int) -> int:
    until = time.monotonic() + 60 * minutes
    files = [file for file in sorted((ROOT / "tests").glob("*_test.py")) if HYPOTHESIS.search(file.read_text())]
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        fuzzer = kernel_fuzz.build(pathlib.Path(scratch))
        for number, file in itertools.product(range(seed, seed + ROUNDS), [None, *files]):
            if time.monotonic() > until:
                break
            done, output = examined(file, max(1, examples // ROUNDS), number) if file else multiplied(fuzzer, number)
            counts.update(done)
            if output:
                failures.append({"what": file.name if file else KERNEL, "seed": number, "output": output[-4000:]})
                print(output, flush=True)
            print(f"seed {number}, {file.name if file else KERNEL}: {len(failures)} failures so far", flush=True)
    products = counts.pop(KERNEL, 0)
    content = {"seed": seed, "tests": len(counts), "examples": counts.total(), "products": products}
    print(content, timing.save("fuzz_campaign", {**content, "examples_of_each": dict(counts), "failures": failures}))
    return bool(failures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=1000, help="of each test")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(**vars(parser.parse_args())))
