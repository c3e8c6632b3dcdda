"""A campaign's networks, as they are served."""

import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sa_plus_plus as sapp
from benchmarks.minilm.contenders import Contender, Scale, config_of
from experiments import retrieval
from experiments.data.sentences import tokenize
from experiments.engines import runtimes
from experiments.models.published_embeddings import BATCH
from experiments.models.sentences import MeanPooled, SentenceEncoder, bert_of, params_of
from experiments.outputs import workdir
from experiments.training import factories
from sa_plus_plus import pruning
from sa_plus_plus.contrib.transformers.encoder import Bert

PUBLISHED = "published"
PRECISIONS = ("float32", "int8")
Run = Callable[[np.ndarray], Any]


class Network(NamedTuple):
    """What is served.

    Attributes:
      folder: its name: where it is in the campaign's directory.
      family: of the contender.
      label: of the contender.
      dense: whether the dense engines serve it: a smaller network, or the published one.
      model: the encoder.
      params: its parameters.
    """

    folder: str
    family: str
    label: str
    dense: bool
    model: Bert
    params: Any

    def runs(self, batches: Sequence[np.ndarray], precisions: Sequence[str], engines: bool = True) -> dict[str, Run]:
        """By engine and precision, `run(tokens)` of batches of one shape.

        Args:
          batches: of that shape, for calibration.
          precisions: some of `PRECISIONS`.
          engines: whether the dense ones serve it too, if it is dense.
        """
        module, variables, x = MeanPooled(self.model), {"params": {"encoder": self.params}}, jnp.asarray(batches[0])

        def ours(precision: str) -> Run:
            options: dict[str, Any] = {"precision": precision}
            options |= {"calibration": list(batches)} if precision == "int8" else {}
            return sapp.specialize(lambda x: module.apply(variables, x), x, **options)

        found = {f"ours {precision}": ours(precision) for precision in precisions}
        if not self.dense or not engines:
            return found
        return (
            found | runtimes.contenders(module, variables, batches[0], precisions=precisions, calibration=batches).runs
        )


def published(encoder: SentenceEncoder) -> Network:
    """The network that all begin with."""
    params = jax.tree.map(jnp.asarray, encoder.params)
    return Network(PUBLISHED, PUBLISHED, "6 layers", True, encoder.model, params)


def trained(contenders: Sequence[Contender], directory: pathlib.Path, model: str) -> list[Network]:
    """The networks that are done; those with fewer hidden units have smaller kernels."""
    found = []
    for each in contenders:
        if workdir.result_of(directory / each.folder) is None:
            continue
        bert, params = retrieval.of_run(directory / each.folder, model)
        found.append(_network(each, bert, params))
    return found


def _network(contender: Contender, bert: Bert, params: Any) -> Network:
    if contender.units:
        bert, params = narrowed(bert, params)
    about = str(contender.folder), contender.family, contender.label, contender.dense
    return Network(*about, bert, jax.tree.map(jnp.asarray, params))


def untrained(contenders: Sequence[Contender], scale: Scale, path: str) -> list[Network]:
    """Networks that take as long as the contenders, for timing: as many layers, units and blocks, but no training.

    They have the published weights, in the blocks of the largest norms.

    Args:
      contenders: of the campaign.
      scale: its scale.
      path: the directory of the published encoder.
    """
    found = []
    for each in contenders:
        bert = bert_of(path, **each.model)
        params, options = params_of(path, bert), config_of(each, scale, {}).sparsifier
        if options.name != "dense":
            planned = factories.plan_options(options) | {"sparsity": options.sparsity}
            params = _largest(params, sapp.plan(params, **planned))
        found.append(_network(each, bert, params))
    return found


def _largest(params: Any, plan: sapp.Plan) -> Any:
    """The parameters with only as many blocks as are planned, the largest ones."""
    leaves, structure = jax.tree.flatten(params)
    pruned = [
        x if leaf.skip_reason else pruning.largest_blocks(x, leaf.block, leaf.kept, leaf.view)
        for x, leaf in zip(leaves, plan.leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, pruned)


def narrowed(model: Bert, params: Mapping[str, Any]) -> tuple[Bert, dict[str, Any]]:
    """The same network without the hidden units whose weights on one side are all zero.

    If those into it are, a unit gives `gelu(bias)` whatever the input, which is added to the bias of the next layer.

    Raises:
      ValueError: if the layers keep different numbers of units.
    """
    params, counts = dict(params), set()
    for name in (f"layer{i + 1}" for i in range(model.layers)):
        up, down = params[name]["up"], params[name]["down"]
        kernel, bias, after = (np.asarray(a) for a in (up["kernel"], up["bias"], down["kernel"]))
        left = kernel.any(0) & after.any(1)
        constant = np.asarray(jax.nn.gelu(bias[~left], approximate=model.approximate)) @ after[~left]
        small_up = {"kernel": kernel[:, left], "bias": bias[left]}
        small_down = {"kernel": after[left], "bias": np.asarray(down["bias"]) + constant}
        params[name] = {**params[name], "up": small_up, "down": small_down}
        counts.add(int(left.sum()))
    if len(counts) > 1:
        raise ValueError(f"the layers keep different numbers of hidden units: {sorted(counts)}")
    return model.clone(hidden=counts.pop()), params


def in_int8(network: Network, tokenizer: Any, texts: Sequence[str], engines: bool) -> dict[str, Any]:
    """By engine, `run(tokens, real)` in int8 of `BATCH` sentences, by a program for queries and one for texts.

    Args:
      network: which.
      tokenizer: of the encoder.
      texts: real ones, for calibration.
      engines: as for `Network.runs`.
    """

    @functools.cache
    def programs(length: int) -> dict[str, Run]:
        return network.runs(batches_of(tokenizer, texts, BATCH, length, 4), ["int8"], engines)

    def run(engine: str, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        del real  # token 0 is padding
        length = retrieval.QUERY if tokens.shape[1] <= retrieval.QUERY else min(retrieval.TEXT, network.model.context)
        padded = np.zeros((len(tokens), length), np.int32)
        padded[:, : tokens.shape[1]] = tokens
        return np.asarray(programs(length)[engine](padded))

    names = ["ours int8"]
    if network.dense and engines:
        names += runtimes.available(runtimes.ENGINES, ["int8"])[0]
    return {name: functools.partial(run, name) for name in names}


def batches_of(tokenizer: Any, texts: Sequence[str], batch: int, length: int, count: int) -> list[np.ndarray]:
    """Up to `count` batches of tokens of real text, `(batch, length)` int32.

    Single sentences are the longest ones: where one of a length is to be timed, none of it is padding.
    """
    found = tokenize(tokenizer, texts, length)
    order = np.argsort(-found["real"], kind="stable") if batch == 1 else np.arange(len(texts))
    rows = found["tokens"][np.resize(order, max(batch * count, batch))].astype(np.int32)
    return [rows[i * batch : (i + 1) * batch] for i in range(count)]


def sizes(network: Network, block: Any, folder: pathlib.Path) -> dict[str, int]:
    """Nonzero weights in the layers' kernels, and bytes of a file of the network in float32.

    Args:
      network: which.
      block: that it is pruned in; None for a dense one.
      folder: where the file may be written for a moment.
    """
    kernels = [np.asarray(p["kernel"]) for name in network.params for p in _dense_layers(name, network.params)]
    params = network.params
    if block:
        nonzero = sum(map(np.count_nonzero, kernels)) / sum(kernel.size for kernel in kernels)
        where: dict[str, Any] = {"where": lambda path: path.startswith("layer"), "min_blocks": 1}
        sparsity = 1 - nonzero - 1e-9  # rounding must not plan a block too few
        params = sapp.export(params, sapp.plan(params, block=tuple(block), sparsity=sparsity, **where))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        saved = sapp.save(pathlib.Path(temporary, "network"), params).bytes
    return {"weights": int(sum(map(np.count_nonzero, kernels))), "bytes": saved}


def _dense_layers(name: str, params: Mapping[str, Any]) -> list[Any]:
    return [part for part in params[name].values() if "kernel" in part] if name.startswith("layer") else []
