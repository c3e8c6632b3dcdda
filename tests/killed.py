"""`python tests/killed.py STEP|SECONDSs [flags]`: experiments.main that kills itself, as a scheduler would.

An integer kills it with SIGKILL as soon as that step, or a later one, was dispatched, a number with an `s` that long
after the loop began; `term:STEP` sends it SIGTERM after that step, `full:STEP` fills the disk then. Steps take 10 ms
more than usual, to give the clock a chance.
"""

import contextlib
import os
import pathlib
import signal
import sys
import threading
import time

from absl import flags

from experiments import cli, main
from experiments.training import loop


def arm(when):
    train = loop.train

    def killed(program, seeds, hooks, checkpoints):
        def on_step(done):
            time.sleep(0.01)
            if when.isdigit() and done >= int(when):
                os.kill(os.getpid(), signal.SIGKILL)
            if when == f"term:{done}":
                os.kill(os.getpid(), signal.SIGTERM)
            if when == f"full:{done}":
                checkpoints.wait()
                fill(pathlib.Path(flags.FLAGS.workdir) / "filler")
            return hooks.on_step(done)

        def on_start(step):
            hooks.on_start(step)
            if when.endswith("s"):
                timer = threading.Timer(float(when[:-1]), os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True  # a run that ends earlier does not wait for it
                timer.start()

        return train(program, seeds, hooks._replace(on_step=on_step, on_start=on_start), checkpoints)

    loop.train = killed


def fill(path):
    """Write until there is no room on the disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


if __name__ == "__main__":
    arm(sys.argv.pop(1))
    cli.run(main.main)
