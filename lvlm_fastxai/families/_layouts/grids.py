"""Rules for pictures that give one grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import ArgumentError
from .image import WHOLE, ImageLayout, Part
from .prompt import Prompt, seen_box
from .rule import Layout, grid_of, tower_cells


@dataclass(frozen=True)
class SquareGrid(Layout):
    """Every picture gives one square grid, row-major: LLaVA-1.5, PaliGemma.

    Attributes:
        image_size, patch_size: configuration attributes, in pixels.
        strategy: configuration attribute that says whether the tower's first token is dropped; None: never.
        class_token_towers: model types of vision towers that put a class token before the patches.
    """

    image_size: str = "vision_config.image_size"
    patch_size: str = "vision_config.patch_size"
    strategy: str | None = None
    class_token_towers: tuple[str, ...] = ()

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        side = prompt.side(self.image_size) // prompt.side(self.patch_size)
        cells = tower_cells(prompt, side * side, self.strategy, self.class_token_towers)
        return [
            ImageLayout(
                (Part(grid_of(run, cells, (side, side)), seen_box(prompt.image_processor, prompt.size(number))),)
            )
            for number, (_, run) in enumerate(prompt.divide(lambda _: len(cells)))
        ]


@dataclass(frozen=True)
class MergedGrid(Layout):
    """The grid comes with the inputs as (frames, h, w) patches; merge × merge patches give one token: Qwen-VL.

    Attributes:
        grid: processor output (pictures, 3).
        merge: configuration attribute, patches per side of a token.
    """

    grid: str = "image_grid_thw"
    merge: str = "vision_config.spatial_merge_size"

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        merge = int(prompt.number(self.merge))
        grids = prompt.required(self.grid)

        def shape(image: int) -> tuple[int, int, int]:
            if image >= len(grids):
                raise ArgumentError(f"inputs: {self.grid!r} describes {len(grids)} pictures, the prompt holds more")
            frames, height, width = (int(n) for n in grids[image])
            return frames, height // merge, width // merge

        return [
            ImageLayout(tuple(Part(frame, WHOLE) for frame in run.reshape(shape(image))))
            for image, run in prompt.divide(lambda image: math.prod(shape(image)))
        ]
