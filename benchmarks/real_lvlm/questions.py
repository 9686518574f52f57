"""Questions: as tokens, drawn by the weights of their kinds, and how many of their answer's tokens are wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from .packing import Block

# SmolLM2's own turns around a question and its answer.
BEFORE, BETWEEN, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"

# How often a question of a kind is asked, relative to the others that a picture has.
KIND_WEIGHTS = {
    "color": 3.0,
    "shape": 3.0,
    "texture": 2.0,
    "size": 2.0,
    "exists": 2.0,
    "position": 2.0,
    "count": 1.0,
    "relation": 0.7,
    "description": 3.0,
    "comparison": 0.3,
    "easy-vqa shape": 3.0,
    "easy-vqa color": 3.0,
    "easy-vqa yes/no": 1.0,
}


class Blocks:
    """Questions as tokens, each text tokenised once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.before: list[int] = tokenizer(BEFORE)["input_ids"]
        self._known: dict[str, list[int]] = {}

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text)["input_ids"]
        return self._known[text]

    def block(self, question: Any) -> Block:
        """Turn a question and its answer into tokens."""
        prompt = self._tokens(question.text + BETWEEN)
        return Block([*prompt, *self._tokens(question.answer + AFTER)], len(prompt))


def choose(questions: Sequence[Any], count: int, rng: numpy.random.Generator) -> list[Any]:
    """Draw ``count`` of a picture's questions (all where it has fewer) by the weights of their kinds."""
    weights = numpy.array([KIND_WEIGHTS[question.kind] for question in questions])
    # The largest of log-weight + Gumbel noise are a weighted draw without replacement.
    return [questions[n] for n in numpy.argsort(-(numpy.log(weights) + rng.gumbel(size=len(weights))))[:count]]


def choose_patches(labels: numpy.ndarray, count: int, rng: numpy.random.Generator) -> numpy.ndarray:
    """Draw (count,) ascending patches of one picture; an object's are five times as likely as the background's."""
    if count >= len(labels):
        return numpy.arange(len(labels))
    keys = rng.gumbel(size=len(labels)) + math.log(5) * (labels[:, 0] == 1)
    return numpy.sort(numpy.argsort(-keys)[:count])


def question_errors(logits: Tensor, targets: Tensor, question: Tensor) -> Tensor:
    """Count each answer's wrong tokens, (N,): with none of them greedy generation says it word for word."""
    wrong = (logits.argmax(-1) != targets).long()
    return torch.zeros(int(question.max()) + 1, dtype=torch.long).index_add_(0, question, wrong)
