"""The questions: held-out scenes, everything asked about them, and the pixels that decide each answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from ..tiny import scenes

SCENES_PER_SEED = 1_000_000
SEEDS = len(scenes.HELD_OUT_SEEDS) // SCENES_PER_SEED


@dataclass(frozen=True)
class Case:
    """One question about one held-out scene.

    Attributes:
        scene: the picture with its objects; the same object for every question about it.
        question: text, right answer, kind and evidence mask.
    """

    scene: scenes.Scene
    question: scenes.Question

    @property
    def has_evidence(self) -> bool:
        """False where the answer rests on an absence: no pixel decides it, so no map can be scored against it."""
        return bool(self.question.mask.any())

    @property
    def objects_mask(self) -> NDArray[np.bool_]:
        """(H, W) bool, the visible pixels of every object of the scene."""
        mask = np.zeros_like(self.question.mask)
        for item in self.scene.objects:
            mask |= item.mask
        return mask

    @property
    def has_distractors(self) -> bool:
        """True where the picture shows an object that does not decide the answer."""
        return bool((self.objects_mask & ~self.question.mask).any())


def held_out_cases(num_scenes: int, seed: int) -> list[Case]:
    """Ask one question of every kind that each of ``num_scenes`` held-out scenes allows.

    Args:
        num_scenes: 1 … 1 000 000.
        seed: 0 … 999, a run of scenes that no other seed shares and training never saw.

    Raises:
        ArgumentError: an argument outside these.
    """
    if not 1 <= num_scenes <= SCENES_PER_SEED:
        raise ArgumentError(f"scenes: expected 1 … {SCENES_PER_SEED}, got {num_scenes}")
    if not 0 <= seed < SEEDS:
        raise ArgumentError(f"seed: expected 0 … {SEEDS - 1}, got {seed}")
    first = scenes.HELD_OUT_SEEDS.start + seed * SCENES_PER_SEED
    cases = []
    for scene_seed in range(first, first + num_scenes):
        scene = scenes.generate_scene(scene_seed)
        questions = scenes.generate_questions(scene, np.random.default_rng([scene_seed, 1]))
        cases += [Case(scene, question) for question in questions]
    return cases


def held_out_descriptions(num_scenes: int, seed: int) -> list[Case]:
    """Choose the descriptions among `held_out_cases`: answers of several words, each with a mask of its own."""
    return [case for case in held_out_cases(num_scenes, seed) if case.question.word_masks is not None]
