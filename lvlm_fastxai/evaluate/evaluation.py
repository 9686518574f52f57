"""The evaluation from the first question to the summary."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError, FastXAIError
from ..prompting.answering import Answerer, batched
from ..tiny import scenes
from .bootstrap import ClusterBootstrap
from .cases import Case, held_out_cases, held_out_descriptions
from .curves import FILLS, FRACTIONS, Curves, deletion_insertion
from .defaults import CURVES, DESCRIPTIONS, METHODS, SCENES
from .maps import ABLATED, ABLATIONS, AnswerMaps, compute_maps
from .metrics import l1_distance
from .scores import ScoreTable, map_scores

SCHEMA = "lvlm-fastxai/evaluation/2"

# stage, done, total
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What is evaluated.

    Attributes:
        scenes: number of held-out scenes; each is asked one question of every kind that it allows.
        seed: picks the scenes (see `held_out_cases`), the random maps, the questions that get curves, the resamples.
        methods: out of ``METHODS``.
        curves: number of questions that get deletion and insertion curves; 0 for none. Half as many descriptions get
            them.
        fill: what replaces a cell in them, "mean" colour of the picture or "blur".
        descriptions: number of held-out scenes that are asked for a description, for the maps of whole answers; 0 for
            none. The first ``scenes`` of them are the same.
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
    descriptions: int = DESCRIPTIONS
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
        for name, least in (("curves", 0), ("descriptions", 0), ("max_new_tokens", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    @property
    def whole_answer_variants(self) -> tuple[str, ...]:
        """The methods, and the ablations of glimpse if it is one of them."""
        return (*self.methods, *(ABLATIONS if ABLATED in self.methods else ()))


@dataclass
class Scored:
    """A question with evidence and a non-empty answer, and what was found out about it, by method."""

    case: Case
    tokens: list[int]
    answer: str
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    maps: dict[str, AnswerMaps] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        """Whether the model's answer is the right one, word for word."""
        return self.answer == self.case.question.answer


@dataclass
class Part:
    """What came out for one set of questions.

    Attributes:
        reference: the method that the others are compared with.
        accuracy: per kind and "overall", {"correct", "questions"}, over all questions.
        skipped: number of questions left out of the maps, by reason.
        scored: the others.
        summary: {"correct": …, "all": …}, each as `ScoreTable.summary` returns.
        curves: {method: {"deletion" or "insertion": {"mean", "low", "high"}}}, lists along ``FRACTIONS``.
    """

    reference: str
    accuracy: dict[str, dict[str, int]]
    skipped: dict[str, int]
    scored: list[Scored]
    summary: dict[str, dict[str, Any]]
    curves: dict[str, dict[str, dict[str, list[float | None]]]]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single questions."""
        return {
            "reference": self.reference,
            "accuracy": self.accuracy,
            "scored": {"questions": len(self.scored), "correct": sum(q.correct for q in self.scored)},
            "skipped": self.skipped,
            "summary": self.summary,
            "curves": self.curves,
        }


@dataclass
class Evaluation:
    """What came out.

    Attributes:
        settings: what was asked for.
        questions: maps of the methods, for questions of every kind.
        whole_answers: maps of the methods and of glimpse's ablations, for descriptions; None where none was asked for.
        words: of rightly answered descriptions, each against the object it speaks of, as `ScoreTable.summary` returns;
            empty without any.
        seconds: wall time per stage.
    """

    settings: Settings
    questions: Part
    whole_answers: Part | None
    words: dict[str, Any]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single questions, ready for `json.dump`."""
        return {
            "schema": SCHEMA,
            "settings": asdict(self.settings),
            "fractions": list(FRACTIONS),
            "questions": self.questions.to_dict(),
            "whole_answers": self.whole_answers.to_dict() if self.whole_answers else None,
            "words": self.words,
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
        progress: called as ``progress(stage, done, total)`` with the stages "answering …", "explaining …" and
            "curves of …", of "questions" and of "descriptions".

    Raises:
        ArgumentError: settings out of range, or a processor without a chat template.
        FastXAIError: no question could be scored.
    """
    settings = settings or Settings()
    stages = _Stages(progress)
    answerer = Answerer(model, processor)
    asked = _Plan(
        what="questions",
        cases=held_out_cases(settings.scenes, settings.seed),
        methods=settings.methods,
        curves=settings.curves,
        reference="chefer",
        distances=False,
        groups=question_groups,
    )
    questions = _evaluate_part(answerer, asked, settings, stages)
    whole_answers, words = None, None
    if settings.descriptions:
        described = _Plan(
            what="descriptions",
            cases=held_out_descriptions(settings.descriptions, settings.seed),
            methods=settings.whole_answer_variants,
            curves=settings.curves // 2,
            reference=ABLATED,
            distances=True,
            groups=description_groups,
        )
        whole_answers = _evaluate_part(answerer, described, settings, stages)
        words = word_table(answerer, whole_answers.scored, settings.whole_answer_variants)
    spread: dict[str, Any] = {"resamples": settings.resamples, "seed": settings.seed}
    by_word = words.summary(np.ones(len(words.scene), dtype=bool), **spread) if words else {}
    stages.lap("statistics")
    return Evaluation(settings, questions, whole_answers, by_word, stages.seconds)


class _Stages:
    """Progress and wall time of the stages."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count what ran since the last lap as ``stage``."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._began
        self._began = now


@dataclass(frozen=True)
class _Plan:
    """What is asked and compared in one part of the evaluation.

    Attributes:
        what: the questions' name in progress and seconds.
        cases: the questions.
        methods: variants of `maps.VARIANTS`.
        curves: number of questions that get deletion and insertion curves.
        reference: the method that the others are compared with.
        distances: whether each map's distance from the reference's is a score.
        groups: of the scored questions.
    """

    what: str
    cases: Sequence[Case]
    methods: Sequence[str]
    curves: int
    reference: str
    distances: bool
    groups: Callable[[Sequence[Scored]], Mapping[str, Sequence[bool]]]


def _evaluate_part(answerer: Answerer, plan: _Plan, settings: Settings, stages: _Stages) -> Part:
    """Take the cases to their scores: answer, explain, score, delete and insert, summarise."""
    stage, total = f"answering {plan.what}", len(plan.cases)
    answers = answer_cases(
        answerer, plan.cases, settings.max_new_tokens, lambda done: stages.progress(stage, done, total)
    )
    stages.lap(stage)
    scored = [
        Scored(case, tokens, answerer.decode(tokens))
        for case, tokens in zip(plan.cases, answers, strict=True)
        if case.has_evidence and answerer.spoken(tokens)
    ]
    if not scored:
        raise FastXAIError("no question could be scored: none has both evidence and an answer; ask about more scenes")
    _explain(answerer, scored, plan, settings, stages)
    chosen = _delete_and_insert(answerer, scored, plan, settings, stages)
    table = ScoreTable.collect(
        [q.case.scene.seed for q in scored],
        plan.groups(scored),
        {method: [q.scores[method] for q in scored] for method in plan.methods},
    )
    spread: dict[str, Any] = {
        "reference": plan.reference,
        "resamples": settings.resamples,
        "seed": settings.seed,
    }
    without_evidence = sum(not case.has_evidence for case in plan.cases)
    part = Part(
        plan.reference,
        accuracy_by_kind(plan.cases, [answerer.decode(tokens) for tokens in answers]),
        {"no evidence": without_evidence, "empty answer": total - without_evidence - len(scored)},
        scored,
        {
            "correct": table.summary(np.array([q.correct for q in scored]), **spread),
            "all": table.summary(np.ones(len(scored), dtype=bool), **spread),
        },
        mean_curves(chosen, plan.methods, settings),
    )
    stages.lap("statistics")
    return part


def _explain(answerer: Answerer, scored: Sequence[Scored], plan: _Plan, settings: Settings, stages: _Stages) -> None:
    """Give every question its maps and their scores."""
    stage = f"explaining {plan.what}"
    maps, boxes = compute_maps(
        answerer,
        [q.case for q in scored],
        [q.tokens for q in scored],
        plan.methods,
        seed=settings.seed,
        progress=lambda done: stages.progress(stage, done, len(scored)),
    )
    stages.lap(stage)
    for question, own, box in zip(scored, maps, boxes, strict=True):
        question.maps, question.box = own, box
        for method, found in own.items():
            scores = map_scores(found.answer, question.case.question.mask, box, question.case.objects_mask)
            if plan.distances and plan.reference in own:
                scores["distance"] = l1_distance(found.answer, own[plan.reference].answer)
            question.scores[method] = scores
    stages.lap("scoring")


def _delete_and_insert(
    answerer: Answerer, scored: Sequence[Scored], plan: _Plan, settings: Settings, stages: _Stages
) -> list[Scored]:
    """Give some of the questions their curves and the areas under them; return these."""
    stage = f"curves of {plan.what}"
    chosen = [scored[index] for index in curve_questions(scored, plan.curves, settings.seed)]
    for number, question in enumerate(chosen):
        question.curves = deletion_insertion(
            answerer,
            question.case.scene.image,
            question.case.question.text,
            question.tokens,
            {method: found.answer for method, found in question.maps.items()},
            question.box,
            fill=settings.fill,
            seed=settings.seed,
        )
        for method, curve in question.curves.items():
            question.scores[method]["deletion"] = curve.deletion_area
            question.scores[method]["insertion"] = curve.insertion_area
        stages.progress(stage, number + 1, len(chosen))
    stages.lap(stage)
    return chosen


def answer_cases(
    answerer: Answerer,
    cases: Sequence[Case],
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
    *,
    batch: int = 32,
) -> list[list[int]]:
    """Generate the model's greedy answer to every question, as token ids."""
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
        progress(done)
    return answers


def accuracy_by_kind(cases: Sequence[Case], answers: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count right answers and questions, overall and per kind."""
    asked, right = Counter[str](), Counter[str]()
    for case, answer in zip(cases, answers, strict=True):
        for name in ("overall", case.question.kind):
            asked[name] += 1
            right[name] += answer == case.question.answer
    return {
        name: {"correct": right[name], "questions": asked[name]} for name in ("overall", *scenes.KINDS) if asked[name]
    }


def question_groups(questions: Sequence[Scored]) -> dict[str, list[bool]]:
    """Group them: all, by kind, by the number of objects in the scene and by its difficulty."""
    groups: dict[str, list[bool]] = {"overall": [True] * len(questions)}
    for kind in scenes.KINDS:
        groups[kind] = [q.case.question.kind == kind for q in questions]
    groups["no distractor"] = [not q.case.has_distractors for q in questions]
    groups["with distractors"] = [q.case.has_distractors for q in questions]
    groups["hard scenes"] = [q.case.scene.difficulty != "plain" for q in questions]
    return groups


def description_groups(questions: Sequence[Scored]) -> dict[str, list[bool]]:
    """Group them: all, and by what the right description speaks of."""
    two = [any(not np.array_equal(mask, q.case.question.mask) for mask in _word_masks(q)) for q in questions]
    others = [q.case.has_distractors for q in questions]
    return {
        "overall": [True] * len(questions),
        "one object, alone": [not (a or b) for a, b in zip(two, others, strict=True)],
        "one object among others": others,
        "two objects": two,
    }


def _word_masks(question: Scored) -> Sequence[NDArray[np.bool_]]:
    return question.case.question.word_masks or ()


def word_table(answerer: Answerer, questions: Sequence[Scored], methods: Sequence[str]) -> ScoreTable | None:
    """Score every word of the correctly answered descriptions, by its part in the answer; None without any."""
    scene: list[int] = []
    roles: list[str] = []
    several: list[bool] = []
    rows: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for question in questions:
        if not question.correct:
            continue
        asked = question.case.question
        owner = np.array(answerer.word_of_token(question.tokens))
        objects = question.case.objects_mask
        for place, (word, mask) in enumerate(zip(asked.answer.split(), _word_masks(question), strict=True)):
            if not (owner == place).any() or not mask.any():
                continue
            scene.append(question.case.scene.seed)
            roles.append(word_role(word))
            several.append(not np.array_equal(mask, asked.mask))
            for method in methods:
                own, inside = question.maps[method], owner == place
                scores = map_scores(own.tokens[inside].mean(0), mask, question.box, objects)
                rows[method].append(scores | {"weight": float(own.weights[inside].sum())})
    if not scene:
        return None
    groups: dict[str, list[bool]] = {"overall": [True] * len(roles)}
    groups |= {role: [r == role for r in roles] for role in (*WORD_ROLES, "relation", "article")}
    groups["one of two objects"] = several
    return ScoreTable.collect(scene, groups, rows)


WORD_ROLES = {"size": scenes.SIZES, "color": scenes.COLORS, "texture": scenes.TEXTURES, "shape": scenes.SHAPES}


def word_role(word: str) -> str:
    """Say what a word of a description names: "size", "color", "texture", "shape", "relation", or "article" for "a"."""
    role = next((role for role, words in WORD_ROLES.items() if word in words), "relation")
    return "article" if word == "a" else role


def curve_questions(questions: Sequence[Scored], count: int, seed: int) -> list[int]:
    """Choose up to ``count`` correctly answered questions by index, evenly over kinds and without replacement."""
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


def mean_curves(
    questions: Sequence[Scored], methods: Sequence[str], settings: Settings
) -> dict[str, dict[str, dict[str, list[float | None]]]]:
    """Average the curves at every fraction, with a 95 % interval, per method."""
    if not questions:
        return {}
    bootstrap = ClusterBootstrap(
        np.array([q.case.scene.seed for q in questions]), resamples=settings.resamples, seed=settings.seed
    )
    result: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for method in methods:
        result[method] = {}
        for name in ("deletion", "insertion"):
            heights = np.stack([getattr(q.curves[method], name) for q in questions])  # (n, fractions)
            steps = [bootstrap.mean(column) for column in heights.T]
            result[method][name] = {
                part: [None if np.isnan(getattr(step, field)) else getattr(step, field) for step in steps]
                for part, field in (("mean", "value"), ("low", "low"), ("high", "high"))
            }
    return result
