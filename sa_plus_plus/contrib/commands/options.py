"""The options that the commands share: which kernels of a checkpoint are pruned, and in which blocks."""

import argparse
import fnmatch
import pathlib
import re
from collections.abc import Callable
from typing import Any

from sa_plus_plus import blocks as blk
from sa_plus_plus import plan_options, planning
from sa_plus_plus.contrib.commands import functions
from sa_plus_plus.names import named_as_kernel
from sa_plus_plus.planning import Plan
from sa_plus_plus.views import View

CHECKPOINT = "a safetensors or .npz file, a file of sapp.save, or a directory of safetensors or of orbax"
FUNCTION = (
    "called with the checkpoint's arrays, it returns (fn, examples): the network fn(params, *inputs) and a list of "
    "batches of its inputs"
)


def add_command(
    commands: Any, name: str, help: str, description: str, run: Callable[[argparse.Namespace], None], does: str
) -> argparse.ArgumentParser:
    """A command among others; its parser.

    Args:
      commands: what `add_subparsers` of an `argparse.ArgumentParser` returned.
      name: the command.
      help: one line on it.
      description: shown by its `--help`.
      run: takes the parsed options.
      does: what it does, for `Cannot <does>: <error>`.
    """
    parser = commands.add_parser(
        name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run, command=does)
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument for a checkpoint.

    Args:
      parser: of a command.
    """
    parser.add_argument("checkpoint", type=pathlib.Path, metavar="CHECKPOINT", help=CHECKPOINT)


def add_plan(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options of a plan.

    Args:
      parser: of a command.
      required: whether the command needs a plan.
    """
    add = parser.add_argument
    add("--sparsity", type=float, required=required, help="share of the blocks that are removed, such as 0.7")
    add(
        "--block",
        type=sides,
        default=(16, 16),
        help="inputs and outputs of a block: 16,16 (the default), 4,16; all for a whole side, 1,all",
    )
    add("--min-blocks", type=int, default=plan_options.MIN_BLOCKS, help="kernels with fewer stay dense, by default 100")
    add(
        "--where",
        action="append",
        default=[],
        metavar="PATTERN",
        help="kernels that are pruned, by shell-style patterns of their paths ('*attention*'), by default all; or a "
        "predicate on the path, package.module:function. May be repeated",
    )
    add(
        "--view",
        action="append",
        default=[],
        metavar="PATTERN=VIEW",
        help="how kernels are read as matrices of inputs by outputs: '*.weight=o i -> i o'. May be repeated",
    )


def plan_of(options: argparse.Namespace, params: Any) -> Plan:
    """The plan that the options ask for.

    Args:
      options: of `add_plan`.
      params: the checkpoint's arrays.

    Raises:
      ValueError, TypeError: as `sapp.plan`, or for an option that cannot be read.
    """
    views = dict(_view(text) for text in options.view)
    return planning.plan(
        params,
        block=options.block,
        sparsity=options.sparsity,
        min_blocks=options.min_blocks,
        where=_where(options.where),
        views=views or None,
    )


def views_of(plan: Plan) -> dict[str, View]:
    """How the pruned kernels of a plan are read, so that others read them alike.

    Args:
      plan: of a checkpoint.
    """
    return {path: blk.view_of(layer.shape, layer.view) for path, layer in plan.pruned.items()}


def integers(text: str) -> tuple[int, ...]:
    """A block, `16,16` or `16`.

    Args:
      text: of the option.
    """
    found = [int(side) for side in _parts(text)]
    if len(found) not in (1, 2) or min(found) < 1:
        raise ValueError(text)
    return tuple(found * (3 - len(found)))


def sides(text: str) -> tuple[int | None, ...]:
    """A block of which a side may be `all`.

    Args:
      text: of the option.
    """
    parts = _parts(text)
    if "all" not in parts:
        return integers(text)
    if len(parts) != 2 or parts == ["all", "all"]:
        raise ValueError(text)
    return tuple(None if part == "all" else integers(part)[0] for part in parts)


integers.__name__ = sides.__name__ = "block"  # argparse's messages have it


def _parts(text: str) -> list[str]:
    return [side.strip() for side in re.split(r"[,x×]", text.strip("() ")) if side.strip()]


def _where(patterns: list[str]) -> Callable[[str], bool]:
    if not patterns:
        return named_as_kernel
    predicates = [
        functions.load(pattern, "--where") if functions.is_reference(pattern) else _matching(pattern)
        for pattern in patterns
    ]
    return lambda path: any(predicate(path) for predicate in predicates)


def _matching(pattern: str) -> Callable[[str], bool]:
    return lambda path: named_as_kernel(path) and fnmatch.fnmatchcase(path, pattern)


def _view(text: str) -> tuple[str, str]:
    pattern, equals, view = text.partition("=")
    if not equals or not pattern or not view.strip():
        raise ValueError(f"--view={text!r} is no PATTERN=VIEW, such as '*.weight=o i -> i o'")
    return pattern, view.strip()


def check_output(output: pathlib.Path, checkpoint: pathlib.Path) -> None:
    """Refuse an output that would overwrite something, before anything is computed.

    Args:
      output: file or directory to be made.
      checkpoint: that is read.

    Raises:
      FileExistsError: if there is something already.
      FileNotFoundError: if there is no directory for it.
      ValueError: if it is in the checkpoint's own directory.
    """
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"--output={output} is already there: give another, or delete it")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output={output} cannot be made: there is no directory {output.absolute().parent}")
    if checkpoint.is_dir() and checkpoint.resolve() in output.resolve().parents:
        raise ValueError(f"--output={output} is in the directory of the checkpoint: give another")
