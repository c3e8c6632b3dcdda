"""Images to arrays: crops and flips for training, centre crops for testing; uint8, converted on the device.

Augmentation is a function of an example and of numbers in [0, 1) passed with it, so that the order of examples and a
seed determine every pixel, on any hosts and threads.
"""

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from experiments.data.sources import Batch

CROP_DRAWS = 23  # random numbers for `random_crop`: ten areas, ten aspect ratios, two positions, one flip
SHIFT_DRAWS = 3  # random numbers for `shifted`: two offsets, one flip
_ATTEMPTS = 10

# A small file may claim to hold pixels that fill the memory: beyond Pillow's limit, 89 million, an error from here on.
warnings.simplefilter("error", Image.DecompressionBombWarning)

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class CorruptImage(ValueError):
    """The content of an image file cannot be decoded."""


def random_crop(content: bytes, size: int, random: np.ndarray, min_area: float = 0.08) -> np.ndarray:
    """A part of an image of random area, shape and place, resized and perhaps flipped (Szegedy et al. 2015).

    Args:
      content: of an image file.
      size: of the result.
      random: `CROP_DRAWS` numbers in [0, 1).
      min_area: smallest share of the image's area; the largest is 1.

    Returns:
      `(size, size, 3)` uint8.

    Raises:
      CorruptImage: if the content cannot be decoded.
    """
    width, height = dimensions(content)
    box = random_box(width, height, random, min_area)
    return resized_part(content, box, size, flip=random[-1] < 0.5, exact=False)


def random_box(width: int, height: int, random: np.ndarray, min_area: float) -> Box:
    """The first of ten random boxes that fits in the image; if none fits, the largest central box of an allowed shape.

    Areas are uniform in `[min_area, 1]` of the image's, the logarithm of the aspect ratio in `[log 3/4, log 4/3]`.

    Args:
      width: of the image.
      height: of the image.
      random: `CROP_DRAWS` numbers in [0, 1).
      min_area: as above.
    """
    areas, ratios = np.asarray(random[:_ATTEMPTS], float), np.asarray(random[_ATTEMPTS : 2 * _ATTEMPTS], float)
    area = width * height * (min_area + (1 - min_area) * areas)
    ratio = np.exp(math.log(3 / 4) + math.log(16 / 9) * ratios)  # width to height, from 3/4 to 4/3
    widths, heights = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = np.flatnonzero((widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height))
    if fits.size:
        w, h = float(widths[fits[0]]), float(heights[fits[0]])
        left = float(math.floor(float(random[2 * _ATTEMPTS]) * (width - w + 1)))
        top = float(math.floor(float(random[2 * _ATTEMPTS + 1]) * (height - h + 1)))
    else:
        w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
        left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def centre_crop(content: bytes, size: int, margin: float = 256 / 224) -> np.ndarray:
    """The centre crop of an image whose shorter side is resized to `margin * size`.

    Args:
      content: of an image file.
      size: of the result.
      margin: as above; 1 for the largest square.

    Returns:
      `(size, size, 3)` uint8.

    Raises:
      CorruptImage: if the content cannot be decoded.
    """
    width, height = dimensions(content)
    side = min(width, height) / margin
    left, top = (width - side) / 2, (height - side) / 2
    return resized_part(content, (left, top, left + side, top + side), size)


def dimensions(content: bytes) -> tuple[int, int]:
    """Width and height, from the file's header."""
    with _decoding(content):
        return Image.open(io.BytesIO(content)).size


def rgb(content: bytes) -> np.ndarray:
    """All of an image, `(height, width, 3)` uint8; the first frame where there are several.

    Raises:
      CorruptImage: if the content cannot be decoded.
    """
    with _decoding(content):
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def resized_part(content: bytes, box: Box, size: int, flip: bool = False, exact: bool = True) -> np.ndarray:
    """The part of an image within `box`, resized to `(size, size, 3)` with a triangle filter scaled by the reduction.

    Where the part is reduced to half or less, the JPEG decoder does most of that: it needs only the coarse
    coefficients.

    Args:
      content: of an image file.
      box: the part.
      size: of the result.
      flip: whether left and right change places.
      exact: whether colours between those stored are interpolated, as most decoders do, or repeated, which is faster.

    Raises:
      CorruptImage: if the content cannot be decoded.
    """
    left, top, right, bottom = box
    with _decoding(content):
        image, factor = _decoded(content, max(1.0, min(right - left, bottom - top) / size), exact)
        scaled = tuple(x / factor for x in box)
        right, bottom = min(scaled[2], image.width), min(scaled[3], image.height)  # a reduced image may lack a fraction
        part = image.resize((size, size), Image.Resampling.BILINEAR, box=(scaled[0], scaled[1], right, bottom))
        if flip:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(part.convert("RGB"))


def shifted(batch: Batch, random: np.ndarray, margin: int = 4) -> Batch:
    """Images in memory, shifted by up to `margin` pixels with zero fill, and randomly flipped.

    Args:
      batch: `image` is `(batch, height, width, channels)`.
      random: `(batch, SHIFT_DRAWS)` in [0, 1).
      margin: in pixels.
    """
    image = batch["image"]
    n, height, width, _ = image.shape
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    top, left = (random[:, :2] * (2 * margin + 1)).astype(np.int64).T
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.arange(width)
    columns = np.where(random[:, 2:] < 0.5, columns[:, ::-1], columns)
    return batch | {"image": padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]}


def _decoded(content: bytes, reduction: float, exact: bool) -> tuple[Any, float]:
    """An image decoded at up to `reduction` times smaller size than stored, and the actual factor.

    Red, green and blue are its first three bands. It is good until this thread's next call.
    """
    if content[:2] == b"\xff\xd8":
        factor = 2 ** min(3, int(math.log2(reduction)))  # 1, 2, 4 or 8: for these, decoders have fast transforms
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(content)
            sides = {"min_height": -(-height // factor), "min_width": -(-width // factor)} if factor > 1 else {}
            fast = {"fastdct": not exact, "fastupsample": not exact}
            # Into memory that is there already, four bytes a pixel as Pillow has them: new pages and copies would take
            # as long as the decoding.
            buffer = _buffer(4 * (height + 8) * (width + 8))
            pixels = simplejpeg.decode_jpeg(content, "RGBX", buffer=buffer, **sides, **fast)
            size = pixels.shape[1], pixels.shape[0]
            return Image.frombuffer("RGBX", size, pixels, "raw", "RGBX", 0, 1), factor
        except ValueError:  # four colours, or damage: Pillow reads all that can be read
            pass
    return Image.open(io.BytesIO(content)).convert("RGB"), 1.0


@contextlib.contextmanager
def _decoding(content: bytes) -> Iterator[None]:
    """Whatever a decoder makes of a content that it cannot decode, and there are many of them, is `CorruptImage`."""
    if not content:
        raise CorruptImage("the file is empty")
    try:
        yield
    except MemoryError:
        raise
    except Image.UnidentifiedImageError as error:
        raise CorruptImage("it is no image of a known format") from error
    except Exception as error:
        raise CorruptImage(str(error) or type(error).__name__) from error


_own = threading.local()


def _buffer(size: int) -> np.ndarray:
    """A buffer of at least `size` bytes that belongs to this thread."""
    if getattr(_own, "buffer", np.empty(0)).size < size:
        _own.buffer = np.empty(size, np.uint8)
    return _own.buffer
