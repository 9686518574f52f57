"""A map as a transparent picture to lay over the one that it explains."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..explain.report.colormap import OPACITY_FLOOR, colours, resample

__all__ = ["overlay"]

# Overlays of small pictures are enlarged to the first, those of large ones stay at the second and are stretched.
SIDE_LEAST, SIDE_MOST = 448, 1024


def overlay(
    image_map: NDArray[np.float32], size: tuple[int, int], region: tuple[float, float, float, float]
) -> Image.Image:
    """Colour a map from 0 to its maximum.

    Args:
        image_map: (h, w) relevancy.
        size: width and height of the picture.
        region: (left, top, right, bottom) of the picture that the map covers; it may reach beyond it.

    Returns:
        RGBA, in the picture's proportions; opaque at the maximum, less so where the value is smaller.

    Example:
        >>> overlay(np.ones((2, 2), np.float32), (600, 300), (0.0, 0.0, 600.0, 300.0)).size
        (600, 300)
    """
    longer = max(size)
    factor = max(1.0, SIDE_LEAST / longer) if longer <= SIDE_MOST else SIDE_MOST / longer
    width, height = (max(1, round(edge * factor)) for edge in size)
    left, top, right, bottom = (round(edge * factor) for edge in region)
    values = np.clip(image_map / (image_map.max() or 1.0), 0.0, 1.0).astype(np.float32)
    drawn = np.zeros((height, width, 4), np.float32)
    # Columns and rows of the region that lie in the picture.
    inside = [slice(max(0, -low), max(0, min(high, most) - low)) for low, high, most in
              ((top, bottom, height), (left, right, width))]  # fmt: skip
    smooth = resample(values, max(1, bottom - top), max(1, right - left))[inside[0], inside[1]]
    rows, columns = (
        slice(max(0, low), max(0, low) + count) for low, count in zip((top, left), smooth.shape, strict=True)
    )
    drawn[rows, columns, :3] = colours(smooth)
    drawn[rows, columns, 3] = 255 * (OPACITY_FLOOR + (1 - OPACITY_FLOOR) * smooth)
    return Image.fromarray(drawn.round().astype(np.uint8))
