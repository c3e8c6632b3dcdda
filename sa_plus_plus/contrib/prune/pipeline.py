"""From the directory of a dense network to that of a pruned one."""

import argparse
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import sa_plus_plus as sapp
from sa_plus_plus.contrib.prune import data, files, page, training
from sa_plus_plus.contrib.prune.networks import Measure, inputs, quality
from sa_plus_plus.contrib.transformers import checkpoints, directories
from sa_plus_plus.contrib.transformers.directories import WEIGHTS, Published
from sa_plus_plus.contrib.transformers.images import files_in
from sa_plus_plus.contrib.transformers.transformer import Decoder
from sa_plus_plus.files import write_atomically

Say = Callable[[str], None]
STATE = "training.safetensors"


def prune(options: argparse.Namespace, command: str, say: Say) -> None:
    """Prune a network as the options of the command say.

    Args:
      options: see `command.add_to`.
      command: the command line, for the page.
      say: shows a line of progress.

    Raises:
      ValueError, OSError, ImportError: naming what is wrong, before anything is trained.
    """
    output: pathlib.Path = options.output
    files.check_output(options.directory, output)
    published = directories.read(options.directory)
    recipe = _options(published, options)
    examples = _examples(published, options)
    dense = parameters(published, published.weights)
    plan = training.plan(dense, recipe)
    training.sparsifier(recipe)  # refuses too few steps
    with files.working(output, _decisive(options, published)) as going_on:
        kernels = f"{len(plan.pruned)} kernels, {plan.kernel_weights:,} weights"
        say(f"{published.folder.resolve().name}: {type(published.model).__name__}, {kernels}")
        if examples:
            say(examples.said)
        if going_on:
            say(f"unfinished work is in {files.unfinished(output)}")
        began = time.monotonic()
        pruned = _pruned(published, dense, examples, recipe, files.unfinished(output) / STATE, say)
        sapp.check_pruned(pruned, plan)
        say(f"pruned in {time.monotonic() - began:.0f} s; writing, measuring and timing")
        _written(published, dense, pruned, plan, examples, recipe, output, command, say)
    say(f"{output} has the pruned network, {output / files.REPORT / page.PAGE} the page on it")


def _pruned(
    published: Published,
    dense: Any,
    examples: data.Examples | None,
    recipe: training.Options,
    state: pathlib.Path,
    say: Say,
) -> Any:
    if examples is None:
        say("pruning by magnitude")
        return training.by_magnitude(dense, recipe)
    say("compiling" if recipe.steps else "pruning without training, by Optimal Brain Surgeon")
    run = training.trained if recipe.steps else training.one_shot
    return run(published, dense, examples.train, recipe, state, say)


def _written(
    published: Published,
    dense: Any,
    pruned: Any,
    plan: sapp.Plan,
    examples: data.Examples | None,
    recipe: training.Options,
    output: pathlib.Path,
    command: str,
    say: Say,
) -> None:
    """Write the directory: the files, the served network and the page."""
    copy, left_out = files.copied(published.folder, published.inner, output)
    weights = copy / published.inner.relative_to(published.folder) / WEIGHTS
    layers = {name: x for name, x in pruned.items() if name.startswith("layer")}
    checkpoints.save(weights, published.weights, published.model, layers)
    pruned = parameters(published, weights)  # what is in the file, which may be of a narrower type
    measures = quality(published, dense, pruned, examples.held_out, recipe.batch) if examples else []
    length = examples.train["tokens"].shape[1] if examples and "tokens" in examples.train else 0
    speeds = page.served(published, dense, pruned, plan, length, copy / files.REPORT / page.SERVED)
    versions = f"sa_plus_plus {sapp.__version__}, JAX {jax.__version__}"
    notes = [f"{versions}, {jax.devices()[0].device_kind}, {os.cpu_count()} processors"]
    notes += [examples.said] if examples else []
    if left_out:
        notes.append(f"Not copied, for they hold the dense network in other formats: {', '.join(left_out)}")
    removed = f"{recipe.sparsity:.0%} of the blocks of {recipe.block[0]} × {recipe.block[1]} removed"
    title = f"{published.folder.resolve().name}, {removed}"
    _report(copy / files.REPORT, published, pruned, plan, title, command, notes, measures, speeds, length)
    files.publish(copy, output)
    for measure in measures:
        say(f"{measure.name}: {measure.pruned:.4g} (dense {measure.dense:.4g})")
    for speed in speeds:
        say(f"batch {speed.batch}: {speed.pruned:.2f} ms (dense {speed.dense:.2f})")


def parameters(published: Published, weights: pathlib.Path) -> Any:
    """A network's parameters, float32.

    Args:
      published: the network.
      weights: a file of its weights.

    Raises:
      ValueError: if it cannot be read, or has not the tensors of this network.
    """
    example = page.arguments(published, 1, 1)[0]
    shapes = jax.eval_shape(published.model.init, jax.random.key(0), example)["params"]
    return checkpoints.load(weights, published.model, shapes)


def _takes(published: Published, length: int) -> str:
    """What the served network takes, a sentence."""
    if published.image:
        height, width, channels = published.image
        return f"It takes prepared images, float32 `(batch, {height}, {width}, {channels})`."
    tokens = f"It takes {length} tokens a row, int32 `(batch, {length})`, filled up with zeros at the end"
    return tokens + (", and int32 `(batch,)`, how many of each row are real." if "real" in inputs(published) else ".")


def _options(published: Published, options: argparse.Namespace) -> training.Options:
    batch = options.batch or (8 if isinstance(published.model, Decoder) else 32)
    return training.Options(options.block, options.sparsity, options.steps, batch, options.learning_rate)


def _examples(published: Published, options: argparse.Namespace) -> data.Examples | None:
    if not published.image:
        if options.images is not None:
            raise ValueError(f"--images={options.images} is of no use for a network of text: give --text=FILE")
        if options.text is None:
            raise ValueError("--text is missing: a file with a sentence a line, of the kind that the network is for")
        return data.from_text(published, options.text, options.length)
    if options.text is not None:
        raise ValueError(f"--text={options.text} is of no use for ViT, whose inputs are images: give --images=FOLDER")
    if options.images is not None:
        return data.from_images(published, options.images)
    if options.steps:
        raise ValueError("--images is missing: a folder of images to learn from; or --steps=0 to prune by magnitude")
    return None


def _decisive(options: argparse.Namespace, published: Published) -> dict[str, Any]:
    """All that decides the result: unfinished work goes on only if it is the same."""
    names = ("sparsity", "block", "steps", "length", "batch", "learning_rate")
    contents = {"config.json": published.config, WEIGHTS: published.weights, "--text": options.text}
    run = {
        "version": sapp.__version__,
        **{f"--{name.replace('_', '-')}": _plain(getattr(options, name)) for name in names},
        **{f"the contents of {name}": digest(file) for name, file in contents.items() if file},
    }
    if options.images:  # their contents would take long to read
        found = [f"{file.relative_to(options.images)} {file.stat().st_size}" for file in files_in(options.images)]
        run["the files in --images"] = hashlib.sha256("\n".join(found).encode()).hexdigest()
    return run


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def digest(file: pathlib.Path) -> str:
    """SHA-256 of a file.

    Args:
      file: its path.
    """
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _report(
    folder: pathlib.Path,
    published: Published,
    pruned: Any,
    plan: sapp.Plan,
    title: str,
    command: str,
    notes: list[str],
    measures: list[Measure],
    speeds: list[page.Speed],
    length: int,
) -> None:
    found = page.masks(pruned, plan)
    page.draw_blocks(folder / page.BLOCKS, found, published.model.layers)
    page.draw_speed(folder / page.SPEED, speeds)
    shapes = [(np.asarray(x).shape, x.dtype) for x in page.arguments(published, 1, max(length, 1))]
    call = ", ".join(f"np.ones({shape}, np.{dtype})" for shape, dtype in shapes)
    text = page.text(title, command, notes, measures, speeds, found, plan, _takes(published, length), call)
    write_atomically(folder / page.PAGE, lambda file: file.write(text.encode()))
    result = {
        "quality": [measure._asdict() for measure in measures],
        "milliseconds": [speed._asdict() for speed in speeds],
        "kept": {path: int(mask.sum()) for path, mask in found.items()},
        "blocks": {path: mask.size for path, mask in found.items()},
    }
    write_atomically(folder / "result.json", lambda file: file.write(json.dumps(result, indent=2).encode()))
