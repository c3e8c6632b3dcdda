"""Photographs per second and core: JPEG files to randomly cropped batches, against a plain implementation.

    python -m benchmarks.input_pipeline --images=path/with/train/and/val

The plain contender is the obvious code with Pillow alone: decode, crop, resize, flip, floats of mean 0 and variance 1.
Ours decodes at reduced resolution if that is enough, resizes the crop in place, and leaves floats to the device; the
crops are the same. Files are read into memory once, so that decoding is measured and not the disk. It runs on one core,
and pins itself if necessary. ImageNet's photographs have about 500 x 375 pixels; smaller ones are enlarged to that and
encoded again, at the quality of the originals, unless `--as_stored` is given.
"""

import functools
import io
import os
from collections.abc import Callable

import numpy as np
from absl import app, flags
from PIL import Image

from benchmarks import timing
from experiments.data import Records, catalog, images
from experiments.outputs import progress

_IMAGES = flags.DEFINE_string(
    "images", None, "Directory with train/<class>/*.JPEG and val/<class>/*.JPEG.", required=True
)
_AS_STORED = flags.DEFINE_bool("as_stored", False, "Measure with the files as they are.")
COUNT, ROUNDS, SIZES, NEEDED = 200, 11, (224, 160, 96, 64), 3000
MEAN, STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)


def plain(content: bytes, size: int, random: np.ndarray) -> np.ndarray:
    """The training transform, step by step."""
    return (plain_bytes(content, size, random).astype(np.float32) / 255 - MEAN) / STD


def plain_bytes(content: bytes, size: int, random: np.ndarray) -> np.ndarray:
    """Like `plain`, with conversion to floats left to the device."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    box = images.random_box(*image.size, random, 0.08)
    left, top, right, bottom = (round(x) for x in box)
    image = image.crop((left, top, right, bottom)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random[-1] < 0.5 else image)


def contents(directory: str, as_stored: bool) -> list[bytes]:
    train = catalog.image_folder(directory).train
    assert isinstance(train, Records)
    records = train.records
    chosen = [records[i]["image"].read_bytes() for i in np.linspace(0, len(records) - 1, COUNT).astype(int)]
    return chosen if as_stored else [_enlarged(content) for content in chosen]


def _enlarged(content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content))
    sides = (500, 375)
    if image.width >= sides[0] or image.height >= sides[0]:
        return content
    file = io.BytesIO()
    image.convert("RGB").resize(sides, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def main(argv: list[str]) -> None:
    del argv
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core
    files = contents(_IMAGES.value, _AS_STORED.value)
    random = np.random.default_rng(0).random((COUNT, images.CROP_DRAWS), np.float32)
    transforms = {"ours": images.random_crop, "Pillow, plainly": plain, "Pillow, plainly, bytes": plain_bytes}
    rows = []
    for size in SIZES:

        def batch(transform: Callable[..., np.ndarray], size: int = size) -> np.ndarray:
            return np.stack([transform(c, size, r) for c, r in zip(files, random, strict=True)])

        seconds = timing.alternate({name: functools.partial(batch, t) for name, t in transforms.items()}, ROUNDS)
        ours = np.array(seconds["ours"])
        for name, taken in seconds.items():
            rate = COUNT / float(np.median(taken))
            rows.append(
                {
                    "size": size,
                    "transform": name,
                    "images_per_second_and_core": round(rate),
                    "times_ours": timing.spread(np.array(taken) / ours),
                    f"cores_for_{NEEDED}": round(NEEDED / rate, 1),
                }
            )
    kilobytes = round(float(np.mean([len(c) for c in files])) / 1e3, 1)
    title = f"Random crops of {COUNT} photographs, {kilobytes} kB each"
    progress.console().print(progress.table(title, rows))
    print(timing.save("input_pipeline", {"rows": rows, "images": COUNT, "kilobytes": kilobytes}))


if __name__ == "__main__":
    app.run(main)
