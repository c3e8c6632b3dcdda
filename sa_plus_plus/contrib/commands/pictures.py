"""Pictures of masks, a pixel a block, as text for a page."""

import base64
import io
from typing import Any

import numpy as np

MOST = 384  # pixels across
_LIGHT, _DARK, _REMOVED = (158, 193, 232), (16, 56, 112), (240, 240, 238)


def check_packages() -> None:
    """Refuse to go on without matplotlib.

    Raises:
      ImportError: without it.
    """
    _image()


def picture(norms: np.ndarray, mask: np.ndarray) -> str:
    """The blocks of a matrix that are left, darker for larger norms, as the address of a PNG.

    Where there are more blocks than pixels, a pixel is the mean of several.

    Args:
      norms: of each block, `(grid_r, grid_c)`.
      mask: which are left, of the same shape.
    """
    most = np.quantile(norms[mask], 0.95) if mask.any() else 0.0  # a few large ones do not make the others pale
    share = np.clip(norms / (most or 1.0), 0, 1)[..., None]
    left = np.array(_LIGHT) + share * (np.array(_DARK) - np.array(_LIGHT))
    pixels = np.where(mask[..., None], left, np.array(_REMOVED))
    for axis in (0, 1):
        pixels = _shrunk(pixels, axis)
    content = io.BytesIO()
    _image().imsave(content, pixels.round().astype(np.uint8), format="png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _shrunk(pixels: np.ndarray, axis: int) -> np.ndarray:
    side = pixels.shape[axis]
    step = -(-side // MOST)
    if step == 1:
        return pixels
    starts = np.arange(0, side, step)
    counts = np.diff([*starts, side]).reshape([-1 if i == axis else 1 for i in range(pixels.ndim)])
    return np.add.reduceat(pixels, starts, axis=axis) / counts


def _image() -> Any:
    try:
        import matplotlib.image  # noqa: PLC0415 - optional: only pictures need it
    except ImportError as error:
        raise ImportError(
            "the report's pictures need the package matplotlib: pip install matplotlib, or all that the commands can "
            "use by pip install 'sa_plus_plus[commands]'"
        ) from error
    return matplotlib.image
