"""Where one picture's tokens stand in the sequence, and how a relevancy row is read there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import ArgumentError

Box = tuple[float, float, float, float]
Size = tuple[int, int]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Part:
    """One grid of image tokens and the part of the picture it looks at.

    Attributes:
        columns: int64 array (h, w), the sequence column of each cell in the orientation of the original picture
            (row 0 is the top, column 0 the left); -1 where a cell has no token.
        box: (left, top, right, bottom) in shares of the original picture. It reaches outside 0..1 where the model saw
            padding around the picture, and covers less than 0..1 where the picture was cropped.
    """

    columns: np.ndarray
    box: Box

    @property
    def shape(self) -> Size:
        """(h, w) of the grid."""
        return self.columns.shape[0], self.columns.shape[1]


@dataclass(frozen=True)
class ImageLayout:
    """Where one picture's tokens stand in the sequence.

    Attributes:
        parts: the finest grid first, then coarser views of the same picture (overview, thumbnail, uncropped picture).
    """

    parts: tuple[Part, ...]

    @property
    def box(self) -> Box:
        """The part of the original picture under the grid that `read` returns."""
        return self.parts[0].box

    @property
    def shape(self) -> Size:
        """(h, w) of the grid that `read` returns."""
        return self.parts[0].shape

    def read(self, row: Tensor) -> Tensor:
        """Relevancy of every cell of the finest grid.

        Cells of coarser parts share their relevancy among the fine cells under them, by area; what lies outside the
        finest grid goes to the nearest cell, so the sum over the map equals the sum over all columns of the picture.

        Args:
            row: (S,) relevancy of every position, floating point.

        Returns:
            (h, w) tensor on `row`'s device, in its dtype.
        """
        if row.dim() != 1:
            raise ArgumentError(f"row: expected shape (S,), got {tuple(row.shape)}")
        finest = self.parts[0]
        total = _values(finest, row)
        for part in self.parts[1:]:
            down = _overlap(part.box[1::2], part.shape[0], finest.box[1::2], finest.shape[0])
            across = _overlap(part.box[0::2], part.shape[1], finest.box[0::2], finest.shape[1])
            down, across = down.to(row), across.to(row)
            total = total + down.T @ _values(part, row) @ across
        return total


def _values(part: Part, row: Tensor) -> Tensor:
    columns = torch.from_numpy(part.columns).to(row.device)
    return row[columns.clamp(min=0)].masked_fill(columns < 0, 0.0)


def _overlap(source: Sequence[float], sources: int, target: Sequence[float], targets: int) -> Tensor:
    """(sources, targets) shares of each interval of `source` that fall on those of `target`; every row sums to 1."""
    left = np.linspace(source[0], source[1], sources + 1)
    right = np.linspace(target[0], target[1], targets + 1)
    low = np.maximum(left[:-1, None], right[None, :-1])
    high = np.minimum(left[1:, None], right[None, 1:])
    share = np.clip(high - low, 0.0, None)
    for index in np.flatnonzero(share.sum(1) <= 1e-9 * (left[1] - left[0])):
        centre = (left[index] + left[index + 1]) / 2
        share[index] = 0.0
        share[index, np.abs((right[:-1] + right[1:]) / 2 - centre).argmin()] = 1.0
    return torch.from_numpy(share / share.sum(1, keepdims=True))
