"""A trained network: as a function of its parameters, on the test set, stored, served, and fine-tuned."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import sa_plus_plus as sapp
from experiments import data
from experiments.training import evaluation, loop, program, sharding, weights
from experiments.training.setup import Setup, prepare
from experiments.training.step import evaluate


class Trained(NamedTuple):
    """A network with its weights, and the task that it was trained for.

    Attributes:
      setup: the parts of a run of its config.
      params: its parameters.
      model_state: what its model carries besides.
    """

    setup: Setup
    params: Any
    model_state: Any

    def outputs(self, params: Any, batch: Any) -> dict[str, jax.Array]:
        """The task's outputs for each example of a batch, `loss` among them."""
        return self.setup.task.outputs(params, self.model_state, batch, training=False)[0]

    def calibration(self, examples: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
        """Training batches that hold about `examples` different examples together."""
        train = self.setup.task.dataset.train
        size = min(examples, self.setup.config.batch_size, len(train))
        batches = data.train_iterator(train, size, seed)
        return [next(batches) for _ in range(max(1, min(examples, len(train)) // size))]

    def recalibrated(self, params: Any, calibration: Sequence[Any]) -> "Trained":
        """The network with re-estimated batch-norm averages, for pruned parameters.

        The averages are exponential, `s = m s + (1 - m) b` for each batch. From 0 and from 1 they end `m^k` apart,
        which gives the bias of the former to correct.

        Args:
          params: the pruned parameters.
          calibration: batches as `calibration` gives them.
        """
        if "batch_stats" not in self.model_state:
            return self
        outputs = self.setup.task.outputs

        @jax.jit
        def updated(stats: Any, batch: Any) -> Any:
            return outputs(params, {**self.model_state, "batch_stats": stats}, batch, training=True)[1]["batch_stats"]

        def from_constant(value: float) -> Any:
            start = jax.tree.map(lambda a: jnp.full_like(a, value), self.model_state["batch_stats"])
            return functools.reduce(updated, calibration, start)

        stats = jax.tree.map(lambda zero, one: zero / (1 - (one - zero)), from_constant(0), from_constant(1))
        return self._replace(model_state={**self.model_state, "batch_stats": stats})

    def tester(self) -> Any:
        """`test(params, model_state=None) -> {name: mean over the test set}`, compiled once."""
        task, size = self.setup.task, self.setup.config.eval_batch_size

        @jax.jit
        def of_batch(params: Any, model_state: Any, batch: Any) -> Any:
            return evaluate(task, params, model_state, batch)

        def test(params: Any, model_state: Any = None) -> dict[str, float]:
            batches, own = data.eval_batches(task.dataset.test, size), model_state or self.model_state
            means = evaluation.means(lambda batch: of_batch(params, own, batch), batches)
            return {name: float(np.squeeze(x)) for name, x in task.finish(means).items()}

        return test

    def served(self, params: Any, x: Any, **options: Any) -> sapp.sparse.Network:
        """The network specialised to some parameters and inputs."""
        model, variables = self.setup.task.model, {"params": params, **self.model_state}
        return sapp.specialize(lambda x: model.apply(variables, x), x, **options)

    def save(self, path: pathlib.Path, params: Any, plan: sapp.Plan) -> int:
        """Write some parameters to a file by their blocks, as a run leaves its network; the file's bytes."""
        sapp.save(path, {"params": sapp.export(params, plan), **self.model_state})
        return path.stat().st_size


def read(config: ml_collections.ConfigDict, source: str, where: str, dataset: data.Dataset | None = None) -> Trained:
    """The network of a config with weights as `weights.read` finds them, on one device.

    Raises:
      ValueError: as `prepare` and `weights.read` do; or if the source lacks the model's state.
      FileNotFoundError: if there are no such weights.
    """
    setup = prepare(config, sharding.make_mesh(devices=jax.devices()[:1]), dataset)
    params, model_state = jax.eval_shape(setup.task.init, jax.random.key(0))
    found = weights.read(source, params, model_state, where)
    if model_state and found.model_state is None:
        raise ValueError(f"{where}={source} has no {', '.join(model_state)}, which the model needs")
    return Trained(setup, jax.tree.map(jnp.asarray, found.params), found.model_state or {})


def finetuned(
    config: ml_collections.ConfigDict, start: pathlib.Path, steps: int, dataset: data.Dataset | None = None
) -> loop.Outcome:
    """Fine-tune a pruned network with fixed blocks.

    The blocks kept are those of the largest norm: all that are not zero. The learning-rate schedule runs over these
    steps, without warm-up.

    Args:
      config: of the network, with the sparsity and the overrides that it was pruned with.
      start: file of the pruned network.
      steps: how many.
      dataset: of the config, where it is at hand.
    """
    config = config.copy_and_resolve_references()
    config.update({"init_from": str(start), "steps": steps, "eval_every": steps, "log_every": steps})
    config.optimizer.update({"warmup_steps": 0, "warmup_epochs": 0.0})
    config.sparsifier.update({"name": "magnitude", "schedule": (("sparse", 1.0),)})
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    (outcome,) = loop.train(program.compiled(prepare(config, mesh, dataset)), [config.seed])
    return outcome
