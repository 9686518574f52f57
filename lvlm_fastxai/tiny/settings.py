"""What a training run of the shipped LVLM is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """The numbers of a run; ``python -m lvlm_fastxai.tiny.train --help`` prints the meaning of each."""

    seed: int = _setting(0, "draws the scenes, the first weights and the order of everything")
    scenes: int = _setting(60_000, "training scenes to render")
    vision_steps: int = _setting(700, "steps of the first stage, in which the vision tower learns patch labels")
    steps: int = _setting(8_000, "steps of the second stage, in which the whole model learns to answer")
    vision_batch: int = _setting(48, "pictures per step of the first stage")
    batch: int = _setting(12, "pictures per step of the second stage")
    parts: int = _setting(4, "pieces a batch is cut into for the threads")
    questions: int = _setting(12, "questions per picture and step, at most")
    easy_vqa_share: float = _setting(0.25, "share of easy-VQA pictures in a batch")
    vision_rate: float = _setting(2e-3, "peak learning rate of the first stage")
    matrix_rate: float = _setting(4e-3, "peak learning rate of the second stage's matrices (Muon)")
    rate: float = _setting(1.5e-3, "peak learning rate of everything else in the second stage (AdamW)")
    auxiliary_weight: float = _setting(0.5, "weight of the patch labels in the second stage")
    phrase_weight: float = _setting(0.5, "weight of the phrase read-outs in the second stage")
    comparisons: int = _setting(6, "comparison questions to ask of each picture beyond those of the rendered scenes")
    decay_share: float = _setting(0.35, "share of a stage in which the learning rate falls to zero")
    validate_every: int = _setting(200, "steps between validations and checkpoints")
    validation_scenes: int = _setting(240, "scenes of a validation")
