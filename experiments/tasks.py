"""Training tasks: a model on a data set, with its loss and metric. This is all that the training loop sees."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments import data, models
from experiments.data import catalog
from experiments.models import costs, published_embeddings, sentences, tables
from experiments.utils import registry


class Task(NamedTuple):
    """A problem for the training loop.

    Attributes:
      metric: name of the headline metric among the outputs.
      model: the flax linen module that is trained.
      dataset: training and test examples.
      init: `init(key) -> (params, model_state)`.
      outputs: `outputs(params, model_state, batch, training) -> ({name: (batch,)}, model_state)`: values per example,
        including `loss`. The loop minimises the mean of `loss`, and reports the mean of each.
      input: name of the model's input in a batch.
      ranked: names of two outputs, scores and labels, whose area under the ROC curve is reported as `auc`.
      finish: `finish(means) -> means`: adds derived values to the means over the test set.
      table: the embedding table, for an optimizer that touches only the rows of the batch.
      takes_teacher: whether `outputs` also takes `teacher=(params, model_state)`, a network to learn from.
      lower_is_better: whether a lower metric is better.
      start: the `(params, model_state)` that training begins with unless the config says otherwise; None for those of
        `init`.
      teacher: `(params, model_state)` of a network of the task's own to learn from; None without one.
    """

    metric: str
    model: nn.Module
    dataset: data.Dataset
    init: Callable[[jax.Array], tuple[Any, Any]]
    outputs: Callable[..., tuple[dict[str, jax.Array], Any]]
    input: str = "image"
    ranked: tuple[str, str] | None = None
    finish: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = lambda means: means
    table: tables.Table | None = None
    takes_teacher: bool = False
    lower_is_better: bool = False
    start: Callable[[], tuple[Any, Any]] | None = None
    teacher: Callable[[], tuple[Any, Any]] | None = None


def classification(config: ml_collections.ConfigDict, dataset: data.Dataset) -> Task:
    """Classification of images or table rows by cross-entropy, with a teacher by `distilled`; measured by accuracy."""
    options = {"classes": dataset.classes, **config.model_options}
    model = registry.lookup(models, config.model, "config.model", options)
    name = "row" if dataset.columns else "image"
    mean, std = np.float32(config.data.mean or 0), np.float32(config.data.std or 1)

    def outputs(
        params: Any, model_state: Any, batch: Any, training: bool, teacher: tuple[Any, Any] | None = None
    ) -> tuple[dict[str, jax.Array], Any]:
        x = (_unit(batch[name]) - mean) / std
        logits, model_state = _apply(model, params, model_state, x, training)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        if teacher is not None:
            taught, _ = _apply(model, *teacher, x, training=False)
            loss = distilled(loss, logits, taught, config.distil.temperature, config.distil.weight)
        accuracy = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
        return {"loss": loss, "accuracy": accuracy}, model_state

    init = functools.partial(_init, model, _unit(dataset.example[name]))
    return Task("accuracy", model, dataset, init, outputs, name, takes_teacher=True)


def distilled(
    cross_entropy: jax.Array, logits: jax.Array, teacher: jax.Array, temperature: float, weight: float
) -> jax.Array:
    """Loss of training on labels and a teacher: `(1 - w) CE + w T² KL(softmax(teacher / T) ‖ softmax(logits / T))`.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015). `T²` keeps the gradients of the second
    term as large as those of the first, whatever the temperature.

    Args:
      cross_entropy: `(...,)`, with the labels, in nats.
      logits: `(..., classes)`.
      teacher: likewise; gets no gradient.
      temperature: `T`, above 0.
      weight: `w`, in [0, 1].
    """
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits, teacher))
    theirs = jax.lax.stop_gradient(theirs)
    divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), -1)
    return (1 - weight) * cross_entropy + weight * temperature**2 * divergence


def reconstruction(config: ml_collections.ConfigDict, dataset: data.Dataset) -> Task:
    """Images through a bottleneck and back, by squared error, measured by the peak signal-to-noise ratio in dB."""
    model = registry.lookup(models, config.model, "config.model", config.model_options)

    def outputs(params: Any, model_state: Any, batch: Any, training: bool) -> tuple[dict[str, jax.Array], Any]:
        image = _unit(batch["image"])
        output, model_state = _apply(model, params, model_state, image, training)
        loss = jnp.mean(jnp.square(output - image), axis=(1, 2, 3))
        return {"loss": loss, "psnr": -10 * jnp.log10(jnp.maximum(loss, 1e-10))}, model_state

    return Task("psnr", model, dataset, functools.partial(_init, model, _unit(dataset.example["image"])), outputs)


def language_modelling(config: ml_collections.ConfigDict, dataset: data.Dataset) -> Task:
    """Next-byte prediction by cross-entropy, measured in bits per byte, and the accuracy of the most likely byte.

    Each window of the text is predicted from its own bytes and the one before it.
    """
    context = dataset.example["tokens"].shape[1]
    options = {"vocabulary": dataset.classes, "context": context, **config.model_options}
    model = registry.lookup(models, config.model, "config.model", options)

    def outputs(params: Any, model_state: Any, batch: Any, training: bool) -> tuple[dict[str, jax.Array], Any]:
        logits, model_state = _apply(model, params, model_state, batch["tokens"], training)
        targets = batch["targets"].astype(jnp.int32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        accuracy = (jnp.argmax(logits, -1) == targets).astype(jnp.float32)
        values = {"loss": loss, "bits_per_byte": loss / math.log(2), "accuracy": accuracy}
        if not training:  # in training every window is full
            values["counted"] = jnp.ones_like(loss)
        real = jnp.arange(context)[None] < batch["length"][:, None]
        return {name: jnp.mean(jnp.where(real, x, 0), axis=1) for name, x in values.items()}, model_state

    def finish(means: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Means over bytes, from those over windows, the last of which may be short."""
        return {name: x / means["counted"] for name, x in means.items() if name != "counted"}

    init = functools.partial(_init, model, dataset.example["tokens"])
    return Task("bits_per_byte", model, dataset, init, outputs, "tokens", finish=finish, lower_is_better=True)


def click_prediction(config: ml_collections.ConfigDict, dataset: data.Dataset) -> Task:
    """Click prediction by cross-entropy, measured by AUC and calibration: mean prediction over mean label."""
    options = {"vocabulary": dataset.vocabulary, **config.model_options}
    model = registry.lookup(models, config.model, "config.model", options)

    def outputs(
        params: Any, model_state: Any, batch: Any, training: bool, model: nn.Module = model, ids: str = "ids"
    ) -> tuple[dict[str, jax.Array], Any]:
        logits, model_state = _apply(model, params, model_state, batch[ids], training)
        label = batch["label"].astype(jnp.float32)
        loss = optax.sigmoid_binary_cross_entropy(logits, label)
        return {"loss": loss, "prediction": jax.nn.sigmoid(logits), "label": label}, model_state

    def finish(means: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return means | {"calibration": means["prediction"] / means["label"]}

    def outputs_of_rows(capacity: int) -> Callable[..., Any]:
        return functools.partial(outputs, model=model.clone(vocabulary=(capacity,)), ids="positions")

    length = sum(dataset.vocabulary)
    table = tables.Table("table/embedding", length, lambda batch: model.rows(batch["ids"]), outputs_of_rows)
    init = functools.partial(_init, model, dataset.example["ids"])
    return Task("auc", model, dataset, init, outputs, "ids", ("prediction", "label"), finish, table)


def sentence_embedding(config: ml_collections.ConfigDict, dataset: data.Dataset) -> Task:
    """Embeddings of sentences, learned from those of the published encoder; measured by the cosine to these.

    The loss is `1 - cos(y, t) + a mean_j (cos(y, y_j) - cos(t, t_j))² + b states_error`, with `t` the published
    encoder's embedding, `j` the sentences of the batch, `a` `config.similarity` and `b` `config.states`: see
    `sentences.states_error`. The published embeddings are computed once, and kept in the directory `config.targets`;
    the states are computed in each step. Training begins with the published weights, that of a model of fewer layers
    with those of every second or third layer.
    """
    folder = config.data.options.get("model", "")
    model, whole = sentences.bert_of(folder, **config.model_options), sentences.bert_of(folder)
    dataset = published_embeddings.with_targets(dataset, folder, config.targets)

    def outputs(
        params: Any, model_state: Any, batch: Any, training: bool, teacher: tuple[Any, Any] | None = None
    ) -> tuple[dict[str, jax.Array], Any]:
        tokens, real, theirs = batch["tokens"], batch["real"], batch["target"]
        states: Any = None
        if training and teacher is not None:
            ours, states = sentences.embed_with_states(model, params, tokens, real)
        else:
            ours = sentences.embed(model, params, tokens, real)
        cosine = jnp.sum(ours * theirs, -1)
        loss = 1 - cosine
        if config.similarity and training:  # the last batch of an evaluation is padded
            loss += config.similarity * jnp.mean((ours @ ours.T - theirs @ theirs.T) ** 2, -1)
        if states is not None and teacher is not None:
            _, wanted = sentences.embed_with_states(whole, teacher[0], tokens, real)
            loss += config.states * sentences.states_error(states, jax.lax.stop_gradient(wanted), tokens, real)
        return {"loss": loss, "cosine": cosine}, model_state

    init = functools.partial(_init, model, dataset.example["tokens"])

    def start() -> tuple[Any, Any]:
        return sentences.params_of(folder, model), {}

    def teacher() -> tuple[Any, Any]:
        return sentences.params_of(folder, whole), {}

    return Task(
        "cosine",
        model,
        dataset,
        init,
        outputs,
        "tokens",
        start=start,
        teacher=teacher if config.states else None,
    )


def dataset_of(config: ml_collections.ConfigDict) -> data.Dataset:
    """The data set of `config`: `name`, `options`, and `local` if it can be read from local files."""
    options = {**config.options, **({"local": config.local} if config.local else {})}
    return registry.lookup(catalog, config.name, "config.data.name", options)


def multiply_adds(task: Task) -> dict[str, int]:
    """Multiply-adds of each kernel for one example."""
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    example = task.dataset.example[task.input]
    x = jax.ShapeDtypeStruct(example.shape, "float32" if task.input == "image" else example.dtype)
    return costs.multiply_adds(task.model, {"params": params, **model_state}, x)


def random_inputs(task: Task, batch: int) -> np.ndarray:
    """A batch of random inputs of the task's model: noise as images, ids from the whole vocabulary."""
    rng = np.random.default_rng(0)
    example = task.dataset.example[task.input]
    shape = (batch, *example.shape[1:])
    if task.input == "ids":  # the whole table: a few of its rows would stay in the caches
        return rng.integers(0, np.asarray(task.dataset.vocabulary), shape).astype(example.dtype)
    if task.input == "tokens":
        return rng.integers(0, task.dataset.classes, shape).astype(example.dtype)
    return (rng.random(shape) * 3).astype(np.float32)


def _unit(image: Any) -> Any:
    """Images as float32 in [0, 1]; they are transferred to the device as bytes."""
    return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image


def _init(model: Any, example: np.ndarray, key: jax.Array) -> tuple[Any, Any]:
    """`(params, model_state)` of a flax linen model; the latter is its other state, such as batch statistics.

    With dropout that includes a key, so that a resumed run drops the same units.
    """
    state = dict(model.init(key, jnp.asarray(example)))
    params = state.pop("params")
    if getattr(model, "dropout", 0):
        state["dropout"] = {"key": jax.random.key_data(jax.random.fold_in(key, 1))}
    return params, state


def _apply(model: Any, params: Any, model_state: Any, x: jax.Array, training: bool) -> tuple[jax.Array, Any]:
    variables = {"params": params, **model_state}
    if not (training and model_state):
        return model.apply(variables, x), model_state
    if "dropout" not in model_state:
        return model.apply(variables, x, training=True, mutable=list(model_state))
    now, later = jax.random.split(jax.random.wrap_key_data(model_state["dropout"]["key"]))
    rngs = {"dropout": now}
    y, model_state = model.apply(variables, x, training=True, mutable=list(model_state), rngs=rngs)
    return y, {**model_state, "dropout": {"key": jax.random.key_data(later)}}
