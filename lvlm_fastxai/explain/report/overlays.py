"""Overlay pictures: the map of an answer or a token over the picture that it was asked about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..data import ExplainedImage, ExplanationData
from .colormap import OPACITY_FLOOR, colours, resample

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["overlay", "overlay_names", "write_overlays"]

# Overlays of small pictures are enlarged to this many pixels on the longer side.
OVERLAY_LEAST = 448


def overlay(
    image: ExplainedImage, image_map: NDArray[np.float32], *, opacity: float = 0.8, smooth: bool = True
) -> Image.Image:
    """Draw the picture with a map (h, w) over it, coloured from 0 to the map's own maximum.

    Args:
        image: the picture and the rectangle of it that the map covers.
        image_map: (h, w) raw relevancy.
        opacity: 0 … 1 at the maximum; less where the value is smaller.
        smooth: draw the grid smoothly (`colormap.resample`), or as cells.

    Returns:
        An RGB picture, enlarged if its longer side is under 448 pixels.
    """
    picture = image.picture.convert("RGB")
    factor = max(1.0, OVERLAY_LEAST / max(picture.size))
    size = (round(picture.width * factor), round(picture.height * factor))
    base = np.asarray(picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS))
    left, top, right, bottom = (round(edge * factor) for edge in image.region)
    values = np.clip(image_map / (image_map.max() or 1.0), 0.0, 1.0).astype(np.float32)
    drawn = resample(values, max(1, bottom - top), max(1, right - left), smooth=smooth)
    # A padding processor's rectangle reaches beyond the picture, a cropping one's stays inside.
    drawn = drawn[max(0, -top) : size[1] - top, max(0, -left) : size[0] - left]
    rows = slice(max(0, top), max(0, top) + drawn.shape[0])
    columns = slice(max(0, left), max(0, left) + drawn.shape[1])
    mixed = base.astype(np.float32)
    alpha = opacity * (OPACITY_FLOOR + (1 - OPACITY_FLOOR) * drawn)[..., None]
    mixed[rows, columns] = (1 - alpha) * mixed[rows, columns] + alpha * colours(drawn)
    return Image.fromarray(mixed.round().astype(np.uint8))


def overlay_names(tokens: Sequence[tuple[str, int]], images: int) -> list[list[str]]:
    """Name the overlay pictures of each image: the whole answer's, then one per token.

    Args:
        tokens: text and id of each explained token.
        images: how many there are.

    Example:
        >>> overlay_names([(" red", 7), ("?", 9)], 1)
        [['answer.png', 'tokens/00_red.png', 'tokens/01_id9.png']]
    """
    suffixes = [f"_image{index + 1}" if index else "" for index in range(images)]
    slugs = [re.sub(r"[^\w-]+", "", text.strip())[:24] or f"id{token_id}" for text, token_id in tokens]
    return [
        [f"answer{suffix}.png", *(f"tokens/{number:02d}_{slug}{suffix}.png" for number, slug in enumerate(slugs))]
        for suffix in suffixes
    ]


def write_overlays(explanation: ExplanationData, folder: Path) -> None:
    """Write `answer.png` and `tokens/NN_text.png` (with `_imageK` for further images); nothing where there is no map.

    Args:
        folder: an empty one.
    """
    images, maps = explanation.images, explanation.image_maps
    if not images or not maps:
        return
    (folder / "tokens").mkdir()
    names = overlay_names([(token.text, token.token_id) for token in explanation.tokens], len(images))
    for index, (image, whole, of_answer, of_tokens) in enumerate(
        (image, whole, first, rest) for image, whole, (first, *rest) in zip(images, maps, names, strict=True)
    ):
        overlay(image, whole).save(folder / of_answer)
        for token, name in zip(explanation.tokens, of_tokens, strict=True):
            overlay(image, token.image_maps[index]).save(folder / name)
