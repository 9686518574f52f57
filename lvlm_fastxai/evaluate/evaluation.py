"""The evaluation from the first question to the summary."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, FastXAIError
from ..tiny import scenes
from . import CURVES, METHODS, SCENES
from .answering import Answerer, batched
from .bootstrap import ClusterBootstrap
from .cases import Case, held_out_cases
from .curves import FILLS, FRACTIONS, Curves, deletion_insertion
from .maps import compute_maps
from .scores import ScoreTable, map_scores

SCHEMA = "lvlm-fastxai/evaluation/1"

# stage, done, total
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What is evaluated.

    Attributes:
        scenes: number of held-out scenes; each is asked one question of every kind that it allows.
        seed: picks the scenes (see `held_out_cases`), the random maps, the questions that get curves, the resamples.
        methods: out of ``METHODS``.
        curves: number of questions that get deletion and insertion curves; 0 for none.
        fill: what replaces a cell in them, "mean" colour of the picture or "blur".
        max_new_tokens: longest answer.
        resamples: of the bootstrap.

    Raises:
        ArgumentError: an unknown method or fill, or a negative count.
    """

    scenes: int = SCENES
    seed: int = 0
    methods: tuple[str, ...] = METHODS
    curves: int = CURVES
    fill: str = "mean"
    max_new_tokens: int = 24
    resamples: int = 2000

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ArgumentError(
                f"methods: expected different names out of {', '.join(METHODS)}, "
                f"got {', '.join(self.methods) or 'none'}"
            )
        if self.fill not in FILLS:
            raise ArgumentError(f"fill: expected one of {', '.join(FILLS)}, got {self.fill!r}")
        for name, least in (("curves", 0), ("max_new_tokens", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: expected at least {least}, got {getattr(self, name)}")


@dataclass
class Scored:
    """A question with evidence and a non-empty answer, and what was found out about it."""

    case: Case
    tokens: list[int]
    answer: str
    curves: dict[str, Curves] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        """Whether the model's answer is the right one, word for word."""
        return self.answer == self.case.question.answer


@dataclass
class Evaluation:
    """What came out.

    Attributes:
        settings: what was asked for.
        accuracy: per kind and "overall", {"correct", "questions"}, over all questions.
        skipped: number of questions left out of the maps, by reason.
        questions: every scored question.
        summary: {"correct": …, "all": …, "words": …}, each as `ScoreTable.summary` returns; "words" are the words
            of rightly answered descriptions, each against the object it speaks of.
        curves: {method: {"deletion" or "insertion": {"mean", "low", "high"}}}, lists along ``FRACTIONS``.
        seconds: wall time per stage.
    """

    settings: Settings
    accuracy: dict[str, dict[str, int]]
    skipped: dict[str, int]
    questions: list[Scored]
    summary: dict[str, dict[str, Any]]
    curves: dict[str, dict[str, dict[str, list[float | None]]]]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single questions, ready for `json.dump`."""
        return {
            "schema": SCHEMA,
            "settings": asdict(self.settings),
            "accuracy": self.accuracy,
            "scored": {"questions": len(self.questions), "correct": sum(q.correct for q in self.questions)},
            "skipped": self.skipped,
            "summary": self.summary,
            "fractions": list(FRACTIONS),
            "curves": self.curves,
            "seconds": self.seconds,
        }


def evaluate(
    model: Any,
    processor: Any,
    settings: Settings | None = None,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> Evaluation:
    """Score the maps of several methods against the pixels that decide the answers.

    Args:
        model: a transformers image-text-to-text model; left as it was found.
        processor: its processor.
        settings: what to evaluate; the defaults when None.
        progress: called as ``progress(stage, done, total)`` with the stages "answering", "explaining" and "curves".

    Raises:
        ArgumentError: settings out of range, or a processor without a chat template.
        FastXAIError: no question could be scored.
    """
    settings = settings or Settings()
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[stage] = now - began
        began = now

    answerer = Answerer(model, processor)
    cases = held_out_cases(settings.scenes, settings.seed)
    answers = answer_cases(answerer, cases, settings.max_new_tokens, progress)
    lap("answering")
    questions = [
        Scored(case, tokens, answerer.decode(tokens))
        for case, tokens in zip(cases, answers, strict=True)
        if case.has_evidence and tokens
    ]
    if not questions:
        raise FastXAIError("no question could be scored: none has both evidence and an answer; raise --scenes")
    done = 0

    def explained(count: int) -> None:
        nonlocal done
        done += count
        progress("explaining", done, len(questions))

    maps, boxes = compute_maps(
        answerer,
        [q.case for q in questions],
        [q.tokens for q in questions],
        settings.methods,
        seed=settings.seed,
        progress=explained,
    )
    lap("explaining")
    for index, question in enumerate(questions):
        objects = question.case.objects_mask
        for method in settings.methods:
            question.scores[method] = map_scores(
                maps[method][index].mean(0), question.case.question.mask, boxes[index], objects
            )
    words = word_table(answerer, questions, maps, boxes)
    lap("scoring")
    chosen = curve_questions(questions, settings.curves, settings.seed)
    for number, index in enumerate(chosen):
        question = questions[index]
        question.curves = deletion_insertion(
            answerer,
            question.case.scene.image,
            question.case.question.text,
            question.tokens,
            {method: maps[method][index].mean(0) for method in settings.methods},
            boxes[index],
            fill=settings.fill,
            seed=settings.seed,
        )
        for method, own in question.curves.items():
            question.scores[method]["deletion"] = own.deletion_area
            question.scores[method]["insertion"] = own.insertion_area
        progress("curves", number + 1, len(chosen))
    lap("curves")
    table = question_table(questions, settings.methods)
    correct = np.array([q.correct for q in questions])
    spread = {"resamples": settings.resamples, "seed": settings.seed}
    summary = {
        "correct": table.summary(correct, **spread),
        "all": table.summary(np.ones(len(questions), dtype=bool), **spread),
        "words": words.summary(np.ones(len(words.scene), dtype=bool), **spread) if words else {},
    }
    curves = mean_curves([questions[index] for index in chosen], settings)
    lap("statistics")
    return Evaluation(
        settings,
        accuracy_by_kind(cases, [answerer.decode(tokens) for tokens in answers]),
        {
            "no evidence": sum(not case.has_evidence for case in cases),
            "empty answer": sum(case.has_evidence and not tokens for case, tokens in zip(cases, answers, strict=True)),
        },
        questions,
        summary,
        curves,
        seconds,
    )


def answer_cases(
    answerer: Answerer, cases: Sequence[Case], max_new_tokens: int, progress: Progress, *, batch: int = 32
) -> list[list[int]]:
    """The model's greedy answer to every question, as token ids."""
    answers: list[list[int]] = [[] for _ in cases]
    # Questions of one kind have answers of similar length: a batch generates until its longest is done.
    order = sorted(range(len(cases)), key=lambda index: (cases[index].question.kind, index))
    done = 0
    for part in batched(order, batch):
        inputs = answerer.encode(
            [cases[index].scene.image for index in part], [cases[index].question.text for index in part]
        )
        for index, tokens in zip(part, answerer.answer(inputs, max_new_tokens), strict=True):
            answers[index] = tokens
        done += len(part)
        progress("answering", done, len(cases))
    return answers


def accuracy_by_kind(cases: Sequence[Case], answers: Sequence[str]) -> dict[str, dict[str, int]]:
    """Right answers and questions, overall and per kind."""
    asked, right = Counter[str](), Counter[str]()
    for case, answer in zip(cases, answers, strict=True):
        for name in ("overall", case.question.kind):
            asked[name] += 1
            right[name] += answer == case.question.answer
    return {
        name: {"correct": right[name], "questions": asked[name]} for name in ("overall", *scenes.KINDS) if asked[name]
    }


def question_table(questions: Sequence[Scored], methods: Sequence[str]) -> ScoreTable:
    """One row per question, grouped by kind, by the number of objects in the scene and by its difficulty."""
    groups: dict[str, list[bool]] = {"overall": [True] * len(questions)}
    for kind in scenes.KINDS:
        groups[kind] = [q.case.question.kind == kind for q in questions]
    groups["no distractor"] = [not q.case.has_distractors for q in questions]
    groups["with distractors"] = [q.case.has_distractors for q in questions]
    groups["hard scenes"] = [q.case.scene.difficulty != "plain" for q in questions]
    return ScoreTable.collect(
        [q.case.scene.seed for q in questions],
        groups,
        {method: [q.scores[method] for q in questions] for method in methods},
    )


def word_table(
    answerer: Answerer,
    questions: Sequence[Scored],
    maps: dict[str, list[NDArray[np.float64]]],
    boxes: Sequence[tuple[float, float, float, float]],
) -> ScoreTable | None:
    """One row per answer word of the correctly answered descriptions, by the word's part in it; None without any."""
    scene: list[int] = []
    roles: list[str] = []
    several: list[bool] = []
    rows: dict[str, list[dict[str, float]]] = {method: [] for method in maps}
    for index, question in enumerate(questions):
        asked = question.case.question
        if asked.word_masks is None or not question.correct:
            continue
        owner = np.array(answerer.word_of_token(question.tokens))
        objects = question.case.objects_mask
        for place, (word, mask) in enumerate(zip(asked.answer.split(), asked.word_masks, strict=True)):
            if not (owner == place).any() or not mask.any():
                continue
            scene.append(question.case.scene.seed)
            roles.append(word_role(word))
            several.append(not np.array_equal(mask, asked.mask))
            for method in maps:
                own = maps[method][index][owner == place].mean(0)
                rows[method].append(map_scores(own, mask, boxes[index], objects))
    if not scene:
        return None
    groups: dict[str, list[bool]] = {"overall": [True] * len(roles)}
    groups |= {role: [r == role for r in roles] for role in (*WORD_ROLES, "relation", "article")}
    groups["one of two objects"] = several
    return ScoreTable.collect(scene, groups, rows)


WORD_ROLES = {"size": scenes.SIZES, "color": scenes.COLORS, "texture": scenes.TEXTURES, "shape": scenes.SHAPES}


def word_role(word: str) -> str:
    """What a word of a description says: "size", "color", "texture", "shape", "relation", or "article" for "a"."""
    role = next((role for role, words in WORD_ROLES.items() if word in words), "relation")
    return "article" if word == "a" else role


def curve_questions(questions: Sequence[Scored], count: int, seed: int) -> list[int]:
    """Indices of up to ``count`` correctly answered questions, drawn evenly over kinds and without replacement."""
    rng = np.random.default_rng([seed, 4])
    by_kind: dict[str, list[int]] = {}
    for index in rng.permutation(len(questions)).tolist():
        if questions[index].correct:
            by_kind.setdefault(questions[index].case.question.kind, []).append(index)
    chosen: list[int] = []
    while len(chosen) < count and any(by_kind.values()):
        for kind in scenes.KINDS:
            if by_kind.get(kind) and len(chosen) < count:
                chosen.append(by_kind[kind].pop())
    return sorted(chosen)


def mean_curves(questions: Sequence[Scored], settings: Settings) -> dict[str, dict[str, dict[str, list[float | None]]]]:
    """Mean curve and its 95 % interval at every fraction, per method."""
    if not questions:
        return {}
    bootstrap = ClusterBootstrap(
        np.array([q.case.scene.seed for q in questions]), resamples=settings.resamples, seed=settings.seed
    )
    result: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for method in settings.methods:
        result[method] = {}
        for name in ("deletion", "insertion"):
            heights = np.stack([getattr(q.curves[method], name) for q in questions])  # (n, fractions)
            steps = [bootstrap.mean(column) for column in heights.T]
            result[method][name] = {
                part: [None if np.isnan(getattr(step, field)) else getattr(step, field) for step in steps]
                for part, field in (("mean", "value"), ("low", "low"), ("high", "high"))
            }
    return result
