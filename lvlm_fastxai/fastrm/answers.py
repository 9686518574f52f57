"""Answers of a source's questions with their live maps: what a decision is made by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..prompting.answering import Answerer, batched, same_answer
from ..prompting.sources import Sample
from .head import FastRM
from .live import LiveMaps


@dataclass(frozen=True)
class LiveAnswer:
    """A model's answer, and what is known of it without anybody looking.

    Attributes:
        sample: the question.
        answer: the model's.
        right: whether it is the reference answer, white space and case aside; None without one.
        entropy: mean over the answer's tokens of their maps' entropies, in 0 … 1.
        probability: geometric mean of the tokens' probabilities.
        image_map: (h, w) fp32 in 0 … 1, mean over the tokens.
        region: (left, top, right, bottom) in pixels of the picture, where the map lies.
        tokens: their ids.
    """

    sample: Sample
    answer: str
    right: bool | None
    entropy: float
    probability: float
    image_map: NDArray[np.float32]
    region: tuple[float, float, float, float]
    tokens: list[int] = field(default_factory=list)

    @property
    def features(self) -> dict[str, float]:
        """What a policy of `lvlm_fastxai.review` can decide by, under the names of its list."""
        return {"entropy": self.entropy, "probability": self.probability}


def live_answers(
    model: Any,
    processor: Any,
    head: FastRM,
    samples: Sequence[Sample],
    *,
    batch: int = 16,
    max_new_tokens: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[LiveAnswer]:
    """Ask a model all questions, many at a time, with a head attached.

    Special tokens inside an answer count for nothing. An answer of nothing else is the empty text with entropy 1,
    probability 0 and a map of zeros: never accepted.

    Args:
        model: a transformers image-text-to-text model of a known family, in evaluation mode.
        processor: its processor, with a chat template.
        head: trained for the model.
        samples: n questions.
        batch: questions per pass.
        max_new_tokens: longest answer.
        progress: called as ``progress(done, total)``.

    Raises:
        ArgumentError: a picture cannot be read; a processor without chat template.
        ModelMismatchError: the head belongs to another model.
    """
    answerer = Answerer(model, processor)
    done = 0
    for part in batched(range(len(samples)), batch):
        asked = [samples[index] for index in part]
        pictures = [sample.picture() for sample in asked]
        inputs = answerer.encode(pictures, [sample.question for sample in asked])
        live = LiveMaps(
            head,
            model,
            inputs,
            image_sizes=[[(picture.height, picture.width)] for picture in pictures],
            image_processor=processor.image_processor,
        )
        with live:
            answers = answerer.answer(inputs, max_new_tokens, streamer=live)
        for row, (sample, picture, tokens) in enumerate(zip(asked, pictures, answers, strict=True)):
            layout = live.layouts(row)[0]
            # Special tokens are not explained, nor do they count.
            steps = [live.steps[place] for place in answerer.spoken(tokens)]
            text = answerer.decode(tokens)
            rows = torch.stack([step.row(row) for step in steps]).mean(0) if steps else torch.zeros(live.prompt_length)
            probability = [max(float(step.probabilities[row]), 1e-30) for step in steps]
            left, top, right, bottom = layout.box
            yield LiveAnswer(
                sample=sample,
                answer=text,
                right=None if sample.answer is None else same_answer(text, sample.answer),
                entropy=float(np.mean([step.entropy(row) for step in steps])) if steps else 1.0,
                probability=math.exp(float(np.mean(np.log(probability)))) if steps else 0.0,
                image_map=layout.read(rows).numpy(),
                region=(left * picture.width, top * picture.height, right * picture.width, bottom * picture.height),
                tokens=list(tokens),
            )
        done += len(part)
        if progress is not None:
            progress(done, len(samples))
