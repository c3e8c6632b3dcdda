"""Kill the main job at random instants; each time, what it ends with must be bit for bit what it is undisturbed.

    python tests/fuzz/campaign_kills.py --kills=1000

A third of the kills strike after a random number of steps, a third at a random time from the start of the process to
the end of its report, and a third soon after another kill. Killed runs are started again until they end. Writes
benchmarks/results/kill_campaign.json: how many kills, where they struck, and which runs ended otherwise.
`resume_test.py` has one run with a kill of every kind.
"""

import argparse
import collections
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "experiments/training"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR") or tempfile.mkdtemp()
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["MPLBACKEND"] = "Agg"

import commands
import resume_test as resume

from benchmarks import timing


def struck(workdir: pathlib.Path) -> str:
    """What the run had come to when it was killed, by the files it left."""
    if (workdir / "result.json").exists():
        return "after the result was written"
    if not (workdir / "config.json").exists():
        return "before the directory was settled"
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    if any("tmp" in name for name in names):
        return "during a save"
    if str(resume.STEPS) in names:
        return "during the report"
    return "between saves" if any(name.isdigit() for name in names) else "before the first save"


def kill(workdir: pathlib.Path, rng: random.Random, seconds: float) -> bool:
    """Start the run and kill it; whether that came before its end."""
    kind = rng.choice(("step", "time", "early"))
    when = str(rng.randint(1, resume.STEPS)) if kind == "step" else "1000s"  # which never strikes
    command = resume.start(workdir, when=when)
    if kind != "step":
        deadline = time.monotonic() + rng.uniform(0, seconds if kind == "time" else seconds / 4)
        while command.running() and time.monotonic() < deadline:
            time.sleep(0.002)
        command.kill()
    return command.finish().returncode == -signal.SIGKILL


def main(kills: int, minutes: float, seed: int) -> int:
    rng, places, failures, runs = random.Random(seed), collections.Counter(), [], 0
    scratch = pathlib.Path(tempfile.mkdtemp())
    commands.SECONDS = 3600  # beside whatever else the machine has to do
    for name in ("compiling", "whole"):
        began = time.monotonic()
        done = resume.run(scratch / name, when="1000s")
        seconds = time.monotonic() - began
        assert done.returncode == 0, done.output
    want = resume.outcome(scratch / "whole")
    until = time.monotonic() + 60 * minutes
    while places.total() < kills and time.monotonic() < until:
        workdir, here = scratch / f"run{runs}", []
        for _ in range(rng.randint(1, 8)):
            if not kill(workdir, rng, seconds):
                break
            here.append(struck(workdir))
        done = resume.run(workdir)
        runs += 1
        places.update(here)
        if done.returncode or resume.outcome(workdir) != want:
            failures.append({"run": runs - 1, "kills": here, "output": done.output[-2000:]})
            print(f"run {runs - 1} ended otherwise after kills {here}; it is kept in {workdir}", flush=True)
        else:
            shutil.rmtree(workdir)
        print(f"{places.total()} kills in {runs} runs, {len(failures)} failures", flush=True)
        content = {"kills": places.total(), "runs": runs, "seed": seed, "struck": dict(places), "failures": failures}
        result = timing.save("kill_campaign", content)  # each time, so that a campaign may be stopped itself
    print(result)
    if not failures:
        shutil.rmtree(scratch)
    return bool(failures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long, however few the kills")
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(**vars(parser.parse_args())))
