"""Commands: `sapp plan`, `one-shot`, `report` and `prune`, or `python -m sa_plus_plus plan` and so on."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from sa_plus_plus.contrib.commands import one_shot, plan, report
from sa_plus_plus.contrib.prune import command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
      arguments: of the command line; None for those of this process.
    """
    name = "sapp" if pathlib.Path(sys.argv[0]).stem == "sapp" else "python -m sa_plus_plus"
    parser = argparse.ArgumentParser(prog=name, description="Block-wise pruning of neural networks.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for each in (plan, one_shot, report, command):
        each.add_to(commands)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    options.arguments = arguments
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"Cannot {options.command}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"Interrupted: {getattr(options, 'interrupted', 'nothing was written')}.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
