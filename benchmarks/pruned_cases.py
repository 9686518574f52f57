"""What the pruned sweep is measured on: sequences of an exact length, and the logits explained in them.

Texts and questions are files of this repository, so that nothing has to be downloaded and a commit names them exactly.
What the error estimate is calibrated on and what it is judged by share no file, no length and no picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .machine import ROOT

Target = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """One sequence: what it is ("prose", "code", "answer", "picture"), the model's inputs, and what is explained."""

    name: str
    kind: str
    inputs: Mapping[str, Tensor]
    targets: list[Target]

    @property
    def columns(self) -> int:
        return self.inputs["input_ids"].shape[1]


@dataclass(frozen=True)
class Text:
    """Files read one after the other; ordinary next-token targets are taken inside."""

    kind: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about an excerpt, and how its answer begins; the token that the model says next is explained."""

    files: tuple[str, ...]
    question: str
    lead: str = ""


_DOCUMENTS = ("docs/evaluation.md", "docs/methods.md", "docs/troubleshooting.md", "docs/shipped-lvlm.md", "README.md")
_ENGINE = tuple(f"lvlm_fastxai/{name}.py" for name in ("sweep", "attention", "explainer", "relevancy", "targets"))
_EVALUATION = tuple(
    f"lvlm_fastxai/evaluate/{name}.py" for name in ("evaluation", "scores", "metrics", "curves", "output", "plot")
)

TEXTS = {
    "documentation": Text("prose", (*_DOCUMENTS, "LICENSE")),
    "engine": Text("code", _ENGINE),
    "licence": Text("prose", ("LICENSE", *_DOCUMENTS)),
    "evaluation": Text("code", _EVALUATION),
}
QUESTIONS = {
    "licence's name": Question(
        ("LICENSE", *_DOCUMENTS), "What is the name of this license?", "The name of this license is the"
    ),
    "code's language": Question(_ENGINE, "Which programming language is this?", "This is written in"),
    "subject": Question(_DOCUMENTS[1:] + _DOCUMENTS[:1], "What is this text about?", "This text is about"),
}
SUMMARY = Question(("LICENSE", *_DOCUMENTS), "Summarize this text in one sentence.")

_HOUSE = ("docs/architecture.md", "docs/extending.md", "CHANGELOG.md")
_KERNEL = ("csrc/cpu/relevancy_product_kernel.cpp",)
_ORACLE = ("tests/oracle.py", "tests/test_oracles.py")
CALIBRATION_TEXTS = {
    "house": Text("prose", _HOUSE),
    "extending": Text("prose", _HOUSE[1:] + _HOUSE[:1]),
    "changes": Text("prose", _HOUSE[2:] + _HOUSE[:2]),
    "scenes": Text("code", ("lvlm_fastxai/tiny/scenes.py",)),
    "layouts": Text("code", ("lvlm_fastxai/families/_layouts.py",)),
    "kernel": Text("code", _KERNEL),
    "oracle": Text("code", _ORACLE),
}
CALIBRATION_QUESTIONS = {
    "build": Question(_HOUSE, "What is built here, and with what?", "It is built with"),
    "drawing": Question(("lvlm_fastxai/tiny/scenes.py",), "What does this program draw?", "The program draws"),
    "extension": Question(_HOUSE[1:] + _HOUSE[:1], "How is a method added?"),
    "news": Question(_HOUSE[2:] + _HOUSE[:2], "What was added?", "The most important addition is"),
    "processor": Question(_KERNEL, "What kind of processor is this code for?", "This code is for"),
    "checking": Question(_ORACLE, "What do these tests check?", "These tests check that the"),
}


def tokens_of(tokenizer: Any, files: tuple[str, ...], count: int) -> list[int]:
    """The first ``count`` tokens of the files; rows of tables in Markdown, which are no prose, are left out.

    Raises:
        ValueError: the files are too short.
    """
    tokens: list[int] = []
    for file in files:
        lines = (ROOT / Path(file)).read_text(encoding="utf-8").splitlines()
        if file.endswith(".md"):
            lines = [line for line in lines if not line.startswith("|")]
        tokens += tokenizer("\n".join(lines) + "\n\n", verbose=False)["input_ids"]
        if len(tokens) >= count:
            return tokens[:count]
    raise ValueError(f"{', '.join(files)}: {len(tokens)} tokens, {count} are needed; choose a smaller length")


def ordinary(tokenizer: Any, name: str, text: Text, columns: int, count: int) -> Case:
    """``count`` targets: the tokens that follow at the last row and at rows spread over the sixteenth before it."""
    tokens = tokens_of(tokenizer, text.files, columns + 1)
    spread = max(1, columns // 16 // count)
    rows = [columns - 1 - spread * number for number in range(count)]
    inputs = {"input_ids": torch.tensor([tokens[:columns]])}
    return Case(name, text.kind, inputs, [(0, row, tokens[row + 1]) for row in rows])


def greedy(count: int) -> dict[str, Any]:
    """Settings of `generate` for exactly ``count`` tokens."""
    return {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}


def answer(model: Any, tokenizer: Any, name: str, question: Question, columns: int, count: int = 1) -> Case:
    """The first ``count`` tokens that the model answers, in a sequence as long as the last of them needs.

    Raises:
        ValueError: ``columns`` leaves no room for an excerpt, or the question's files are too short for it.
    """
    mark = "\x00"
    chat = [{"role": "user", "content": f"{mark}\n\n{question.question}"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + question.lead
    head, tail = (tokenizer(part)["input_ids"] for part in prompt.split(mark))
    length = columns - (count - 1)
    room = length - len(head) - len(tail)
    if room < 1:
        raise ValueError(f"{name}: the question alone takes {len(head) + len(tail)} of {columns} columns")
    excerpt = tokens_of(tokenizer, question.files, room)
    ids = torch.tensor([head + excerpt + tail])
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
    """Pictures whose question rests on visible evidence and gets an answer, out of (picture, question) pairs."""
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
