"""Training a campaign's networks: resumable, by any number of processes."""

import functools
import itertools
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from rich.console import Console

import sa_plus_plus as sapp
from benchmarks.minilm.contenders import Contender, Scale, config_of, started_from
from experiments import tasks
from experiments.data.sources import Dataset
from experiments.outputs import workdir
from experiments.sweeps import work
from experiments.training import factories, sharding
from experiments.training.setup import prepare
from experiments.training.trained import Trained

_CALIBRATION = 500  # sentences
_SENSITIVITY = 128  # sentences that the loss is measured on, at each sparsity of each layer


class Cell(NamedTuple):
    """A contender's run, as `sweeps.work` takes them."""

    contender: Contender
    scale: Scale
    given: Mapping[str, Any]
    directory: pathlib.Path

    @property
    def folder(self) -> pathlib.Path:
        return self.contender.folder

    def config(self) -> ml_collections.ConfigDict:
        config = config_of(self.contender, self.scale, self.given)
        if self.contender.one_shot:
            start = self.directory / self.contender.start
            started_from(config, start, json.loads((start / workdir.RESULT).read_text())["overrides"])
        return config


def train(
    contenders: Sequence[Contender], scale: Scale, given: Mapping[str, Any], directory: pathlib.Path, console: Console
) -> Iterator[tuple[Contender, dict[str, Any]]]:
    """Train what is not yet trained, and is not being trained by another process; each with its `result.json`.

    Args:
      contenders: of the campaign.
      scale: its scale.
      given: changes to all configs.
      directory: of the campaign.
      console: where the runs show their progress.
    """
    for (one_shot, origin), group in itertools.groupby(contenders, lambda each: (each.one_shot, each.origin)):
        some = list(group)
        if origin and workdir.result_of(directory / origin) is None:
            waiting = ", ".join(str(each.folder) for each in some)
            console.print(f"left out until {origin} is trained: {waiting}", highlight=False)
            continue
        cells = [Cell(contender, scale, given, directory) for contender in some]
        for contender in some if one_shot else ():
            config = config_of(contender, scale, given)
            if origin:
                config.init_from = str(directory / origin / workdir.WEIGHTS)
            start = directory / contender.start
            if (done := workdir.once(start, functools.partial(_one_shot, contender, config, start))) is not None:
                console.print(f"{contender.start}: {done['seconds']:.0f} s", highlight=False)
        for cell, result in work.work(cells, directory, console):
            yield cell.contender, result


def _one_shot(contender: Contender, config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    """Prune without training, by optimal brain surgery, and keep the network; the overrides of the plan."""
    started = time.perf_counter()
    setup = prepare(config, sharding.make_mesh(devices=jax.devices()[:1]), dataset(json.dumps(config.data.to_dict())))
    assert setup.start is not None
    network = Trained(setup, jax.tree.map(jnp.asarray, setup.start.params), {})
    plan = factories.plan_options(setup.config.sparsifier)
    sparsity, overrides = config.sparsifier.sparsity, {}
    if contender.budget:
        data = [((batch,), ()) for batch in network.calibration(_SENSITIVITY)]
        steps = sorted({sparsity, *sapp.SPARSITIES})
        found = sapp.sensitivity(
            network.outputs, network.params, data, _mean_loss, method="obs", sparsities=steps, **plan
        )
        costs = found.weights()
        limit = float(sum(row[found.sparsities.index(sparsity)] for row in costs.values()))
        overrides = sapp.budget(found, costs, limit=limit).overrides
    batches = [(batch,) for batch in network.calibration(_CALIBRATION)]
    plan["overrides"] = overrides
    pruned = sapp.one_shot(
        network.outputs,
        network.params,
        batches,
        method="obs",
        sparsity=sparsity,
        reorder=contender.reorder,
        **plan,
    )
    network.save(folder / workdir.WEIGHTS, pruned.params, pruned.plan)
    errors = {layer.plan.path: layer.error for layer in pruned.layers}
    return {"overrides": overrides, "errors": errors, "seconds": time.perf_counter() - started}


def _mean_loss(outputs: Any, _: Any) -> jax.Array:
    return jnp.mean(outputs["loss"])


@functools.lru_cache(maxsize=1)
def dataset(data: str) -> Dataset:
    """Read once; `data` is the config's, as JSON."""
    return tasks.dataset_of(ml_collections.ConfigDict(json.loads(data)))
