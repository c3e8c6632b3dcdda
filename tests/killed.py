"""`python tests/killed.py STEP|SECONDSs [flags]`: experiments.main that kills itself, as a scheduler would.

An integer kills it with SIGKILL as soon as that step, or a later one, was dispatched, a number with an `s` that long
after the loop began; `term:STEP` sends it SIGTERM after that step, `full:STEP` fills the disk then. Steps take 10 ms
more than usual, to give the clock a chance.
"""

import contextlib
import os
import signal
import sys
import threading
import time

from experiments import cli, main
from experiments.outputs import hooks


def arm(when):
    original_step, original_start = hooks.Observer._on_step, hooks.Observer._on_start

    def on_step(self, done):
        time.sleep(0.01)
        if when.isdigit() and done >= int(when):
            os.kill(os.getpid(), signal.SIGKILL)
        if when == f"term:{done}":
            os.kill(os.getpid(), signal.SIGTERM)
        if when == f"full:{done}":
            self._checkpoints.wait()
            with contextlib.suppress(OSError), (self._path / "filler").open("wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass
        return original_step(self, done)

    def on_start(self, step):
        original_start(self, step)
        if when.endswith("s"):
            threading.Timer(float(when[:-1]), os.kill, (os.getpid(), signal.SIGKILL)).start()

    hooks.Observer._on_step, hooks.Observer._on_start = on_step, on_start


if __name__ == "__main__":
    arm(sys.argv.pop(1))
    cli.run(main.main)
