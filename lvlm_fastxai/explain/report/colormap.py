"""The colour scale of every map, and the resampling that draws a patch grid smoothly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ANCHORS", "OPACITY_FLOOR", "colours", "resample"]

# inferno by Nathaniel Smith and Stéfan van der Walt, dedicated to the public domain (CC0): perceptually uniform,
# ordered in grey and for colour-blind readers. Linear interpolation of 33 anchors is within 4.4/255 of its table.
ANCHORS: list[str] = [
    *("000004", "040312", "0b0724", "150b37", "210c4a", "2f0a5b", "3d0965", "4a0c6b", "57106e", "64156e", "71196e"),
    *("7d1e6d", "8a226a", "972766", "a32c61", "b0315b", "bc3754", "c73e4c", "d24644", "db503b", "e45a31", "eb6628"),
    *("f1731d", "f68013", "f98e09", "fb9d07", "fcac11", "fbbc21", "f9cb35", "f5db4c", "f2ea69", "f3f68a", "fcffa4"),
]

# Opacity rises with the value, from this share of the chosen opacity at zero to all of it at the maximum: the picture
# stays readable where the map says little, and is darkened enough there for the bright end to stand out.
OPACITY_FLOOR = 0.45

_TABLE = np.array([tuple(bytes.fromhex(anchor)) for anchor in ANCHORS], dtype=np.float32)


def colours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """RGB (…, 3) in 0 … 255 of values (…) in 0 … 1; values outside are clipped."""
    place = np.clip(values, 0.0, 1.0) * (len(_TABLE) - 1)
    low = np.minimum(place.astype(np.intp), len(_TABLE) - 2)
    share = (place - low)[..., None]
    return (1 - share) * _TABLE[low] + share * _TABLE[low + 1]


def resample(values: NDArray[np.float32], height: int, width: int, *, smooth: bool = True) -> NDArray[np.float32]:
    """A map (h, w) on `height` × `width` pixels.

    Smooth: Catmull–Rom, which passes through each cell's value at the cell's centre, clipped to the map's own range so
    that no pixel claims more or less than some cell does. Otherwise: every pixel has its cell's value.
    """
    rows, columns = values.shape
    if not smooth:
        row_of = ((np.arange(height) + 0.5) * rows / height).astype(np.intp)
        column_of = ((np.arange(width) + 0.5) * columns / width).astype(np.intp)
        return values[row_of][:, column_of]
    drawn = _weights(rows, height) @ values @ _weights(columns, width).T
    return np.clip(drawn, values.min(), values.max())


def _weights(cells: int, pixels: int) -> NDArray[np.float32]:
    """(pixels, cells) Catmull–Rom weights between cell centres, the border cell repeated outside."""
    place = (np.arange(pixels) + 0.5) * cells / pixels - 0.5
    base = np.floor(place).astype(np.intp)
    t = place - base
    taps = (
        -0.5 * t + t**2 - 0.5 * t**3,
        1 - 2.5 * t**2 + 1.5 * t**3,
        0.5 * t + 2 * t**2 - 1.5 * t**3,
        -0.5 * t**2 + 0.5 * t**3,
    )
    weights = np.zeros((pixels, cells), dtype=np.float32)
    for offset, tap in zip((-1, 0, 1, 2), taps, strict=True):
        np.add.at(weights, (np.arange(pixels), np.clip(base + offset, 0, cells - 1)), tap)
    return weights
