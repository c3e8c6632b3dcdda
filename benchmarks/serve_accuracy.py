"""Accuracy of a trained, pruned network in low precision: top-1 on all test images in float32, bfloat16 and int8.

int8 weights have 7 or 8 bits, whichever is faster on a processor; both are measured.

    python -m experiments.main --config=configs/cifar10_resnet20.py --config.data.local=cifar10.tar --workdir=runs/cifar
    python -m benchmarks.serve_accuracy --config=configs/cifar10_resnet20.py --config.data.local=cifar10.tar \
        --weights=runs/cifar/pruned.safetensors

Scales are chosen on training images. Writes benchmarks/results/<name>.json.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import sa_plus_plus as sapp
from benchmarks import timing
from experiments import cli
from experiments.training import sharding
from experiments.training.setup import prepare
from sa_plus_plus.sparse.compiler.autotune import Precision
from sa_plus_plus.sparse.ops import native

flags.declare_key_flag("config")
_WEIGHTS = flags.DEFINE_string("weights", None, "A pruned.safetensors of a run with this config.", required=True)
_CALIBRATION = flags.DEFINE_integer("calibration", 500, "Training images for choosing scales.")
_NAME = flags.DEFINE_string("name", "serve_accuracy", "Name of the result file.")
_BATCH = flags.DEFINE_integer("batch", 100, "Images at once.")


def main(argv: list[str]) -> None:
    del argv
    with cli.input_errors():
        setup = prepare(cli.CONFIG.value, sharding.make_mesh(devices=jax.devices()[:1]))
        if setup.config.task != "classification":
            raise ValueError(f"this counts right classes, but config.task is {setup.config.task!r}")
        like = jax.eval_shape(setup.task.init, jax.random.key(0))
        variables = sapp.todense(sapp.load(_WEIGHTS.value, like={"params": like[0], **like[1]}))
    mean, std = (np.float32(getattr(setup.config.data, name) or d) for name, d in (("mean", 0), ("std", 1)))

    def network(image: Any) -> Any:
        image = image.astype(jnp.float32) / 255
        return setup.task.model.apply(variables, (image - mean) / std)

    train, test = setup.task.dataset.train, setup.task.dataset.test
    calibration = list(itertools.islice(batches(train), -(-_CALIBRATION.value // _BATCH.value)))
    images = [batch["image"] for batch in calibration]
    predicted = {"model": predictions(jax.jit(network), test)}
    rows: dict[str, dict[str, float]] = {}
    labels = np.concatenate([batch["label"] for batch in batches(test)])
    for name, (precision, target) in contenders().items():
        native.limit_targets(target)  # whose weights a network gets; any target computes with them
        fast = sapp.specialize(network, images[0], precision=precision, calibration=images, mode="always")
        native.limit_targets(None)
        print(fast, flush=True)
        predicted[name] = predictions(fast, test)
    for name, classes in predicted.items():
        rows[name] = {
            "top1": 100 * float((classes == labels).mean()),
            "changed": 100 * float((classes != predicted["model"]).mean()),
        }
        print(f"{name:20} top-1 {rows[name]['top1']:.2f}%, other class than the model {rows[name]['changed']:.2f}%")
    content = {
        "config": setup.config.name,
        "block": list(setup.config.sparsifier.block),
        "sparsity": setup.config.sparsifier.sparsity,
        "test_images": len(labels),
        "calibration_images": len(images) * _BATCH.value,
        "rows": rows,
    }
    print(timing.save(_NAME.value, content))


def contenders() -> dict[str, tuple[Precision, str | None]]:
    """By name, a precision and the target that the weights are made for."""
    found: dict[str, tuple[Precision, str | None]] = {"float32": ("float32", None), "bfloat16": ("bfloat16", None)}
    for target in native.targets():
        if target.supported and np.dtype(np.uint8) in target.dtypes:
            found.setdefault(f"int8, {8 if target.limit > native.NARROW else 7} bits", ("int8", target.name))
    return found


def batches(source: Any) -> Any:
    """All full batches of examples, in the order of a fixed shuffle."""
    order = np.random.default_rng(0).permutation(len(source))
    for start in range(0, len(source) - _BATCH.value + 1, _BATCH.value):
        yield source.gather(np.sort(order[start : start + _BATCH.value]))


def predictions(network: Any, source: Any) -> np.ndarray:
    return np.concatenate([np.argmax(network(batch["image"]), -1) for batch in batches(source)])


if __name__ == "__main__":
    cli.run(main)
