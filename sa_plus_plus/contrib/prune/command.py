"""The command `prune`: its options, what must be there before it begins, and what it does."""

import argparse
import importlib.util
import math
import pathlib
import shlex
from typing import Any

from sa_plus_plus.contrib.commands.options import add_command, integers

DESCRIPTION = """\
Prune a published transformer by blocks: a directory of transformers or sentence-transformers with BERT (also with mean
or CLS pooling), GPT-2 or ViT goes in; the same files come out, with most blocks of the layers' weights exactly zero,
so that transformers and sentence-transformers load them unchanged. NEW/pruning has a page with pictures (report.md)
and the network for sapp.serve (served.safetensors).

With --steps the layers learn from the dense network on your text or images while blocks are removed
(SequentialAttention++); no labels are needed. A few hundred steps are the least. With --steps=0 they are pruned in one
go (Optimal Brain Surgeon), in minutes. If the command is stopped, the same command goes on."""

PACKAGES = {  # modules that it needs, and the packages that bring them
    "flatbuffers": "flatbuffers",
    "flax": "flax",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
}


def add_to(commands: Any) -> None:
    """Add the command to others.

    Args:
      commands: what `add_subparsers` of an `argparse.ArgumentParser` returned.
    """
    parser = add_command(
        commands, "prune", "prune a published transformer from its directory", DESCRIPTION, run, "prune"
    )
    add = parser.add_argument
    add("directory", type=pathlib.Path, metavar="DIRECTORY", help="of config.json and model.safetensors")
    add("--output", type=pathlib.Path, required=True, metavar="NEW", help="directory to be made")
    add(
        "--text",
        type=pathlib.Path,
        metavar="FILE",
        help="text with a sentence a line, plain or .gz, for BERT and GPT-2",
    )
    add("--images", type=pathlib.Path, metavar="FOLDER", help="images for ViT; without, only --steps=0, by magnitude")
    add("--sparsity", type=float, required=True, help="share of the blocks that are removed, such as 0.7")
    add("--block", type=integers, default=(16, 16), help="inputs and outputs of a block: 16,16 (the default), 4,16")
    add("--steps", type=_whole, default=1000, help="of training, by default 1000; 0 to prune in one go")
    add("--length", type=_whole, default=0, help="in tokens; longer lines are cut. By default the longest, at most 128")
    add("--batch", type=_positive, default=0, help="examples of a step; by default 32, for GPT-2 8")
    add(
        "--learning-rate",
        type=_rate,
        default=0.0,
        help="of Adam after a warm-up; by default 1e-3 at width 384, less if wider",
    )
    parser.set_defaults(interrupted="the same command goes on from what is kept")


def _whole(text: str) -> int:
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _rate(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError(text)
    return number


for _kind, _name in ((_whole, "number"), (_positive, "number"), (_rate, "rate")):
    _kind.__name__ = _name  # argparse's messages have it


def check_packages() -> None:
    """Name the packages that are missing.

    Raises:
      ImportError: if there are any.
    """
    if missing := [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise ImportError(
            f"the packages {', '.join(missing)} are missing: pip install {' '.join(missing)}, or all that the command "
            "needs by pip install 'sa_plus_plus[prune]'"
        )


def run(options: argparse.Namespace) -> None:
    """Prune a network.

    Args:
      options: of the command line.

    Raises:
      ValueError, OSError, ImportError: naming what is wrong, before anything is trained.
    """
    check_packages()
    from sa_plus_plus.contrib.prune import pipeline  # noqa: PLC0415 - needs these packages

    command = f"python -m sa_plus_plus {shlex.join(options.arguments)}"
    pipeline.prune(options, command, lambda text: print(text, flush=True))
