"""Images for a vision transformer, as `preprocessor_config.json` says: pixels, and how they are normalised."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sa_plus_plus.contrib.transformers.directories import IMAGES, Published, json_of

ENDS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_REQUIRED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False}  # all that is built


class Preparation(NamedTuple):
    """How pixels in 0 to 255 become a network's inputs, `(pixels * scale - mean) / deviation`.

    Attributes:
      resample: the number of Pillow's filter for resizing.
      scale: a factor of all pixels.
      mean: of each channel.
      deviation: of each channel.
    """

    resample: int
    scale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """A network's inputs `(..., channels)`, float32, from pixels of the same shape."""
        scaled = pixels.astype(jnp.float32) * self.scale
        return (scaled - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.deviation, jnp.float32)


def preparation(published: Published) -> Preparation:
    """How images are prepared for a network.

    Args:
      published: a ViT.

    Raises:
      ValueError: if its `preprocessor_config.json` cannot be read, or asks for something that is not done here.
    """
    file = published.inner / IMAGES
    about = json_of(file)
    for key, wanted in _REQUIRED.items():
        if (found := about.get(key, wanted)) != wanted:
            raise ValueError(f"{file} has {key} {found!r}; only {wanted!r} is supported")
    size, sides = about.get("size", {}), published.image[:2]
    asked = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if asked != sides:
        raise ValueError(f"{file} asks for images of the size {size!r}, and the network takes {sides[0]} x {sides[1]}")
    channels = published.image[2]
    mean, deviation = (tuple(about.get(key, (0.5,) * channels)) for key in ("image_mean", "image_std"))
    if not len(mean) == len(deviation) == channels:
        raise ValueError(f"{file} has image_mean {mean} and image_std {deviation}, and images have {channels} channels")
    return Preparation(about.get("resample", 2), about.get("rescale_factor", 1 / 255), mean, deviation)


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The images in a folder and those in it, in order of their paths.

    Args:
      folder: its path.

    Raises:
      ValueError: if it is no folder, or there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of images")
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDS)
    if not found:
        raise ValueError(f"{folder} has no images: no files that end in {', '.join(ENDS)}")
    return found


def pixels(files: Sequence[pathlib.Path], image: tuple[int, ...], resample: int) -> np.ndarray:
    """Images `(files, height, width, channels)` uint8, resized.

    Args:
      files: of images.
      image: height, width and channels.
      resample: the number of Pillow's filter.

    Raises:
      ImportError: without Pillow.
      ValueError: if a file cannot be read as an image, or there is no way to the number of channels.
    """
    try:
        import PIL.Image  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ImportError("images need the package pillow: pip install pillow") from error
    height, width, channels = image
    modes: dict[int, Any] = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"images of {channels} channels are not supported, only of 1 and 3")
    result = np.empty((len(files), *image), np.uint8)
    for place, file in zip(result, files, strict=True):
        try:
            with PIL.Image.open(file) as opened:
                found = opened.convert(modes[channels]).resize((width, height), PIL.Image.Resampling(resample))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
        place[...] = np.asarray(found).reshape(image)
    return result
