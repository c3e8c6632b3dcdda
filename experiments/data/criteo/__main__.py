"""Prepare Criteo's click data for training.

python -m experiments.data.criteo prepare --input train.txt.gz --output criteo
"""

import argparse
import dataclasses
import errno
import sys

from experiments import cli
from experiments.data.criteo.columns import PARTS, Options
from experiments.utils.registry import missing_extra

try:
    from experiments.data.criteo.prepare import prepare
    from experiments.data.criteo.reader import InputError
except ModuleNotFoundError as error:
    sys.exit(f"Cannot run: {missing_extra('click logs', 'tables', error)}")


def main() -> None:
    arguments = _parser().parse_args()
    with cli.input_errors():
        options = Options(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Options)})
    try:
        manifest = prepare(
            arguments.input, arguments.output, options, arguments.overwrite, arguments.threads, progress=_say
        )
    except (InputError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        cli.fail(str(error), cli.DISK_FULL if full else cli.BAD_INPUT)
    rows = ", ".join(f"{manifest['rows'][part]:,} to {word}" for part, word in zip(PARTS, _WORDS, strict=True))
    left_out = sum(entry["lines"] for entry in manifest["malformed"].values())
    print(f"{arguments.output}: {rows}; {sum(manifest['vocabulary'].values()):,} ids; {left_out:,} lines left out")


_WORDS = ("train on", "validate on", "test on")
_HELP = {
    "train": "share of the rows to train on",
    "validation": "share of the rows to validate on",
    "test": "share of the rows to test on",
    "order": "random, or chronological: the first rows for training",
    "seed": "of the random division",
    "minimum_count": "categories seen less often in training share one id",
    "numeric_minimum_count": "the same for buckets of numbers",
    "threshold": "numbers up to this one are buckets of their own",
    "base": "of the logarithm of larger numbers",
    "exponent": "what their logarithm is raised to",
    "max_malformed": "share of the lines that may be malformed",
    "strict": "fail at the first malformed line",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.data.criteo", description=__doc__.split("\n")[0])
    command = parser.add_subparsers(required=True, metavar="prepare").add_parser(
        "prepare", formatter_class=argparse.ArgumentDefaultsHelpFormatter, help="make what training reads"
    )
    command.add_argument("--input", required=True, help="the click log: .txt, .csv, plain, .gz or .zst")
    command.add_argument("--output", required=True, help="directory to make")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier preparation")
    command.add_argument("--threads", type=_positive, help="by default as many as there are cores")
    for field in dataclasses.fields(Options):
        name, text = f"--{field.name}", _HELP[field.name]
        if field.type is bool:
            command.add_argument(name, action="store_true", help=text)
        else:
            command.add_argument(name, type=field.type, default=field.default, help=text)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
