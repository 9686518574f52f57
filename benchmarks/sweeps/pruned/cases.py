"""What the pruned sweep is measured on: sequences of an exact length, and the logits explained in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.decoders import Target
from .texts import Question, Reader, Text


@dataclass(frozen=True)
class Case:
    """One sequence: what it is ("prose", "code", "answer", "picture"), the model's inputs, and what is explained."""

    name: str
    kind: str
    inputs: Mapping[str, Tensor]
    targets: list[Target]

    @property
    def columns(self) -> int:
        """S."""
        return self.inputs["input_ids"].shape[1]


def ordinary(reader: Reader, texts: Mapping[str, Text], columns: int, count: int) -> list[Case]:
    """Make a case of each text, with ``count`` next-token targets.

    They are the tokens that follow at the last row and at rows spread over the sixteenth of the text before it.
    """
    return [ordinary_case(reader, name, text, columns, count) for name, text in texts.items()]


def ordinary_case(reader: Reader, name: str, text: Text, columns: int, count: int) -> Case:
    """Make one of :func:`ordinary`'s cases."""
    tokens = reader.tokens(text.files, columns + 1)
    spread = max(1, columns // 16 // count)
    rows = [columns - 1 - spread * number for number in range(count)]
    inputs = {"input_ids": torch.tensor([tokens[:columns]])}
    return Case(name, text.kind, inputs, [(0, row, tokens[row + 1]) for row in rows])


def greedy(count: int) -> dict[str, Any]:
    """Return the settings of `generate` for exactly ``count`` tokens."""
    return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}


def answers(model: Any, reader: Reader, questions: Mapping[str, Question], columns: int, count: int = 1) -> list[Case]:
    """Ask each question; its case explains the first ``count`` tokens of the answer.

    Raises:
        ValueError: ``columns`` leaves no room for an excerpt, or the question's files are too short for it.
    """
    return [answer(model, reader, name, question, columns, count) for name, question in questions.items()]


def answer(model: Any, reader: Reader, name: str, question: Question, columns: int, count: int) -> Case:
    """Make one of :func:`answers`' cases, a sequence as long as the last of the explained tokens needs."""
    mark = "\x00"
    chat = [{"role": "user", "content": f"{mark}\n\n{question.question}"}]
    tokenizer = reader.tokenizer
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + question.lead
    head, tail = (tokenizer(part)["input_ids"] for part in prompt.split(mark))
    length = columns - (count - 1)
    room = length - len(head) - len(tail)
    if room < 1:
        raise ValueError(f"{name}: the question alone takes {len(head) + len(tail)} of {columns} columns")
    ids = torch.tensor([head + reader.tokens(question.files, room) + tail])
    with torch.inference_mode():
        joined = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy(count))[0].tolist()
    targets = [(0, length - 1 + number, joined[length + number]) for number in range(count)]
    return Case(name, "answer", {"input_ids": torch.tensor([joined[:columns]])}, targets)


@dataclass(frozen=True)
class Picture:
    """A question about a picture to an LVLM: its answer's tokens, and what shows where they look."""

    case: Case
    question: Any
    layout: Any


def pictures(model: Any, processor: Any, stream: Iterator[tuple[Any, Any]]) -> Iterator[Picture]:
    """Choose, of (picture, question) pairs, those whose question rests on visible evidence and gets an answer."""
    from lvlm_fastxai.prompting.answering import Answerer

    answerer = Answerer(model, processor)
    for image, question in stream:
        prompt = answerer.encode([image], [question.text])
        (answered,) = answerer.answer(prompt, 24)
        if not answered or not question.mask.any():
            continue
        ((layout,),) = answerer.image_layouts(prompt, [[image]])
        start = prompt["input_ids"].shape[1]
        inputs = answerer.accepted(answerer.join(prompt, [answered]))
        targets = [(0, start + place - 1, token) for place, token in enumerate(answered)]
        yield Picture(Case(question.kind, "picture", inputs, targets), question, layout)
