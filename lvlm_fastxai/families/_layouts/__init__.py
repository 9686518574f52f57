"""The few rules by which image tokens lie in a prompt; a family file names one and gives its parameters.

A rule follows what the model's own code in transformers does to a picture (tiling, merging of patches, separators), so
that every column of the sequence can be put back where it looks in the original picture. Sizes are (height, width),
boxes (left, top, right, bottom), in shares of the original picture's width and height.
"""

from __future__ import annotations

from .any_resolution import AnyResolution, Canvas
from .grids import MergedGrid, SquareGrid
from .image import WHOLE, Box, ImageLayout, Part, Size
from .pooled import PooledWithCrops
from .prompt import Prompt, attribute, seen_box
from .rule import Layout
from .tiles import TilesWithOverview, TilesWithThumbnail, likeliest

__all__ = [
    "WHOLE",
    "AnyResolution",
    "Box",
    "Canvas",
    "ImageLayout",
    "Layout",
    "MergedGrid",
    "Part",
    "PooledWithCrops",
    "Prompt",
    "Size",
    "SquareGrid",
    "TilesWithOverview",
    "TilesWithThumbnail",
    "attribute",
    "likeliest",
    "seen_box",
]
