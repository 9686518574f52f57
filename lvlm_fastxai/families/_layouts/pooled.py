"""The rule for pictures of a fixed number of tokens, with crops of long ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...errors import ArgumentError
from .image import WHOLE, ImageLayout, Part, Size
from .prompt import Prompt
from .rule import Layout, mosaic
from .tiles import likeliest


@dataclass(frozen=True)
class PooledWithCrops(Layout):
    """The tower's patches pooled to a square of tokens; a long picture may be followed by crops of it: Gemma 3.

    Crops ("pan and scan") lie side by side along the longer edge. How many belong to each picture comes from the
    processor output "num_crops" (pictures of the batch), which transformers' processor drops, or follows from
    `image_sizes` where the sample holds a single picture; without either every run of tokens counts as a picture.

    Attributes:
        tokens: configuration attribute, tokens per picture or crop, a square.
        crops: processor output (pictures of the batch,).
        pixels: processor output (pictures and crops of the batch, channels, height, width).
    """

    tokens: str = "mm_tokens_per_image"
    crops: str = "num_crops"
    pixels: str = "pixel_values"

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        side = math.isqrt(int(prompt.number(self.tokens)))
        views = [run.reshape(side, side) for _, run in prompt.divide(lambda _: side * side)]
        found, start = [], 0
        for number, crops in enumerate(self._crops(prompt, len(views), side)):
            whole, *cut = views[start : start + crops + 1]
            parts: tuple[Part, ...] = (Part(whole, WHOLE),)
            if cut:
                rows, across = self._arrangement(prompt, number, start, crops, side)
                parts = (Part(mosaic(np.stack(cut), rows, across), WHOLE), *parts)
            found.append(ImageLayout(parts))
            start += crops + 1
        return found

    def _crops(self, prompt: Prompt, views: int, side: int) -> list[int]:
        counts = prompt.input(self.crops)
        if counts is not None:
            left = [int(n) for n in counts.reshape(-1)]
            for columns in prompt.image_columns[: prompt.sample + 1]:
                mine, room = [], len(columns) // (side * side)
                while room > 0 and left:
                    mine.append(left.pop(0))
                    room -= mine[-1] + 1
                if room:
                    raise ArgumentError(f"inputs: {self.crops!r} does not fit the number of image tokens in the prompt")
            return mine
        pictures = views if prompt.image_sizes is None else len(prompt.image_sizes)
        if pictures == views:
            return [0] * views
        if pictures == 1:
            return [views - 1]
        raise ArgumentError(
            f"inputs: {self.crops!r} is needed: {views} pictures and crops came for {pictures} pictures, "
            "the image processor (not the joint processor) returns it"
        )

    def _arrangement(self, prompt: Prompt, image: int, view: int, crops: int, side: int) -> Size:
        size = prompt.size(image)
        if size is not None:
            return (1, crops) if size[1] >= size[0] else (crops, 1)
        first = sum(len(columns) for columns in prompt.image_columns[: prompt.sample]) // (side * side) + view
        pixels = prompt.required(self.pixels)
        return likeliest(pixels[first + 1 : first + 1 + crops], pixels[first], [(1, crops), (crops, 1)])
