"""Schedules of phases: when the network is dense, being sparsified, or sparse (paper, sections 3.1, 4.2).

A schedule covers the steps `[0, total_steps)` with consecutive phases of three kinds:

- `dense`: every block is active;
- `sparsification`: the sparsity rises from 0 to its target along an exponential curve;
- `sparse`: the blocks chosen at the start of the phase stay fixed.

There is a function for each algorithm's own schedule, with the name of the algorithm, `gradual` for one long
sparsification phase, `finetune` for pruning an already trained network, and `custom` for anything else.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DENSE, SPARSIFICATION, SPARSE = KINDS = ("dense", "sparsification", "sparse")
RECIPES = ("imagenet", "criteo", "finetune", "gradual")
EXPONENT = 4.0  # the paper's c


class Phase(NamedTuple):
    """Steps `[start, stop)` of one kind: `dense`, `sparsification` or `sparse`."""

    kind: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.kind} [{self.start}, {self.stop})"


@dataclasses.dataclass(frozen=True)
class Phases:
    """A schedule: consecutive phases that cover `[0, total_steps)`.

    With `t` in [0, 1] the position in a sparsification phase, the sparsity there is its target times
    `(1 - exp(-c t)) / (1 - exp(-c))` (section 3.1); it is 0 in dense phases and the target in sparse ones.

    Methods take a step (an integer or an array of them, traced or not): step `i` is the state at the (i+1)-th gradient
    step. From `total_steps` on, everything stays as at the end of the last phase.

    Attributes:
      total_steps: length of the run in steps.
      phases: the phases in order.
      exponent: the curve's `c`: the larger, the more is pruned early in the phase.

    Raises:
      ValueError: if the exponent is not between 1e-6 and 1e6, or if phases overlap, leave a gap, do not end at
        `total_steps`, are empty or of an unknown kind.
    """

    total_steps: int
    phases: tuple[Phase, ...]
    exponent: float = EXPONENT

    def __post_init__(self) -> None:
        check_total_steps(self.total_steps)
        object.__setattr__(self, "phases", tuple(Phase(*p) for p in self.phases))
        if not 1e-6 <= self.exponent <= 1e6:
            raise ValueError(f"exponent must be between 1e-6 (a straight line) and 1e6, got {self.exponent}")
        end = 0
        for phase in self.phases:
            if phase.kind not in KINDS:
                raise ValueError(f"unknown kind of phase {phase.kind!r}; choose from {', '.join(KINDS)}")
            if phase.stop <= phase.start:
                raise ValueError(
                    f"phase {phase} of {self.total_steps} steps has no step: lengthen the run or the phase"
                )
            if phase.start != end:
                fault = "overlaps the one before" if phase.start < end else "leaves a gap after the one before"
                raise ValueError(f"phase {phase} {fault}, which ends at step {end}")
            end = phase.stop
        if end != self.total_steps:
            raise ValueError(f"the phases cover {end} steps, the run has {self.total_steps}")

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.asarray([p.start for p in self.phases], np.int32)

    def _of_phase(self, values: Any, step: Any) -> jax.Array:
        """The entry of `values` (one per phase) for the phase that `step` lies in."""
        return jnp.asarray(np.asarray(values))[self.index(step)]

    def at(self, step: int) -> Phase:
        """The phase of a (concrete) step."""
        return next(p for p in self.phases if step < p.stop or p is self.phases[-1])

    def index(self, step: Any) -> jax.Array:
        """Which phase the step lies in, from 0, int32."""
        return jnp.searchsorted(self._starts, jnp.asarray(step), side="right").astype(jnp.int32) - 1

    def is_boundary(self, step: Any) -> jax.Array:
        """Whether a phase other than the first begins at this step."""
        return jnp.isin(jnp.asarray(step), self._starts[1:])

    def kind_in(self, kinds: Sequence[str], step: Any) -> jax.Array:
        """Whether the step lies in a phase of one of these kinds."""
        return self._of_phase([p.kind in kinds for p in self.phases], step)

    def fraction(self, step: Any) -> jax.Array:
        """Share of the target sparsity that is due at a step, in [0, 1], float32."""
        start = self._of_phase(self._starts, step)
        length = self._of_phase(np.asarray([p.stop - p.start for p in self.phases], np.int32), step)
        t = jnp.minimum((jnp.asarray(step) - start) / length, 1).astype(jnp.float32)
        curve = jnp.expm1(-self.exponent * t) / np.float32(np.expm1(-self.exponent))
        rising = jnp.where(t < 1, curve, 1)
        return jnp.where(self.kind_in([DENSE], step), 0, jnp.where(self.kind_in([SPARSE], step), 1, rising))

    def reached(self, step: Any) -> jax.Array:
        """Whether exactly the target is due: in a sparse phase, and after a last sparsification phase."""
        over = (jnp.asarray(step) >= self.total_steps) & self.kind_in([SPARSIFICATION], step)
        return self.kind_in([SPARSE], step) | over

    def selects(self, step: Any, every: int) -> jax.Array:
        """Whether masks are chosen at a step: at phase starts, every `every` steps of a sparsification, and at its end.

        A sparse phase that follows another sparse one keeps its mask.
        """
        step = jnp.asarray(step)
        entered = [p.start for before, p in itertools.pairwise(self.phases) if not before.kind == p.kind == SPARSE]
        start = self._of_phase(self._starts, step)
        due = self.kind_in([SPARSIFICATION], step) & ((step - start) % every == 0) & (step < self.total_steps)
        ends = (step == self.total_steps) & (self.phases[-1].kind == SPARSIFICATION)
        return due | ends | jnp.isin(step, jnp.asarray(entered, jnp.int32))

    def narrows(self, step: Any) -> jax.Array:
        """Whether a choice made at a step continues a sparsification phase: inside one, or at its end."""
        inside = self.kind_in([SPARSIFICATION], step) & ~jnp.isin(jnp.asarray(step), self._starts)
        follows = [b.kind == SPARSIFICATION and p.kind == SPARSE for b, p in itertools.pairwise(self.phases)]
        at_end = self._starts[1:][np.asarray(follows, bool)]
        return inside | jnp.isin(jnp.asarray(step), at_end)

    def __str__(self) -> str:
        lines = [f"{'phase':<15}{'from':>9}{'to':>9}{'share':>8}   sparsity / target"]
        for p in self.phases:
            share = (p.stop - p.start) / self.total_steps
            due = {DENSE: "0", SPARSE: "1", SPARSIFICATION: f"0 → 1 (c = {self.exponent:g})"}[p.kind]
            lines.append(f"{p.kind:<15}{p.start:>9}{p.stop:>9}{share:>8.1%}   {due}")
        return "\n".join(lines)

    def plot(self, sparsity: float = 1.0, ax: Any = None) -> Any:
        """Plot sparsity against step with shaded phases (the paper's Figure 2). Needs matplotlib.

        Args:
          sparsity: the target.
          ax: matplotlib axes to draw on; by default those of a new figure.

        Returns:
          The axes.
        """
        if ax is None:
            from matplotlib import pyplot as plt  # noqa: PLC0415 - optional: the library itself does not need it

            _, ax = plt.subplots(figsize=(8, 3), layout="constrained")
        self.shade(ax)
        steps = np.arange(self.total_steps + 1)
        ax.step(steps, sparsity * np.asarray(self.fraction(steps)), where="post", color="black", lw=1.2)
        ax.set(xlabel="step", ylabel="sparsity", xlim=(0, self.total_steps), ylim=(0, 1))
        ax.legend(loc="lower right", fontsize="small")
        return ax

    def shade(self, ax: Any) -> None:
        """Shade the phases on matplotlib axes, one legend entry per kind."""
        colours = {DENSE: "#dfe7f2", SPARSIFICATION: "#f9e3c4", SPARSE: "#d5ead3"}
        named: set[str] = set()
        for p in self.phases:
            label = p.kind if p.kind not in named else None
            ax.axvspan(p.start, p.stop, color=colours[p.kind], lw=0, zorder=0, label=label)
            named.add(p.kind)


def check_total_steps(total_steps: Any) -> None:
    """Refuse a length that is not an integer number of steps.

    Args:
      total_steps: a Python or NumPy integer, at least 1.
    """
    if isinstance(total_steps, bool) or not isinstance(total_steps, int | np.integer):
        raise ValueError(f"total_steps must be a whole number of steps, an integer, got {total_steps!r}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")


def custom(
    total_steps: int,
    phases: Sequence[Sequence[Any]],
    *,
    steps_per_epoch: int | None = None,
    exponent: float = EXPONENT,
) -> Phases:
    """Any schedule, as a list of `(kind, duration)` or `(kind, start, stop)`.

    Args:
      total_steps: length of the run in steps.
      phases: durations (and starts and stops) are integers for steps, floats for fractions of the run, or text:
        `"10%"`, `"500 steps"`, `"2.5 epochs"`. Boundaries are rounded to the nearest step, not each duration.
      steps_per_epoch: needed if a duration is in epochs.
      exponent: `c` of the sparsification curve.

    Raises:
      ValueError: as `Phases` does, or for a duration that cannot be read.

    >>> print(custom(100, [("dense", "20%"), ("sparsification", 30), ("sparse", 0.5)]).phases[1])
    sparsification [20, 50)
    """
    check_total_steps(total_steps)
    resolve = functools.partial(as_steps, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    resolved, end = [], Fraction(0)
    for phase in phases:
        if len(phase) == 2:
            start, stop = end, end + resolve(phase[1])
        elif len(phase) == 3:
            start, stop = resolve(phase[1]), resolve(phase[2])
        else:
            raise ValueError(f"a phase is (kind, duration) or (kind, start, stop), got {phase!r}")
        resolved.append(Phase(phase[0], round(start), round(stop)))
        end = stop
    return Phases(total_steps, tuple(resolved), exponent)


def as_steps(duration: Any, total_steps: int, steps_per_epoch: int | None = None) -> Fraction:
    """A duration in steps.

    Args:
      duration: as `custom` takes it.
      total_steps: length of the run in steps.
      steps_per_epoch: needed for one in epochs.

    Raises:
      ValueError: if it cannot be read.
    """
    if isinstance(duration, int | np.integer) and not isinstance(duration, bool):
        return Fraction(int(duration))
    if isinstance(duration, Fraction):
        return duration * total_steps
    if isinstance(duration, float | np.floating):
        if not 0 <= duration <= 1:
            raise ValueError(f"a duration given as a float is a fraction of the run, in [0, 1]; got {duration}")
        return Fraction(str(duration)).limit_denominator(10**9) * total_steps
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|steps?|epochs?)\s*", str(duration))
    if match is None:
        raise ValueError(f'cannot read the duration {duration!r}; write 500, 0.1, "10%", "500 steps" or "2.5 epochs"')
    number, unit = Fraction(match[1]), match[2].rstrip("s")
    if unit == "epoch":
        if steps_per_epoch is None:
            raise ValueError(f"duration {duration!r} is in epochs: pass steps_per_epoch")
        return number * steps_per_epoch
    return number * total_steps / 100 if unit == "%" else number


def _recipe(recipe: str) -> str:
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; choose from {', '.join(RECIPES)}")
    return recipe


def _percent(total_steps: int, *phases: tuple[str, Any], exponent: float = EXPONENT) -> Phases:
    return custom(total_steps, [(kind, Fraction(p) / 100) for kind, p in phases], exponent=exponent)


def gradual(total_steps: int, *, dense: float = 0.1, sparse: float = 0.6, exponent: float = EXPONENT) -> Phases:
    """One long sparsification phase between a dense and a sparse one: `recipe="gradual"` of `sequential_attention` and
    `gradual_magnitude`, the two with a single rise; for the others that recipe equals `imagenet`.

    Args:
      total_steps: length of the run in steps.
      dense: share of the run in the dense phase, in [0, 1); 0 for none.
      sparse: share of the run in the sparse phase, in (0, 1). The default did best of 0.15, 0.4 and 0.6 with norms
        and with attention times norms, on held-out training examples of two data sets (`docs/choosing.md`).
      exponent: `c` of the sparsification curve.

    Raises:
      ValueError: if the shares are out of range or leave nothing for sparsification, or as `Phases` does.

    >>> print(*gradual(400).phases)
    dense [0, 40) sparsification [40, 160) sparse [160, 400)
    """
    if not (dense >= 0 and sparse > 0 and dense + sparse < 1):
        raise ValueError(f"dense and sparse must be shares of the run with a sum below 1; got {dense} and {sparse}")
    head, tail = (Fraction(str(share)).limit_denominator(10**9) for share in (dense, sparse))
    middle = [(SPARSIFICATION, 1 - head - tail), (SPARSE, tail)]
    return custom(total_steps, [(DENSE, head), *middle] if dense else middle, exponent=exponent)


def finetune(total_steps: int, *, sparse: float = 0.5, exponent: float = EXPONENT) -> Phases:
    """Pruning of a trained network: one long sparsification phase from the first step, then a sparse phase.

    A trained network needs no dense phase, and loses least when few blocks are dropped at a time. Works with any
    algorithm: `sequential_attention`, whose logits are equal at the first step but rank nothing before blocks are
    dropped, `gradual_magnitude`, `magnitude` and `powerpropagation` (which become gradual), and `acdc` (which then does
    not alternate). `recipe="finetune"` of each algorithm's own schedule preserves the nature of the algorithm, and is
    the same as this for the first two.

    Args:
      total_steps: length of the run in steps.
      sparse: share of the run in the sparse phase, in (0, 1). The default did best of 0.1, 0.2, 0.35 and 0.5, with
        attention and with norms, on held-out training images of Fashion-MNIST (LeNet-300-100, 97% of the 8 x 8 blocks,
        400 steps).
      exponent: `c` of the sparsification curve.

    Raises:
      ValueError: if `sparse` is out of range, or as `Phases` does.

    >>> print(*finetune(400).phases)
    sparsification [0, 200) sparse [200, 400)
    """
    if not 0 < sparse < 1:
        raise ValueError(f"sparse must be a share of the run between 0 and 1, such as 0.5; got {sparse}")
    return gradual(total_steps, dense=0, sparse=sparse, exponent=exponent)


_RISING_ONCE: Mapping[str, Callable[..., Phases]] = {"gradual": gradual, "finetune": finetune}


def dense(total_steps: int, *, recipe: str = "imagenet") -> Phases:
    """The dense baseline: one dense phase.

    Args:
      total_steps: length of the run in steps.
      recipe: any of the recipes; all give the same.
    """
    _recipe(recipe)
    return _percent(total_steps, (DENSE, 100))


def magnitude(total_steps: int, *, recipe: str = "imagenet") -> Phases:
    """Dense, then sparse for fine-tuning: the last 15% (`imagenet`) or 20% (`criteo`) of the run.

    `finetune`: sparse from the first step, that is, one-shot pruning of the trained weights.

    Args:
      total_steps: length of the run in steps.
      recipe: `imagenet` (also for `gradual`), `criteo` or `finetune`.
    """
    if _recipe(recipe) == "finetune":
        return _percent(total_steps, (SPARSE, 100))
    tail = 20 if recipe == "criteo" else 15
    return _percent(total_steps, (DENSE, 100 - tail), (SPARSE, tail))


powerpropagation = group_lasso = d_gating = magnitude


def random(total_steps: int, *, recipe: str = "imagenet") -> Phases:
    """A control: sparse from the first step to the last.

    Args:
      total_steps: length of the run in steps.
      recipe: any of the recipes; all give the same.
    """
    _recipe(recipe)
    return _percent(total_steps, (SPARSE, 100))


rigl = sparse_evolutionary = random


def gradual_magnitude(total_steps: int, *, recipe: str = "imagenet", exponent: float = EXPONENT) -> Phases:
    """A control: dense, one long sparsification phase, sparse; outer phases as long as in the other algorithms.

    `finetune`: without the dense phase, see `finetune`. `gradual`: with a longer sparse phase, see `gradual`.

    Args:
      total_steps: length of the run in steps.
      recipe: `imagenet`, `criteo`, `gradual` or `finetune`.
      exponent: `c` of the sparsification curve.
    """
    if _recipe(recipe) in _RISING_ONCE:
        return _RISING_ONCE[recipe](total_steps, exponent=exponent)
    head, tail = {"imagenet": (10, 15), "criteo": (20, 20)}[recipe]
    middle = (SPARSIFICATION, 100 - head - tail)
    return _percent(total_steps, (DENSE, head), middle, (SPARSE, tail), exponent=exponent)


movement = gradual_magnitude


def acdc(total_steps: int, *, recipe: str = "imagenet") -> Phases:
    """Alternating compressed/decompressed training (section 4.2).

    `imagenet`: 10% dense; 7 x (5% sparse, 5% dense), the last dense phase 5% longer; 15% sparse.
    `criteo`: 20% dense; 10 x (3% sparse, 3% dense); 20% sparse.
    `finetune`: 5 x (5% sparse, 5% dense); 50% sparse. Only `form="masking"` of the algorithm keeps the trained weights
    of masked blocks: `pruning` sets them to zero in the first step.

    Args:
      total_steps: length of the run in steps.
      recipe: `imagenet` (also for `gradual`), `criteo` or `finetune`.
    """
    if _recipe(recipe) in ("imagenet", "gradual"):
        cycles = [(SPARSE, 5), (DENSE, 5)] * 6 + [(SPARSE, 5), (DENSE, 10)]
        return _percent(total_steps, (DENSE, 10), *cycles, (SPARSE, 15))
    if recipe == "finetune":
        return _percent(total_steps, *[(SPARSE, 5), (DENSE, 5)] * 5, (SPARSE, 50))
    return _percent(total_steps, (DENSE, 20), *[(SPARSE, 3), (DENSE, 3)] * 10, (SPARSE, 20))


def sequential_attention(
    total_steps: int, *, recipe: str = "imagenet", sparsification: bool = True, exponent: float = EXPONENT
) -> Phases:
    """SequentialAttention++ (section 4.2).

    `imagenet`: 10% dense; 6 cycles of 10% in equal thirds (sparsification, sparse, dense); 15% sparsification;
    15% sparse. `criteo`: 20% dense; 9 cycles of 6% in equal thirds; 6% sparsification; 20% sparse. `gradual` and
    `finetune`: not the paper's, see the functions of these names.

    Args:
      total_steps: length of the run in steps.
      recipe: `imagenet`, `criteo`, `gradual` or `finetune`.
      sparsification: False for the ablation without sparsification phases (D.1): ACDC's schedule. For `finetune` that
        schedule begins sparse and is refused by `sapp.sequential_attention`.
      exponent: `c` of the sparsification curve (D.2).
    """
    if not sparsification:
        return acdc(total_steps, recipe=recipe)
    if _recipe(recipe) in _RISING_ONCE:
        return _RISING_ONCE[recipe](total_steps, exponent=exponent)
    head, cycles, cycle, last, tail = {"imagenet": (10, 6, 10, 15, 15), "criteo": (20, 9, 6, 6, 20)}[recipe]
    thirds = [(kind, Fraction(cycle, 3)) for kind in (SPARSIFICATION, SPARSE, DENSE)]
    phases = [(DENSE, head), *thirds * cycles, (SPARSIFICATION, last), (SPARSE, tail)]
    return _percent(total_steps, *phases, exponent=exponent)
