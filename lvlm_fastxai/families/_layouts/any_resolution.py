"""The rule for pictures that are fitted into a canvas of tiles, with an overview first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ArgumentError
from .image import WHOLE, Box, ImageLayout, Part, Size
from .prompt import Prompt
from .rule import Layout


@dataclass(frozen=True)
class AnyResolution(Layout):
    """Overview, then tiles reassembled, freed of padding, each row ended by a newline column: LLaVA-NeXT, OneVision.

    Attributes:
        pinpoints: configuration attribute, the (height, width) canvases that pictures may be fitted into.
        image_size, patch_size: configuration attributes of the vision tower, in pixels.
        image_sizes: processor output (pictures, 2), original sizes.
        most_tiles: configuration attribute "anyres_max_<n>": beyond 1.1² n tiles' worth of cells the grid is
            interpolated down; None: never.
        pictures_per_sample: processor output (B,): samples with several pictures see each as one tile, padded to a
            square and followed by one newline column; None: all pictures are tiled.
    """

    pinpoints: str = "image_grid_pinpoints"
    image_size: str = "vision_config.image_size"
    patch_size: str = "vision_config.patch_size"
    image_sizes: str = "image_sizes"
    most_tiles: str | None = None
    pictures_per_sample: str | None = None

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        tile = prompt.side(self.image_size)
        side = tile // prompt.side(self.patch_size)
        sizes = prompt.required(self.image_sizes).reshape(-1, 2)
        tiled = self._tiled(prompt, len(sizes))

        def canvas(image: int) -> Canvas:
            if image >= len(sizes):
                raise ArgumentError(f"inputs: {self.image_sizes!r} describes {len(sizes)} pictures, there are more")
            height, width = (int(n) for n in sizes[image])
            most = None
            if self.most_tiles is not None:
                most = int(str(prompt.number(self.most_tiles)).removeprefix("anyres_max_"))
            return Canvas.of((height, width), prompt.number(self.pinpoints), tile, side, most)

        def count(image: int) -> int:
            if image < len(tiled) and not tiled[image]:
                return side * side + 1
            rows, across = canvas(image).cells
            return side * side + rows * (across + 1)

        found = []
        for image, run in prompt.divide(count):
            overview = run[: side * side].reshape(side, side)
            if not tiled[image]:
                height, width = (int(n) for n in sizes[image])
                left, top = (max(height, width) - width) // 2 / width, (max(height, width) - height) // 2 / height
                square = (-left, -top, max(height, width) / width - left, max(height, width) / height - top)
                found.append(ImageLayout((Part(overview, square),)))
                continue
            rows, across = canvas(image).cells
            with_newlines = run[side * side :].reshape(rows, across + 1)
            found.append(ImageLayout((Part(with_newlines[:, :-1], canvas(image).box), Part(overview, WHOLE))))
        return found

    def _tiled(self, prompt: Prompt, pictures: int) -> list[bool]:
        counts = None if self.pictures_per_sample is None else prompt.input(self.pictures_per_sample)
        if counts is None:
            return [True] * pictures
        return [int(count) == 1 for count in counts.reshape(-1) for _ in range(int(count))]


@dataclass(frozen=True)
class Canvas:
    """A picture fitted into a canvas of whole tiles: its grid of cells without padding, and what that grid covers."""

    cells: Size
    box: Box

    @classmethod
    def of(cls, size: Size, pinpoints: Sequence[Sequence[int]], tile: int, side: int, most_tiles: int | None) -> Canvas:
        """Fit a picture of `size` pixels; a tile has `side` × `side` cells and `tile` × `tile` pixels."""
        height, width = size
        canvas = cls._best(size, pinpoints)
        down, across = canvas[0] // tile * side, canvas[1] // tile * side
        # The padding is measured twice by transformers: in pixels when the picture is pasted (rounded up), and in
        # cells when the features are cut (rounded down). The grid therefore may keep a sliver of padding.
        if canvas[1] / width < canvas[0] / height:
            pasted = (min(math.ceil(height * canvas[1] / width), canvas[0]), canvas[1])
        else:
            pasted = (canvas[0], min(math.ceil(width * canvas[0] / height), canvas[1]))
        cut_down = cut_across = 0
        if width / height > across / down:
            cut_down = (down - int(round(height * (across / width), 7))) // 2
        else:
            cut_across = (across - int(round(width * (down / height), 7))) // 2
        top, bottom = cls._share(down, cut_down, canvas[0], pasted[0])
        left, right = cls._share(across, cut_across, canvas[1], pasted[1])
        down, across = down - 2 * cut_down, across - 2 * cut_across
        if most_tiles is not None:
            ratio = math.sqrt(down * across / (most_tiles * side**2))
            if ratio > 1.1:
                down, across = int(down // ratio), int(across // ratio)
        return cls((down, across), (left, top, right, bottom))

    @staticmethod
    def _best(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
        """The canvas that keeps most of the picture's pixels and, among those, wastes least."""
        height, width = size

        def merit(canvas: Sequence[int]) -> tuple[int, int]:
            scale = min(canvas[1] / width, canvas[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - canvas[0] * canvas[1]

        best = max(pinpoints, key=merit)
        return int(best[0]), int(best[1])

    @staticmethod
    def _share(cells: int, cut: int, canvas: int, pasted: int) -> tuple[float, float]:
        cell = canvas / cells
        offset = (canvas - pasted) // 2
        return (cut * cell - offset) / pasted, ((cells - cut) * cell - offset) / pasted
