"""What all layout rules share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from .image import ImageLayout, Size
from .prompt import Prompt


class Layout(ABC):
    """A rule; its fields name attributes of the configuration and processor outputs."""

    @abstractmethod
    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        """One layout per picture of the sample, in the order of the prompt."""


def tower_cells(prompt: Prompt, patches: int, strategy: str | None, class_token_towers: tuple[str, ...]) -> np.ndarray:
    """Patch index of every token a vision tower hands over, -1 for its class token.

    The strategy "default" drops the first token whatever it is: with a tower that has no class token this is a patch.
    """
    has_class_token = prompt.number("vision_config").model_type in class_token_towers
    cells = np.arange(-1 if has_class_token else 0, patches)
    return cells[1:] if strategy is not None and prompt.number(strategy) == "default" else cells


def grid_of(columns: np.ndarray, cells: np.ndarray, shape: Size) -> np.ndarray:
    grid = np.full(shape[0] * shape[1], -1, dtype=np.int64)
    grid[cells[cells >= 0]] = columns[cells >= 0]
    return grid.reshape(shape)


def mosaic(tiles: np.ndarray, rows: int, across: int) -> np.ndarray:
    """(rows·across, h, w) tiles, left to right and then down, as one (rows·h, across·w) array."""
    _, height, width = tiles.shape
    return tiles.reshape(rows, across, height, width).swapaxes(1, 2).reshape(rows * height, across * width)
