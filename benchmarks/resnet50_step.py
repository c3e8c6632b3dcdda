"""Images per second and memory of ResNet-50's training step: pruned against dense, in one alternating run.

    python -m benchmarks.resnet50_step
    python -m benchmarks.resnet50_step --size=64 --batch=32 --blocks=8 --dtype=float32 --rounds=5 --save=false  # a CPU

The steps are those of the training loop, for configs/resnet50_block*.py, on one synthetic batch that is already on
the device. SequentialAttention++ is timed in a dense phase, where all its weights are in use, and in a sparsification
phase, where it selects blocks at each step. If PyTorch and torchvision are installed and PyTorch sees the device, its
ResNet-50 (channels last, compiled, mixed precision) is timed too.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import timing
from experiments import data
from experiments.outputs import progress
from experiments.training import program, sharding
from experiments.training.setup import prepare

_SIZE = flags.DEFINE_integer("size", 224, "Pixels of an image, squared.")
_BATCH = flags.DEFINE_integer("batch", 256, "Images a step.")
_BLOCKS = flags.DEFINE_list("blocks", ["8", "16", "32", "64"], "Block sizes.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "What activations are computed in.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Rounds of alternating measurement.")
_TORCH = flags.DEFINE_bool("torch", True, "Time PyTorch's step beside them, where it is installed.")
_SAVE = flags.DEFINE_bool("save", True, "Write benchmarks/results/resnet50_step.json.")
MULTIPLY_ADDS_224 = 4.089e9  # forwards; backwards takes twice as many


def compiled(block: int, algorithm: str) -> program.Program:
    """The loop's program for one contender."""
    config = importlib.import_module(f"configs.resnet50_block{block}").get_config()
    config.batch_size = config.eval_batch_size = _BATCH.value
    config.model_options.dtype = _DTYPE.value
    config.sparsifier.name = algorithm
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return program.compiled(prepare(config, mesh, data.declared("imagenet", _SIZE.value)))


def steps(run: program.Program, kind: str) -> Callable[[], Any]:
    """A call that does one step and waits for it, from the first step of a kind of phase on."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (_BATCH.value, _SIZE.value, _SIZE.value, 3), np.uint8)
    label = rng.integers(0, 1000, _BATCH.value).astype(np.int32)
    layout = next(iter(run.batch.values())).sharding
    batch = jax.device_put({"image": image, "label": label}, layout)
    start = next(phase.start for phase in run.phases.phases if phase.kind == kind)
    seed = program.seed_argument([0])
    state = run.functions.init(seed)
    moved = state.prune.step + start + 1
    held = [state._replace(prune=state.prune._replace(step=jax.device_put(moved, state.prune.step.sharding)))]

    def step() -> None:
        held[0], means = run.functions.step(held[0], batch)
        jax.block_until_ready(means)

    return step


def torch_step() -> Callable[[], Any] | None:
    """One training step of PyTorch's ResNet-50, where it is installed with a device to run on."""
    try:
        torch, torchvision = importlib.import_module("torch"), importlib.import_module("torchvision")
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    model = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    image = torch.randn(_BATCH.value, 3, _SIZE.value, _SIZE.value, device="cuda")
    image = image.to(memory_format=torch.channels_last)
    label = torch.randint(0, 1000, (_BATCH.value,), device="cuda")
    forward = torch.compile(model)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(forward(image), label)
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()

    return step


def main(argv: list[str]) -> None:
    del argv
    dense = compiled(int(_BLOCKS.value[0]), "dense")
    runs = {"dense": (dense, "dense")}
    for block in map(int, _BLOCKS.value):
        attention = compiled(block, "sequential_attention")
        runs[f"ACDC, {block}, sparse"] = (compiled(block, "acdc"), "sparse")
        runs[f"SequentialAttention++, {block}, dense"] = (attention, "dense")
        runs[f"SequentialAttention++, {block}, sparsification"] = (attention, "sparsification")
    contenders = {name: steps(*run) for name, run in runs.items()}
    if _TORCH.value and (in_torch := torch_step()) is not None:
        contenders["PyTorch, dense"] = in_torch
    seconds = timing.alternate(contenders, _ROUNDS.value)
    bytes_of = functools.cache(lambda name: _bytes(runs[name][0]))
    rows = []
    for name, taken in seconds.items():
        rate = _BATCH.value / float(np.median(taken))
        useful = 6 * MULTIPLY_ADDS_224 * (_SIZE.value / 224) ** 2 * rate
        rows.append(
            {
                "step": name,
                "images_per_second": round(rate, 1),
                "time_to_dense": timing.spread(taken / seconds["dense"]),
                "tflop_per_second": round(useful / 1e12, 2),
                "memory_to_dense": round(bytes_of(name) / bytes_of("dense"), 3) if name in runs else None,
                "gib": round(bytes_of(name) / 2**30, 3) if name in runs else None,
            }
        )
    title = f"ResNet-50, {_SIZE.value} pixels, {_BATCH.value} images, {_DTYPE.value}"
    progress.console().print(progress.table(title, rows))
    if _SAVE.value:
        shape = {"size": _SIZE.value, "batch": _BATCH.value, "dtype": _DTYPE.value}
        print(timing.save("resnet50_step", {"rows": rows, **shape}))


def _bytes(run: program.Program) -> int:
    """A step's peak memory as planned by the compiler."""
    step: Any = run.functions.step  # compiled
    plan = step.memory_analysis()
    return plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes


if __name__ == "__main__":
    app.run(main)
