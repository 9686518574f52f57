"""What a scene is: its words, its objects, its picture, and a question about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

CANVAS = 192
"""Side of a generated picture, in pixels."""

SHAPES = ("circle", "rectangle", "triangle", "diamond", "star", "cross")
# The first eight are easy-VQA's colours with its names, so that one vocabulary serves both data sets.
COLORS = {
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "red": (240, 15, 15),
    "blue": (15, 30, 240),
    "green": (15, 215, 30),
    "yellow": (250, 240, 15),
    "teal": (0, 130, 130),
    "brown": (160, 50, 42),
    "purple": (160, 45, 215),
    "orange": (255, 140, 0),
}
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "large")
BACKGROUNDS = ("plain", "gradient", "noise", "texture")
DIFFICULTIES = ("plain", "tiny", "occluded", "low contrast")
KINDS = (
    "color",
    "shape",
    "texture",
    "size",
    "exists",
    "count",
    "relation",
    "comparison",
    "position",
    "description",
)

TRAIN_SEEDS = range(500_000_000)
VALIDATION_SEEDS = range(500_000_000, 600_000_000)
HELD_OUT_SEEDS = range(1_000_000_000, 2_000_000_000)


@dataclass(frozen=True)
class SceneObject:
    """One painted object.

    Attributes:
        shape, color, texture, size: words out of `SHAPES`, `COLORS`, `TEXTURES`, `SIZES`.
        center: (x, y) in pixels, x to the right and y downwards.
        radius: radius in pixels of the circle that the outline is inscribed in.
        mask: (H, W) bool, the pixels of the object that are visible in the picture.
    """

    shape: str
    color: str
    texture: str
    size: str
    center: tuple[float, float]
    radius: float
    mask: np.ndarray

    def attribute(self, name: str) -> str:
        """The word for ``name``, one of "size", "color", "texture", "shape"."""
        return getattr(self, name)

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Size, colour, texture and shape, in the order a description names them."""
        return self.size, self.color, self.texture, self.shape


@dataclass(frozen=True)
class Scene:
    """A picture (RGB, `CANVAS` pixels square) with what is in it.

    Attributes:
        image: the picture.
        objects: what was painted, first to last (a later object may cover an earlier one).
        seed: the seed that gives this scene again.
        background: one of `BACKGROUNDS`.
        difficulty: one of `DIFFICULTIES`.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    seed: int
    background: str
    difficulty: str


@dataclass(frozen=True)
class Question:
    """A question with its one right answer and the pixels that decide it.

    Attributes:
        text: the question in lower-case words.
        answer: the answer; compared word for word.
        kind: one of `KINDS`.
        mask: (H, W) bool, the visible pixels of the objects that decide the answer. False everywhere where the answer
            rests on an absence ("is there a red star?" answered "no", "how many ...?" answered "0").
        word_masks: for a description one (H, W) bool mask per word of the answer, the object the word speaks of (both
            objects for a relation); otherwise None.
    """

    text: str
    answer: str
    kind: str
    mask: np.ndarray
    word_masks: tuple[np.ndarray, ...] | None = None
