"""Deletion and insertion: the answer's probability while cells of the picture go, or come, in a map's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ..errors import ArgumentError
from ..prompting.answering import Answerer, batched
from .metrics import area_under_curve

FRACTIONS = (0.0, 0.03, 0.07, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0)
FILLS = ("mean", "blur")
# Of the picture's longer side: wide enough that no object's outline survives.
_BLUR_RADIUS = 0.15


@dataclass(frozen=True)
class Curves:
    """Probability of the answer at each of ``fractions`` of the cells deleted, and inserted; each (len(fractions),)."""

    deletion: NDArray[np.float64]
    insertion: NDArray[np.float64]

    @property
    def deletion_area(self) -> float:
        """Area under the deletion curve; lower is better."""
        return area_under_curve(FRACTIONS, self.deletion)

    @property
    def insertion_area(self) -> float:
        """Area under the insertion curve; higher is better."""
        return area_under_curve(FRACTIONS, self.insertion)


def cell_order(relevancy: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.intp]:
    """Order the flat indices of the cells of an (h, w) map, most relevant first, equal ones in random order."""
    flat = relevancy.ravel()
    return np.lexsort((rng.random(flat.size), -flat))


def fill_picture(image: Image.Image, fill: str) -> NDArray[np.uint8]:
    """Make what takes the place of deleted cells, (H, W, 3): the picture's mean colour, or the picture blurred.

    Raises:
        ArgumentError: an unknown fill.
    """
    pixels = np.asarray(image.convert("RGB"))
    if fill == "mean":
        return np.broadcast_to(pixels.mean((0, 1)).round().astype(np.uint8), pixels.shape)
    if fill == "blur":
        return np.asarray(image.convert("RGB").filter(ImageFilter.GaussianBlur(_BLUR_RADIUS * max(image.size))))
    raise ArgumentError(f"fill: expected one of {', '.join(FILLS)}, got {fill!r}")


def cell_of_pixel(
    size: tuple[int, int], shape: tuple[int, int], box: tuple[float, float, float, float]
) -> NDArray[np.intp]:
    """Find the (H, W) flat index of the grid cell that each pixel's centre lies in; −1 outside the grid.

    Args:
        size: (H, W) of the picture.
        shape: (h, w) of the grid.
        box: (left, top, right, bottom) of the grid in shares of the picture.
    """
    left, top, right, bottom = box
    row = np.floor(((np.arange(size[0]) + 0.5) / size[0] - top) / (bottom - top) * shape[0]).astype(np.intp)
    column = np.floor(((np.arange(size[1]) + 0.5) / size[1] - left) / (right - left) * shape[1]).astype(np.intp)
    inside = ((row >= 0) & (row < shape[0]))[:, None] & ((column >= 0) & (column < shape[1]))
    return np.where(inside, row[:, None] * shape[1] + column, -1)


def answer_probabilities(
    answerer: Answerer, images: Sequence[Image.Image], question: str, answer: Sequence[int], *, batch: int = 48
) -> NDArray[np.float64]:
    """Compute the (n,) geometric mean of the probabilities of the answer's tokens, of n pictures."""
    prompt = answerer.encode(images[:1], [question])
    joined = answerer.join(prompt, [list(answer)])
    start, count = prompt["input_ids"].shape[1], len(answer)
    token = torch.tensor(answer, device=answerer.model.device)[None, :, None]
    results = []
    for part in batched(range(len(images)), batch):
        pictures = answerer.encode_images([images[index] for index in part])
        # Whatever is not made from the picture belongs to the text, which all of them share.
        text = {name: value.expand(len(part), -1) for name, value in joined.items() if name not in pictures}
        with torch.inference_mode():
            logits = answerer.model(**answerer.accepted({**text, **pictures})).logits
            log_probability = logits[:, start - 1 : start - 1 + count].float().log_softmax(-1)
        chosen = log_probability.gather(2, token.expand(len(part), -1, -1))[..., 0]
        results.append(chosen.mean(1).exp().double().cpu().numpy())
    return np.concatenate(results)


def deletion_insertion(
    answerer: Answerer,
    image: Image.Image,
    question: str,
    answer: Sequence[int],
    maps: Mapping[str, NDArray[np.float64]],
    box: tuple[float, float, float, float],
    *,
    fill: str = "mean",
    seed: int = 0,
) -> dict[str, Curves]:
    """Draw both curves of several maps of one answer; they share one run of batched forward passes.

    Args:
        answerer: model and processor.
        image, question, answer: what was answered, and the answer's token ids.
        maps: (h, w) per method, all on one grid.
        box: of the grid, in shares of the picture.
        fill: what replaces a cell, "mean" colour or "blur".
        seed: of the order of equal cells.

    Returns:
        Curves by method, at ``FRACTIONS`` of the cells (rounded to whole ones). All methods share both ends: the
        picture as it is, and with every cell replaced.
    """
    pixels, replaced = np.asarray(image.convert("RGB")), fill_picture(image, fill)
    shape = next(iter(maps.values())).shape
    cells = cell_of_pixel(pixels.shape[:2], (shape[0], shape[1]), box)
    every = cells >= 0
    variants = [pixels, np.where(every[..., None], replaced, pixels)]
    total = shape[0] * shape[1]
    for relevancy in maps.values():
        order = cell_order(relevancy, np.random.default_rng(seed))
        rank = np.empty(total, dtype=np.intp)
        rank[order] = np.arange(total)
        rank_of_pixel = np.where(every, rank[cells], total)
        for fraction in FRACTIONS[1:-1]:
            first = (rank_of_pixel < round(fraction * total))[..., None]
            variants += [np.where(first, replaced, pixels), np.where(first | ~every[..., None], pixels, replaced)]
    # Maps that agree on their highest cells ask for the same pictures.
    keys = [variant.tobytes() for variant in variants]
    distinct = dict(zip(keys, variants, strict=True))
    number = {key: place for place, key in enumerate(distinct)}
    images = [Image.fromarray(variant) for variant in distinct.values()]
    probability = answer_probabilities(answerer, images, question, answer)[[number[key] for key in keys]]
    whole, blank, inner = probability[:1], probability[1:2], probability[2:].reshape(len(maps), -1, 2)
    return {
        method: Curves(
            np.concatenate([whole, steps[:, 0], blank]),
            np.concatenate([blank, steps[:, 1], whole]),
        )
        for method, steps in zip(maps, inner, strict=True)
    }
