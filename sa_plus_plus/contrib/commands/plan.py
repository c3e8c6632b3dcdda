"""The command `plan`: what would be pruned in a checkpoint, before anything is."""

import argparse
from typing import Any

from sa_plus_plus.contrib.commands import formats, options

DESCRIPTION = """\
Show which kernels of a checkpoint would be pruned, in which blocks, and how many of these stay. Nothing is written.

Kernels are read as matrices of inputs by outputs. How is told by their names and biases; where that is not certain the
table says "assumed", and --view says it."""

_READINGS = "--view='PATTERN=i o' for inputs first, or --view='PATTERN=o i -> i o' for outputs first"


def add_to(commands: Any) -> None:
    """Add the command to others.

    Args:
      commands: what `add_subparsers` of an `argparse.ArgumentParser` returned.
    """
    parser = options.add_command(
        commands, "plan", "show what would be pruned in a checkpoint", DESCRIPTION, run, "plan"
    )
    options.add_checkpoint(parser)
    options.add_plan(parser)
    parser.add_argument("--all", action="store_true", help="show scalars and vectors too")


def run(arguments: argparse.Namespace) -> None:
    """Show a plan.

    Args:
      arguments: of the command line.

    Raises:
      ValueError, TypeError, OSError, ImportError: naming what is wrong.
    """
    checkpoint = formats.read(arguments.checkpoint)
    plan = options.plan_of(arguments, checkpoint.params)
    print(plan.table(all=arguments.all))
    if assumed := [layer for layer in plan.pruned.values() if layer.assumed]:
        which = f"{len(assumed)} of {len(plan.pruned)} kernels is assumed, such as that of {assumed[0].path}"
        print(f"\nThe reading of {which}.\nIf it is wrong, say {_READINGS}.")
