"""The algorithm and the schedule that the documentation recommends, as one function."""

import difflib
from collections.abc import Sequence
from typing import Unpack

from sa_plus_plus import phases as schedules
from sa_plus_plus.algorithms import sequential_attention
from sa_plus_plus.compose import PruningOptions
from sa_plus_plus.phases import check_total_steps
from sa_plus_plus.sparsifier import Sparsifier


def recommended(
    *, block: int | Sequence[int | None], sparsity: float, steps: int, **options: Unpack[PruningOptions]
) -> Sparsifier:
    """What `docs/choosing.md` recommends, for training from scratch and from trained weights alike.

    `sequential_attention` with blocks ranked by attention times norm, and one rise of the sparsity over the first half
    of the run. It was chosen on runs of 600 to 4,000 steps; for runs as long as those on ImageNet there are only the
    paper's own figures, for `phases.sequential_attention(steps)`.

    Args:
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      steps: number of optimizer updates in the run.
      **options: see `PruningOptions`.

    Raises:
      TypeError: for an unknown option.
      ValueError: for options out of range, or fewer than 2 steps.

    >>> print(*recommended(block=16, sparsity=0.9, steps=1000).phases.phases)
    sparsification [0, 500) sparse [500, 1000)
    """
    _check_options(options)
    check_total_steps(steps)
    if steps < 2:
        raise ValueError(f"steps={steps} is too short: at least one step to choose blocks, and one to train what stays")
    phases = schedules.finetune(steps)
    return sequential_attention(block=block, sparsity=sparsity, score="effective", phases=phases, **options)


def _check_options(options: PruningOptions) -> None:
    known = ("block", "sparsity", "steps", *PruningOptions.__annotations__)
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TypeError(
                f"unexpected keyword argument {name!r}; did you mean {nearest!r}? For options of an algorithm, such as "
                "its schedule, give the algorithm: sapp.sparsify(tx, sapp.sequential_attention(...))"
            )
