"""A pruning algorithm composed of a parametrisation, a score and a schedule of phases.

Every algorithm here multiplies each block of a kernel by one number: the effective kernel is
`W * expand_blocks(scale * mask)`. The *parametrisation* defines `scale` (1, an attention weight, a norm), the *score*
ranks the blocks, and the *phases* say when they are chosen. `compose` builds a `Sparsifier` from the three;
`algorithms.py` has the algorithms themselves.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import numpy as np

from sa_plus_plus import dynamic_sparsity, planning, select
from sa_plus_plus._composed import IDENTITY, Composed, Parametrisation, ProximalStep, Score, traced_once
from sa_plus_plus.dynamic_sparsity import Regrowth
from sa_plus_plus.phases import DENSE, SPARSE, Phases
from sa_plus_plus.plan_options import PlanOptions
from sa_plus_plus.sparsifier import Sparsifier

__all__ = ["IDENTITY", "Parametrisation", "PruningOptions", "check_phases", "check_start", "compose"]


class PruningOptions(PlanOptions, total=False):
    """Options that all pruning algorithms share, besides `block`, `sparsity`, `phases` and those of `PlanOptions`.

    Attributes:
      scope: `"layer"` (the default) to keep the planned number of blocks in each layer, `"global"` to keep their sum
        over all layers, where each keeps what `min_kept` says.
    """

    scope: str


def compose(
    parametrisation: Parametrisation,
    score: Score,
    phases: Phases,
    *,
    block: int | Sequence[int | None],
    sparsity: float,
    mask_every: int = 1,
    monotone: bool = True,
    forget_masked: bool = False,
    logit_lr: float = 1.0,
    reset_logits_at: Sequence[str] = (),
    regrow: Regrowth | None = None,
    proximal_step: ProximalStep | None = None,
    seed: int | jax.Array | None = None,
    scope: str = "layer",
    **options: Unpack[PlanOptions],
) -> Sparsifier:
    """Build an algorithm from its parts.

    Args:
      parametrisation: how the effective kernel follows from weights and logits.
      score: how much each block deserves to stay.
      phases: the schedule.
      block: `(b_r, b_c)`, or one integer for a square.
      sparsity: share of the blocks removed, in [0, 1).
      mask_every: steps between selections in a sparsification phase.
      monotone: a block dropped in a sparsification phase stays dropped until the phase ends.
      forget_masked: masked weights are set to zero; otherwise they stay as they were when masked.
      logit_lr: factor on the logits' updates.
      reset_logits_at: kinds of phases at whose start the logits are reset to zero.
      regrow: how blocks are replaced in sparse phases; None for not at all.
      proximal_step: of a penalty, `proximal_step(layer, weights, logits) -> (weights, logits)`, after each update
        outside sparse phases.
      seed: seed of the random keys that `score` gets; may be traced. None for no keys.
      scope: `"layer"` or `"global"`, see `PruningOptions`.
      **options: see `PlanOptions`.

    Raises:
      TypeError: if `phases` is not a schedule.
      ValueError: for options out of range, or a schedule that ends dense.
    """
    check_phases(phases)
    if phases.phases[-1].kind == DENSE:
        raise ValueError(f"the last phase is {phases.phases[-1]} and would not leave the network pruned: end sparse")
    if scope not in ("layer", "global"):
        raise ValueError(f'scope must be "layer" or "global", got {scope!r}')
    if mask_every < 1:
        raise ValueError(f"mask_every must be at least 1 step, got {mask_every}")
    if mask_every != int(mask_every):
        raise ValueError(f"mask_every must be a whole number of steps, got {mask_every}")
    if regrow is not None:
        dynamic_sparsity.check(regrow)
    plan = planning.planner(block=block, sparsity=sparsity, **options)
    algorithm = Composed(
        parametrisation=parametrisation,
        score=score,
        phases=phases,
        plan=lambda params: plan(params)._replace(scope=scope),
        choose=select.top_k_per_layer if scope == "layer" else select.top_k_global,
        mask_every=mask_every,
        monotone=monotone,
        forget_masked=forget_masked,
        logit_lr=logit_lr,
        reset_logits_at=tuple(reset_logits_at),
        regrow=regrow,
        proximal_step=None if proximal_step is None else traced_once(proximal_step),
        seed=seed,
    )
    return Sparsifier(
        algorithm.init,
        algorithm.apply,
        algorithm.update,
        algorithm.finalize,
        algorithm.sync_from_params,
        algorithm.plan,
        phases,
        parametrisation.attention,
    )


def check_start(phases: Any, scores: str, otherwise: str = "") -> None:
    """Refuse a schedule that chooses blocks before their scores differ.

    Args:
      phases: the schedule.
      scores: the scores' name in the message.
      otherwise: an alternative to suggest in the message.
    """
    check_phases(phases)
    if phases.phases[0].kind == SPARSE:
        raise ValueError(
            f"the first phase is {phases.phases[0]}, but before training all {scores} are equal: "
            f"begin with a dense or a sparsification phase{otherwise}"
        )


def check_phases(phases: Any, schedule: str | None = None) -> None:
    """Refuse anything that is not a schedule, such as a number of steps or a list of phases.

    Args:
      phases: the argument.
      schedule: the name of the function that makes the algorithm's own, to suggest in the message.
    """
    if isinstance(phases, Phases):
        return
    steps = phases if isinstance(phases, int | np.integer) and not isinstance(phases, bool) else "total_steps"
    suggest_schedule = schedule is not None and not isinstance(phases, list | tuple)
    example = f"{schedule}({steps})" if suggest_schedule else "phases.custom(total_steps, [...])"
    raise TypeError(f"phases must be a schedule such as `{example}`, got {phases!r}")
