"""Pictures as users give them: read, set upright, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import ArgumentError, one_line

__all__ = ["load_picture"]


def load_picture(source: Any) -> Image.Image:
    """An RGB picture from a path, a PIL picture or an array; upright, transparency over white.

    Args:
        source: path, PIL picture, or array (h, w), (h, w, 1), (h, w, 3), (h, w, 4) of uint8 or floats in 0 … 1.

    Raises:
        ArgumentError: it cannot be read as a picture.
    """
    if isinstance(source, str | Path):
        try:
            with Image.open(source) as opened:
                opened.load()
                picture: Image.Image = opened.copy()
                picture = ImageOps.exif_transpose(picture)
        except FileNotFoundError:
            raise ArgumentError(f"image: there is no file '{source}'") from None
        # Pillow's decoders raise all of these on damaged files.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise ArgumentError(f"image: cannot read '{source}' as a picture: {reason}") from error
    elif isinstance(source, Image.Image):
        picture = source
    else:
        picture = _from_array(source)
    if 0 in picture.size:
        raise ArgumentError(f"image: the picture is empty, {picture.width} × {picture.height} pixels")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def _from_array(source: Any) -> Image.Image:
    expected = "expected a path, a PIL picture, or an array (h, w), (h, w, 3) or (h, w, 4) of uint8 or floats in 0 … 1"
    try:
        values = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"image: {expected}, got {type(source).__name__}") from error
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if (
        values.dtype.kind not in "uf"
        or values.ndim not in (2, 3)
        or (values.ndim == 3 and values.shape[2] not in (3, 4))
    ):
        raise ArgumentError(f"image: {expected}, got {type(source).__name__} of shape {values.shape}, {values.dtype}")
    if values.dtype != np.uint8:
        if values.size and not (values.min() >= 0 and values.max() <= 1):
            raise ArgumentError(f"image: {expected}, got values of {values.dtype} outside 0 … 1")
        values = (values.astype(np.float64) * 255).round().astype(np.uint8)
    if values.size == 0:
        raise ArgumentError(f"image: the array is empty, shape {values.shape}")
    return Image.fromarray(np.ascontiguousarray(values))
