"""What is compared: ways to make all-MiniLM-L6-v2 cheaper, each as changes to `configs/minilm.py`."""

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from configs import minilm
from experiments.outputs import workdir

Block = tuple[int, int]
ALGORITHMS: dict[str, Mapping[str, Any]] = {
    "SA++": {"name": "sequential_attention"},
    "SA++, paper": {
        "name": "sequential_attention",
        "recipe": "imagenet",
        "sequential_attention.score": "attention",
    },
    "gradual magnitude": {"name": "gradual_magnitude"},
    "movement": {"name": "movement"},
    "RigL": {"name": "rigl"},
    "one-shot": {"name": "magnitude", "schedule": (("sparse", 1.0),)},  # of the networks that `one_shot` leaves
    "SA++ with exchanges": {
        "name": "sequential_attention",
        "schedule": (("sparsification", "10%"), ("sparse", "90%")),
        "sequential_attention.regrow": 0.3,
        "sequential_attention.regrow_every": 10,
    },
    "one-shot with exchanges": {  # a rise so short that the blocks of `one_shot` stay
        "name": "sequential_attention",
        "schedule": (("sparsification", "3%"), ("sparse", "97%")),
        "sequential_attention.regrow": 0.1,
        "sequential_attention.regrow_every": 10,
    },
}
ONE_SHOT = "one-shot"  # prefix of the algorithms that start from a network pruned by `one_shot`
LAYERS, LONGER = "fewer layers", "fewer layers, trained twice as long"
ALL = 6  # layers of the published network
# Hidden units of the feed-forward layers: columns of the first kernel, or rows of the second, whose inputs are the
# units' values, so that Optimal Brain Surgeon can let the remaining units replace the others.
_COLUMNS: Mapping[str, Any] = {"sparsifier.include": "*/up/kernel", "sparsifier.block": (None, 1)}
_ROWS: Mapping[str, Any] = {"sparsifier.include": "*/down/kernel", "sparsifier.block": (1, None)}


class Setting(NamedTuple):
    """A number of sentences, and of the tokens of each; shorter ones are padded."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} × {self.length} tokens"


SETTINGS = (Setting(1, 32), Setting(1, 128), Setting(32, 32))


class Scale(NamedTuple):
    """How long a campaign is.

    Attributes:
      compared: steps of each algorithm's run at one sparsity.
      steps: of each run of the picture.
      sparsities: of the picture.
      blocks: of the picture, the first also of the comparison.
      layers: of the smaller dense networks.
      hidden: shares of the feed-forward layers' hidden units that are pruned.
      changes: to the config.
      pruned_layers: layers of the pruned networks of the picture, of the first shape of block.
      pairs: how many are measured, 0 for all.
      settings: what is timed.
      rounds: of timing.
      seeds: of the best dense network and of the best pruned one; the others have one.
      longer: steps of the longest runs, of the best networks only; none if the picture's are as long.
    """

    compared: int
    steps: int
    sparsities: tuple[float, ...]
    blocks: tuple[Block, ...]
    layers: tuple[int, ...] = (3, 2)
    hidden: tuple[float, ...] = (0.75,)
    changes: Mapping[str, Any] = {}
    pruned_layers: tuple[int, ...] = (ALL, 3)
    pairs: int = 0
    settings: tuple[Setting, ...] = SETTINGS
    rounds: int = 9
    seeds: int = 3
    longer: int = 4000


_SMOKE = {"batch_size": 8, "eval_batch_size": 8, "log_every": 2, "eval_every": 4, "checkpoint_every": 4}
_SMOKE |= {"data.options.length": 8, "sparsifier.min_blocks": 1}
SCALES = {
    "smoke": Scale(30, 4, (0.5,), ((4, 4),), (2,), (0.5,), _SMOKE, (ALL, 2), 40, (Setting(1, 16),), 1, 2, 8),
    "small": Scale(250, 1000, (0.5, 0.7, 0.8), ((4, 16), (16, 16)), pairs=2000, rounds=5),
    "full": Scale(500, 4000, (0.5, 0.6, 0.7, 0.8, 0.9), ((4, 16), (16, 16))),
}
COMPARED = 0.7  # the sparsity at which algorithms are compared
RATE = 1e-3  # of pruned networks, after a warm-up; 5e-4 learns less, and 2e-3 diverged
DENSE_RATE = 5e-4  # of smaller dense ones, which lose by 1e-3; a warm-up was not tried


class Contender(NamedTuple):
    """A network that is trained.

    Attributes:
      group: `compared`, `picture`, `repeated` by other seeds, or `longer`; all of a group have equally many steps.
      family: what has one line in the picture.
      label: what distinguishes it in its family.
      changes: to `configs/minilm.py`, flat.
      one_shot: whether it begins with a network that `one_shot` pruned.
      budget: whether that has a sparsity for each layer.
      reorder: whether that reorders the network first.
      after: the family of the trained dense network, of as many layers, that it begins with; by default it begins with
        the published network.
      model: options of the model that differ from the published ones.
      units: whether whole hidden units are pruned; they are removed then.
      seed: of the order of the text.
    """

    group: str
    family: str
    label: str
    changes: Mapping[str, Any]
    one_shot: bool = False
    budget: bool = False
    reorder: bool = False
    after: str = ""
    model: Mapping[str, Any] = {}
    units: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.family}, {self.label}{f', seed {self.seed}' * bool(self.seed)}"

    @property
    def folder(self) -> pathlib.Path:
        """Below the campaign's directory."""
        return _folder(self.group, self.name)

    @property
    def origin(self) -> pathlib.Path | None:
        """Where the trained network that it begins with is; None for the published one."""
        return _folder(self.group, f"{self.after}, {self.model['layers']}") if self.after else None

    @property
    def start(self) -> pathlib.Path:
        """Where the network that it begins with is, if that was pruned in one shot."""
        return self.folder.with_name(self.folder.name + "-start")

    @property
    def dense(self) -> bool:
        """Whether what comes of it is a smaller dense network."""
        return self.units or self.family in (LAYERS, LONGER)


def _folder(group: str, name: str) -> pathlib.Path:
    return pathlib.Path(group, re.sub(r"[^A-Za-z0-9+.]+", "_", name).strip("_"))


def contenders(scale: Scale) -> list[Contender]:
    """All of a campaign."""
    compare, (first, *others) = functools.partial(_pruned, "compared", COMPARED, scale.compared), scale.blocks
    of_picture = functools.partial(_pruned, "picture", steps=scale.steps, name="SA++")
    found = [_dense("picture", n, scale.steps) for n in scale.layers]
    found += [_dense("picture", n, 2 * scale.steps, LONGER) for n in scale.layers]
    for sparsity in scale.sparsities:
        found += [of_picture(sparsity, block=first, layers=n) for n in scale.pruned_layers]
        one_shot = functools.partial(_pruned, "picture", sparsity, scale.steps, ONE_SHOT, one_shot=True)
        found += [one_shot(block, reorder=block != first) for block in scale.blocks]
        found += [one_shot(first, budget=True)]
        smaller = [n for n in scale.pruned_layers if n in scale.layers]
        found += [
            one_shot(block, layers=n, reorder=block != first, after=LAYERS) for n in smaller for block in scale.blocks
        ]
    found += [compare(name, first) for name in ALGORITHMS if not name.startswith(ONE_SHOT)]
    found += [compare(ONE_SHOT, first, one_shot=True, budget=budget) for budget in (False, True)]
    found += [compare("one-shot with exchanges", first, one_shot=True)]
    found += [compare("SA++", block) for block in others]
    found += [_dense("compared", n, scale.compared) for n in scale.layers]
    found += [
        _units(group, share, steps, name)
        for group, steps in (("compared", scale.compared), ("picture", scale.steps))
        for share in scale.hidden
        for name in ("SA++", "gradual magnitude", ONE_SHOT)
    ]
    found += [of_picture(sparsity, block=block) for block in others for sparsity in scale.sparsities]
    repeated = [_dense("repeated", scale.layers[0], scale.steps)]
    repeated += [_units("repeated", share, scale.steps, "SA++") for share in scale.hidden]
    longer = [_dense("longer", scale.layers[0], scale.longer)]
    longer += [_units("longer", share, scale.longer, name) for share in scale.hidden for name in ("SA++", ONE_SHOT)]
    found += longer if scale.longer > scale.steps else []
    return found + [each._replace(seed=seed) for seed in range(1, scale.seeds) for each in repeated]


def _pruned(
    group: str,
    sparsity: float,
    steps: int,
    name: str,
    block: Block,
    layers: int = ALL,
    one_shot: bool = False,
    budget: bool = False,
    reorder: bool = False,
    after: str = "",
) -> Contender:
    changes = {f"sparsifier.{key}": value for key, value in ALGORITHMS[name].items()}
    changes |= {"sparsifier.block": block, "sparsifier.sparsity": sparsity, "steps": steps}
    changes |= _rate(steps)
    family = f"{name}{' with a budget' if budget else ''}, {'reordered ' * reorder}blocks {block[0]} × {block[1]}"
    model = {} if layers == ALL else {"layers": layers}
    family += f", {layers}{' trained' * bool(after)} layers" if model else ""
    family += ", then trained" if one_shot else ""
    return Contender(group, family, f"{sparsity:.0%}", changes, one_shot, budget, reorder, after, model)


def _dense(group: str, layers: int, steps: int, family: str = LAYERS) -> Contender:
    changes = {"sparsifier.name": "dense", "steps": steps, "optimizer.learning_rate": DENSE_RATE}
    changes["optimizer.warmup_steps"] = 0
    return Contender(group, family, str(layers), changes, model={"layers": layers})


def _units(group: str, share: float, steps: int, name: str) -> Contender:
    """The same number of hidden units are pruned in every layer."""
    one_shot = name == ONE_SHOT
    changes = {f"sparsifier.{key}": value for key, value in ALGORITHMS[name].items()}
    changes |= {**(_ROWS if one_shot else _COLUMNS), "sparsifier.min_blocks": 1, "sparsifier.sparsity": share}
    changes |= {"steps": steps, **_rate(steps)}
    family = f"{name}, hidden units{', then trained' * one_shot}"
    return Contender(group, family, f"{share:.0%}", changes, one_shot=one_shot, units=True)


def _rate(steps: int) -> dict[str, Any]:
    """Learning rate and warm-up of a pruned network: without the latter Adam's first steps undo what was published."""
    return {"optimizer.learning_rate": RATE, "optimizer.warmup_steps": steps // 10}


def config_of(contender: Contender, scale: Scale, given: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config of its run.

    Args:
      contender: which.
      scale: of the campaign.
      given: further changes, such as where the text is.
    """
    config = minilm.get_config()
    with config.model_options.unlocked():
        config.model_options.update(contender.model)
    config.update_from_flattened_dict({**scale.changes, **given, **contender.changes, "seed": contender.seed})
    for key in ("eval_every", "log_every"):
        config[key] = min(config[key], config.steps)
    return config


def started_from(config: ml_collections.ConfigDict, start: pathlib.Path, overrides: Mapping[str, Any]) -> None:
    """Let a run begin with a network that was pruned in one shot, and keep its blocks."""
    config.init_from = str(start / workdir.WEIGHTS)
    with config.sparsifier.overrides.unlocked():
        config.sparsifier.overrides.update(overrides)
