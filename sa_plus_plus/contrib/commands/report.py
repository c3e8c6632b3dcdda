"""The command `report`: one page on a pruned checkpoint, for a person to look at."""

import argparse
import os
import pathlib
import shlex
from typing import Any

import jax
import jax.numpy as jnp

import sa_plus_plus as sapp
from sa_plus_plus.checks import faults
from sa_plus_plus.contrib.commands import comparison, formats, functions, measures, options, pictures
from sa_plus_plus.contrib.commands.page import Page
from sa_plus_plus.files import write_atomically
from sa_plus_plus.sparse.summaries import summary

DESCRIPTION = """\
Write a page on a pruned checkpoint, one HTML file: for each kernel the blocks that are left, how many were planned,
norms kept and bytes. With --function, package.module:function, also milliseconds of the whole network, dense and
pruned, measured alternately on this machine, and the largest difference of their outputs.

The plan is what the checkpoint has a record of (one-shot leaves one in safetensors), or what --sparsity and --block
say; without either, blocks are found from the zeros."""


def add_to(commands: Any) -> None:
    """Add the command to others.

    Args:
      commands: what `add_subparsers` of an `argparse.ArgumentParser` returned.
    """
    parser = options.add_command(commands, "report", "write a page on a pruned checkpoint", DESCRIPTION, run, "report")
    options.add_checkpoint(parser)
    add = parser.add_argument
    add(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("report.html"),
        metavar="FILE",
        help="by default report.html",
    )
    add("--against", type=pathlib.Path, metavar="DENSE", help="the checkpoint before it was pruned")
    add("--function", metavar="MODULE:NAME", help=options.FUNCTION)
    options.add_plan(parser, required=False)


def run(arguments: argparse.Namespace) -> None:
    """Write the page.

    Args:
      arguments: of the command line.

    Raises:
      ValueError, TypeError, OSError, ImportError: naming what is wrong, before anything is written.
    """
    options.check_output(arguments.output, arguments.checkpoint)
    pictures.check_packages()
    if arguments.sparsity is None and (arguments.where or arguments.view):
        raise ValueError("--where and --view are parts of a plan: give --sparsity too")
    checkpoint = formats.read(arguments.checkpoint)
    dense = formats.read(arguments.against).params if arguments.against else None
    given = arguments.sparsity is not None
    plan = options.plan_of(arguments, checkpoint.params) if given else checkpoint.plan
    found = summary(checkpoint.params, views=options.views_of(plan) if plan else None)
    kernels = measures.measure(checkpoint.params, found, plan, dense)
    compared = None
    if arguments.function:
        network, arrays = functions.network(arguments.function, checkpoint.params)
        print("measuring the network", flush=True)
        full = None if dense is None else jax.tree.map(jnp.asarray, dense)
        compared = comparison.compare(network, arrays, full, plan)
    warnings = []
    if plan:
        warnings = [f"{head}: {'; '.join(sentences)}" for head, sentences in faults(checkpoint.params, plan)]
    title = f"{arguments.checkpoint.resolve().name}, {found.sparsity:.0%} of the kernel weights zero"
    page = Page(title, _notes(arguments, checkpoint.format), warnings, found, kernels, compared)
    content = page.text().encode()
    write_atomically(arguments.output, lambda file: file.write(content))
    print(arguments.output)


def _notes(arguments: argparse.Namespace, kind: str) -> list[str]:
    command = f"python -m sa_plus_plus {shlex.join(map(str, arguments.arguments))}"
    machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} processors"
    return [
        f"<code>{command.replace('&', '&amp;').replace('<', '&lt;')}</code>",
        f"{kind}; sa_plus_plus {sapp.__version__}, JAX {jax.__version__}, {machine}",
    ]
