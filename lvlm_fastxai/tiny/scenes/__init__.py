"""Scenes of one to four painted objects, questions about them, and the pixels that decide each answer.

Everything follows from an integer seed: the same seed gives the same picture and, with the same state of the
generator, the same questions. The seeds are split into ranges (`TRAIN_SEEDS`, `VALIDATION_SEEDS`, `HELD_OUT_SEEDS`),
so that training never sees a held-out picture.

Example:
    >>> import numpy as np
    >>> from lvlm_fastxai.tiny import scenes
    >>> scene = scenes.generate_scene(7)
    >>> questions = scenes.generate_questions(scene, np.random.default_rng(7))
    >>> questions[0].kind, questions[0].mask.shape
    ('color', (192, 192))
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from .drawing import generate_scene
from .questions import ask, generate_questions
from .scene import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    DIFFICULTIES,
    HELD_OUT_SEEDS,
    KINDS,
    SHAPES,
    SIZES,
    TEXTURES,
    TRAIN_SEEDS,
    VALIDATION_SEEDS,
    Question,
    Scene,
    SceneObject,
)

__all__ = [
    "BACKGROUNDS",
    "CANVAS",
    "COLORS",
    "DIFFICULTIES",
    "HELD_OUT_SEEDS",
    "KINDS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "TRAIN_SEEDS",
    "VALIDATION_SEEDS",
    "Question",
    "Scene",
    "SceneObject",
    "ask",
    "generate_questions",
    "generate_scene",
    "held_out",
    "validation",
]


def held_out(n: int, seed: int = 0) -> Iterator[tuple[Image.Image, Question]]:
    """Give ``n`` pictures with one question each, the kinds in turn, out of `HELD_OUT_SEEDS`.

    ``seed`` (0 to 999) picks a run of scenes that no other ``seed`` shares as long as n stays below about 500 000.
    """
    yield from _question_stream(n, HELD_OUT_SEEDS.start + seed * 1_000_000)


def validation(n: int, seed: int = 0) -> Iterator[tuple[Image.Image, Question]]:
    """Like `held_out`, out of `VALIDATION_SEEDS` (``seed`` 0 to 99): for decisions made during training."""
    yield from _question_stream(n, VALIDATION_SEEDS.start + seed * 1_000_000)


def _question_stream(n: int, first_seed: int) -> Iterator[tuple[Image.Image, Question]]:
    scene_seed = first_seed
    for index in range(n):
        kind = KINDS[index % len(KINDS)]
        question = None
        while question is None:
            scene = generate_scene(scene_seed)
            question = ask(scene, kind, np.random.default_rng([scene_seed, 1]))
            scene_seed += 1
        yield scene.image, question
