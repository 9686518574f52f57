"""Rules for pictures that are cut into tiles, with a small view of the whole last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import ArgumentError
from .image import WHOLE, ImageLayout, Part, Size
from .prompt import Prompt
from .rule import Layout, mosaic


@dataclass(frozen=True)
class TilesWithOverview(Layout):
    """rows × columns tiles, each between marker tokens, then the whole picture as a last tile: Idefics3, SmolVLM.

    A row of tiles ends with a newline token, the overview is followed by the marker that opens every tile, and all
    overviews carry the same tag, so rows and pictures can be told apart without the tokenizer. Processor outputs "rows"
    and "cols" (nested per sample), where present, are used instead.

    Attributes:
        image_size, patch_size: configuration attributes, in pixels.
        merge: configuration attribute, patches per side of a token.
    """

    image_size: str = "vision_config.image_size"
    patch_size: str = "vision_config.patch_size"
    merge: str = "scale_factor"

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        side = prompt.side(self.image_size) // prompt.side(self.patch_size) // int(prompt.number(self.merge))
        runs = prompt.runs()
        for run in runs:
            if len(run) != side * side:
                raise ArgumentError(f"inputs: a tile has {side * side} tokens, the prompt holds a run of {len(run)}")
        found, start = [], 0
        for rows, across in self._arrangements(prompt, runs):
            stop = start + rows * across + 1
            if stop > len(runs):
                raise ArgumentError(
                    f"inputs: the pictures' tiles up to this one are {stop}, tokens came for {len(runs)}"
                )
            tiles = np.stack(runs[start:stop]).reshape(-1, side, side)
            overview = Part(tiles[-1], WHOLE)
            found.append(
                ImageLayout((Part(mosaic(tiles[:-1], rows, across), WHOLE), overview) if rows else (overview,))
            )
            start = stop
        if start != len(runs):
            raise ArgumentError(f"inputs: the pictures take {start} tiles, the prompt holds {len(runs)}")
        return found

    def _arrangements(self, prompt: Prompt, runs: list[np.ndarray]) -> list[Size]:
        if prompt.inputs.get("rows") is not None and prompt.inputs.get("cols") is not None:
            rows, across = prompt.inputs["rows"][prompt.sample], prompt.inputs["cols"][prompt.sample]
            return [(int(r), int(c)) for r, c in zip(rows, across, strict=True)]
        if not runs:
            return []
        tokens = prompt.tokens[prompt.sample]
        if runs[-1][-1] + 1 >= len(tokens):
            raise ArgumentError("inputs: the prompt ends inside a picture, the marker token after its tiles is missing")
        marker = tokens[runs[-1][-1] + 1]
        overview_tag = self._tag(tokens, runs[-1][0], marker)
        arrangements, tiles, rows = [], 0, 0
        for run in runs:
            if self._tag(tokens, run[0], marker) == overview_tag:
                if rows and tiles % rows:
                    raise ArgumentError(f"inputs: {tiles} tiles of a picture do not fill {rows} rows")
                arrangements.append((rows, tiles // rows if rows else 0))
                tiles = rows = 0
                continue
            tiles += 1
            rows += int(tokens[run[-1] + 1] != marker)
        return arrangements

    @staticmethod
    def _tag(tokens: np.ndarray, start: int, marker: int) -> tuple[int, ...]:
        before = np.flatnonzero(tokens[:start] == marker)
        return tuple(tokens[before[-1] if len(before) else start : start].tolist())


@dataclass(frozen=True)
class TilesWithThumbnail(Layout):
    """rows × columns tiles and then a thumbnail, all in one run; a single tile has no thumbnail: InternVL.

    The arrangement is the one whose aspect is nearest the picture's. Where the picture's size is unknown, it is the one
    whose tiles, put together, look most like the thumbnail.

    Attributes:
        image_size, patch_size: configuration attributes, in pixels.
        ratio: configuration attribute, tokens per patch along one side (pixel shuffle, 0.5).
        pixels: processor output (tiles of the batch, channels, height, width).
    """

    image_size: str = "vision_config.image_size"
    patch_size: str = "vision_config.patch_size"
    ratio: str = "downsample_ratio"
    pixels: str = "pixel_values"

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        side = int(prompt.side(self.image_size) // prompt.side(self.patch_size) * prompt.number(self.ratio))
        seen = sum(len(columns) for columns in prompt.image_columns[: prompt.sample]) // (side * side)
        found = []
        for number, run in enumerate(prompt.runs()):
            if len(run) % (side * side):
                raise ArgumentError(f"inputs: a picture's {len(run)} image tokens are no whole tiles of {side * side}")
            tiles = run.reshape(-1, side, side)
            if len(tiles) == 1:
                found.append(ImageLayout((Part(tiles[0], WHOLE),)))
            else:
                rows, across = self._arrangement(prompt, number, seen, len(tiles) - 1)
                found.append(ImageLayout((Part(mosaic(tiles[:-1], rows, across), WHOLE), Part(tiles[-1], WHOLE))))
            seen += len(tiles)
        return found

    def _arrangement(self, prompt: Prompt, image: int, first_tile: int, tiles: int) -> Size:
        candidates = [(tiles // across, across) for across in range(1, tiles + 1) if tiles % across == 0]
        size = prompt.size(image)
        if size is not None:
            return min(candidates, key=lambda grid: abs(size[1] / size[0] - grid[1] / grid[0]))
        pixels = prompt.required(self.pixels)[first_tile : first_tile + tiles + 1]
        return likeliest(pixels[:-1], pixels[-1], candidates)


def likeliest(tiles: np.ndarray, whole: np.ndarray, candidates: Sequence[Size]) -> Size:
    """The (rows, columns) arrangement of tiles (n, channels, h, w) that looks most like the whole (channels, h, w)."""

    def shrink(picture: np.ndarray) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(picture)).float(), 16)

    def distance(grid: Size) -> float:
        joined = np.stack([mosaic(tiles[:, channel], *grid) for channel in range(tiles.shape[1])])
        return float((shrink(joined) - shrink(whole)).square().sum())

    return min(candidates, key=distance)
