"""The command `one-shot`: a checkpoint pruned without training."""

import argparse
import pathlib
from typing import Any

import numpy as np

from sa_plus_plus.contrib.commands import formats, functions, options
from sa_plus_plus.oneshot.prune import one_shot
from sa_plus_plus.planning import LeafPlan, Plan, map_layers
from sa_plus_plus.pruning import largest_blocks
from sa_plus_plus.sparse.summaries import bytes_text, summary

DESCRIPTION = """\
Prune a checkpoint without training. The new one has the same arrays in the same format, with most blocks of the planned
kernels exactly zero: a file for a file, a directory for a directory, with its other files copied.

Without --function the largest blocks of each kernel stay. With --function, package.module:function, blocks are chosen
and the remaining weights adjusted layer by layer so that outputs on your examples change least (Optimal Brain Surgeon).
The function is called with the checkpoint's arrays and returns (fn, examples): the network fn(params, *inputs), and a
list of batches of its inputs."""
_METHODS = ("obs", "alps", "wanda", "magnitude")


def add_to(commands: Any) -> None:
    """Add the command to others.

    Args:
      commands: what `add_subparsers` of an `argparse.ArgumentParser` returned.
    """
    parser = options.add_command(
        commands, "one-shot", "prune a checkpoint without training", DESCRIPTION, run, "prune in one shot"
    )
    options.add_checkpoint(parser)
    add = parser.add_argument
    add("--output", type=pathlib.Path, required=True, metavar="NEW", help="file or directory to be made")
    options.add_plan(parser)
    add("--function", metavar="MODULE:NAME", help=options.FUNCTION)
    add("--method", choices=_METHODS, help="which blocks stay: with --function obs (the default), without magnitude")


def run(arguments: argparse.Namespace) -> None:
    """Prune a checkpoint.

    Args:
      arguments: of the command line.

    Raises:
      ValueError, TypeError, OSError, ImportError: naming what is wrong, before anything is written.
    """
    options.check_output(arguments.output, arguments.checkpoint)
    if arguments.method not in (None, "magnitude") and arguments.function is None:
        raise ValueError(f"--method={arguments.method} needs examples: give --function=package.module:function")
    checkpoint = formats.read(arguments.checkpoint)
    plan = options.plan_of(arguments, checkpoint.params)
    if arguments.function is None:
        pruned = map_layers(_largest, checkpoint.params, plan.pruned)
    else:
        pruned = _adjusted(arguments, checkpoint.params, plan)
    checkpoint.write(arguments.output, pruned, plan)
    found = summary(pruned, views=options.views_of(plan))
    print(
        f"{arguments.output}: {len(plan.pruned)} of {len(found.kernels)} kernels pruned, {found.sparsity:.2%} of the "
        f"kernel weights are zero; {bytes_text(found.bytes)}, by blocks {bytes_text(found.stored_bytes)}"
    )


def _largest(layer: LeafPlan | None, leaf: Any) -> Any:
    if layer is None:
        return leaf
    if not np.isfinite(leaf).all():
        raise ValueError(f"{layer.path} has weights that are NaN or infinite")
    return largest_blocks(np.asarray(leaf), layer.block, layer.kept_each, layer.view)


def _adjusted(arguments: argparse.Namespace, params: Any, plan: Plan) -> Any:
    network, arrays = functions.network(arguments.function, params)
    method = arguments.method or "obs"
    print(
        f"pruning {len(plan.pruned)} kernels by {method}, with {len(network.batches)} batches of examples", flush=True
    )
    found = one_shot(
        network.fn,
        arrays,
        network.batches,
        method=method,
        block=arguments.block,
        sparsity=arguments.sparsity,
        min_blocks=1,
        where=plan.pruned.__contains__,
        views=options.views_of(plan),
    )
    print(found)

    def chosen(layer: LeafPlan | None, leaf: Any, new: Any) -> Any:
        """The new weights of a pruned kernel, in their own type; all else is as it was."""
        return leaf if layer is None else np.asarray(new).astype(leaf.dtype)

    return map_layers(chosen, params, plan.pruned, found.params)
