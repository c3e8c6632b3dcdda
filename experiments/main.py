"""Train and prune one network.

    python -m experiments.main
    python -m experiments.main --config=configs/mnist.py --config.sparsifier.name=acdc --workdir=runs/acdc
    python -m experiments.main --config.init_from=runs/dense --config.sparsifier.recipe=finetune

Without flags it runs configs/mnist.py. The third command starts from the weights that a run has left in runs/dense. It
writes `result.json`, `metrics.jsonl`, `pruned.safetensors`, `run.png`, `tensorboard/` and `checkpoints/` to the work
directory, `features.json` for feature selection (configs/feature_selection.py), and `orders.json` for runs that reorder
units (`--config.sparsifier.reorder`). The same command resumes an interrupted run and ends with the same result as an
uninterrupted one. Exit status: 0 done, 2 bad input, 3 diverged, 4 stopped by SIGTERM after saving, 5 disk full.
"""

import contextlib
import errno
import pathlib
import sys
from collections.abc import Iterator

from absl import flags

import experiments
from experiments import cli, runs
from experiments.outputs import progress, workdir
from experiments.training import checkpoint, loop, sharding
from experiments.training.setup import Setup, prepare

flags.declare_key_flag("config")  # for --help
_WORKDIR = flags.DEFINE_string("workdir", None, "Where results go. Default: a new directory under runs/.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete the run in the work directory and start over.")
_RESUME_CHANGED = flags.DEFINE_bool("resume_changed", False, "Resume even if the config differs from that of the run.")
_PROFILE = flags.DEFINE_bool("profile", False, "Write a JAX trace of a few steps to profile/ in the work directory.")


def main(argv: list[str]) -> None:
    del argv  # cli.run has refused any
    config, console = cli.CONFIG.value, progress.console()
    with contextlib.ExitStack() as stack:
        with cli.input_errors():
            setup = prepare(config)
            path = cli.workdir_path(_WORKDIR.value, f"{config.name}-{config.sparsifier.name}")
            sharding.from_first(lambda: stack.enter_context(_occupied(path, setup)))
        cli.cache_compilations(path.parent)
        progress.warn_of_short_phases({setup.config.sparsifier.name: setup.phases}, console)
        try:
            result = runs.run(setup, path, console, _PROFILE.value, experiments.STARTED)
        except loop.Preempted as preempted:
            console.print(
                f"Saved after {preempted.step} steps on SIGTERM: the same command with --workdir={path} resumes"
            )
            sys.exit(cli.PREEMPTED)
        except checkpoint.NoIntactCheckpoint as error:
            cli.fail(str(error))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            rescue = f"make room, and the same command with --workdir={path} resumes from the last checkpoint"
            cli.fail(f"{error}: {rescue}", cli.DISK_FULL)
    if result["diverged"]:
        sys.exit(cli.DIVERGED)


@contextlib.contextmanager
def _occupied(path: pathlib.Path, setup: Setup) -> Iterator[None]:
    """The run's directory, for this process alone, with the config and the data that the run is of."""
    with workdir.claim(path):
        if _OVERWRITE.value:
            workdir.clear(path)
        workdir.record_config(path, cli.CONFIG.value, _RESUME_CHANGED.value)
        workdir.record_data(path, setup.fingerprint(), _RESUME_CHANGED.value)
        yield


if __name__ == "__main__":
    cli.run(main)
